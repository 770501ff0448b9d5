"""benchmarks.accelerator: its bounds, the script on tiny shapes, and its handling of failures."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks.accelerator import report, supervisor, training
from benchmarks.accelerator.bounds import attention_work, decoding_bytes, retention_work
from benchmarks.accelerator.cases import BrokenDeviceError, Case, Results, run
from benchmarks.accelerator.sections import SECTIONS, cases_of
from benchmarks.measure import current_commit

ROOT = Path(__file__).parent.parent
# Matrix products and copies, as measured on an H200.
RATE, BANDWIDTH = 790e12, 4.3e12


@pytest.mark.parametrize(("both", "milliseconds"), [(False, 0.10), (True, 0.36)])
def test_roofline_of_a_layer_of_6p7b(both, milliseconds):
    work = retention_work(8192, heads=16, key_width=256, value_width=512, both=both)
    assert round(1000 * work.seconds(RATE, BANDWIDTH), 2) == milliseconds
    # 4KV + c(K+V), and with the backward pass 10KV + c(3K+2V) more.
    product, chunk = 256 * 512, 128
    flops = 4 * product + chunk * 768 + both * (10 * product + chunk * 1792)
    assert work.flops == 8192 * 16 * flops


def test_narrow_heads_are_bound_by_bytes():
    work = retention_work(1000, heads=2, key_width=8, value_width=16, both=False)
    assert work.bytes == 1000 * 2 * (8 + 8 + 16 + 16) * 2
    assert work.seconds(RATE, BANDWIDTH) == work.bytes / BANDWIDTH


def test_causal_attention_uses_half_of_the_scores():
    work = attention_work(8, heads=3, width=4, length=8, both=False)
    pairs = sum(range(1, 9))  # of a query and a visible key
    assert work.flops == 3 * pairs * 2 * 2 * 4
    assert attention_work(8, 3, 4, 8, both=True).flops == 3.5 * work.flops


@pytest.mark.parametrize(
    ("layers", "width", "speeds"),
    [
        (24, 2048, (1579, 16.3e3, 30.4e3, 38.8e3)),
        (32, 2560, (788, 8.6e3, 17.2e3, 22.8e3)),
        (32, 4096, (317, 3.9e3, 9.0e3, 13.4e3)),
    ],
)
def test_bounds_of_decoding_speed(layers, width, speeds):
    """With a vocabulary of 50,257, and weights and state in bfloat16."""
    weights = 2 * (12 * layers * width**2 + 50_257 * width)
    state = 2 * layers * (width // 256) * 256 * 512
    for batch, expected in zip((1, 16, 64, 256), speeds, strict=True):
        found = batch * BANDWIDTH / decoding_bytes(weights, state, state, batch)
        shown = round(found) if batch == 1 else round(found, -2)
        assert shown == expected


def test_traffic_counts_weights_and_states():
    """Checked for a small model of known shapes."""
    from benchmarks.accelerator import decoding

    model = decoding.random_model("tiny", "retnet")
    config = model.config
    norms = config.n_layers * 4 * 16 + 2 * 16
    assert decoding.traffic(model, 5) == {
        "weight_bytes": 2 * (12 * config.n_layers * 16**2 + 64 * 16) + 4 * norms,
        "state_read_bytes": 2 * config.n_layers * 2 * 8 * 16,
        "state_written_bytes": 2 * config.n_layers * 2 * 8 * 16,
    }
    cached = decoding.traffic(decoding.random_model("tiny", "transformer"), 5)
    # A CPU stores keys and values in float32.
    assert cached["state_read_bytes"] == 4 * config.n_layers * 5 * 2 * 16
    assert cached["state_written_bytes"] == 4 * config.n_layers * 2 * 16


def test_candidates_of_all_lengths_recompute_alike(monkeypatch):
    device = SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    for length, rows in ((2048, 16), (8192, 4), (32_768, 1)):
        config = training.on_one_device(training.CONFIGS["1.3B"]("retnet"), length)
        found = training.candidates(config)
        assert [x.model.remat for x in found] == [
            "q,k,v,gate,retention,out,up",
            "q,k,v,gate",
            "full",
        ]
        for x in found:
            x.check()
            assert x.train.batch_size * length == 32_768
        assert found[0].train.batch_size // found[0].train.micro_batches == rows


def test_largest_batch_fits_in_memory(monkeypatch):
    from benchmarks.accelerator import decoding

    traffic = decoding.traffic(decoding.random_model("tiny", "retnet"), 5)
    embedding = 2 * 64 * 16
    weights, row = traffic["weight_bytes"] + embedding, traffic["state_read_bytes"]
    for rows, expected in ((0.5, 1), (7.9, 4), (8, 8), (1e9, 4096)):
        monkeypatch.setattr(decoding, "memory_limit", lambda rows=rows: weights + rows * row)
        assert decoding.largest_batch("tiny", "retnet", 5, 4096) == expected


@pytest.mark.slow
@pytest.mark.compiles(100, reason="each case of the benchmarks is a program or two")
def test_all_sections_on_tiny_shapes(tmp_path):
    """All checks in one test, so that the sections are measured only once."""
    path = tmp_path / "accelerator.json"
    for section in SECTIONS:
        run(Results(path), section, cases_of(section, tiny=True), time.time() + 600)
    check_every_section_is_measured(path)
    check_kernels_compute_the_same(path)
    check_speeds_follow_from_times(path)
    check_tables_show_every_case(path)
    check_plots_are_drawn(path)


def check_every_section_is_measured(tiny):
    sections = json.loads(tiny.read_text())["sections"]
    assert list(sections) == list(SECTIONS)
    errors = [x["largest_error"] for x in sections.pop("checks")["cases"].values()]
    assert all(0 < error < 2e-2 for error in errors)
    for section in sections.values():
        assert list(section["cases"]) == section["planned"]
        for record in section["cases"].values():
            assert ("ms" in record) or ("not_here" in record), record
            if "ms" in record:
                assert record["ms"] > 0
                assert len(record["samples_ms"]) == 5


def check_kernels_compute_the_same(tiny):
    records = report.Report(json.loads(tiny.read_text())).measured("kernels")
    assert {x["kind"] for x in records if x["implementation"] == "xla"} == {"both", "forward"}
    for record in records:
        assert record["relative_error"] < 1e-2  # bfloat16
        assert record["rows"] * record["length"] == record["tokens"]


def check_speeds_follow_from_times(tiny):
    found = report.Report(json.loads(tiny.read_text()))
    steps, decoded = found.measured("training"), found.measured("decoding")
    assert {x["architecture"] for x in decoded} == {"retnet", "transformer"}
    for x in steps:
        assert x["tokens_per_second"] == pytest.approx(1000 * x["rows"] * x["length"] / x["ms"])
        model = training.tiny_config(x["architecture"]).model
        assert x["flops_per_token"] == model.training_flops_per_token(x["length"])
        # The first loss is near log(vocabulary), and it falls because the batch is always the same.
        assert x["losses"][0] == pytest.approx(math.log(64), abs=0.5)
        assert x["losses"][-1] < x["losses"][0]
    for x in decoded:
        if "position" in x:
            assert x["finite"]
            assert x["tokens_per_second"] == pytest.approx(1000 * x["batch"] / x["ms"])
    best = [x for x in decoded if "tried" in x]
    assert len(best) == 2
    for x in best:
        assert x["tokens_per_second"] == max(x["tried"].values())


def check_tables_show_every_case(tiny):
    found = report.Report(json.loads(tiny.read_text()) | {"tiny": True})
    text = report.text(found)
    assert "tiny shapes: these are no measurements" in text
    assert "| kernels | attention 8/8 t 32 both | not here: cuDNN is for NVIDIA GPUs |" in text
    speeds = found.measured("training") + found.measured("decoding")
    for record in speeds:
        assert f"| {record['tokens_per_second']:,.0f} |" in text
    # The goals are for other sizes.
    assert report.goals_table(found).count(report.NOT_MEASURED) == len(report.GOALS)


def check_plots_are_drawn(tiny):
    from benchmarks.accelerator.plots import plot

    plot(report.Report(json.loads(tiny.read_text())), tiny.with_suffix(".png"))
    assert tiny.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_search_for_the_best_batch_begins_with_the_largest(monkeypatch):
    from benchmarks.accelerator import decoding

    speeds = {4: 30.0, 2: 40.0, 1: 20.0}

    def measure(size, architecture, batch, position):
        if batch == 16:
            raise MemoryError("needs too much")
        if batch == 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"batch": batch, "tokens_per_second": speeds[batch]}

    monkeypatch.setattr(decoding, "measure", measure)
    assert decoding.best_batch("tiny", "retnet", 5, most=16) == {
        "batch": 2,
        "tokens_per_second": 40.0,
        "tried": {"16": "out of memory", "8": "out of memory", "4": 30.0, "2": 40.0, "1": 20.0},
    }


def test_goals_are_read_from_the_records():
    kernel = {"key_width": 256, "value_width": 512, "length": 8192, "kind": "both"}
    work = {"flops": 79e9, "bytes": 1e6}  # 0.1 ms
    step = {"size": "1.3B", "architecture": "retnet", "flops_per_token": 8e9}
    decoded = {"size": "6.7B", "architecture": "retnet", "batch": 1}
    traffic = {"weight_bytes": 12.7e9, "state_read_bytes": 0.1e9, "state_written_bytes": 0.1e9}
    sections = {
        "limits": {
            "copy": {"ms": 1, "bytes_per_second": BANDWIDTH},
            "matrix": {"ms": 1, "flops_per_second": RATE},
        },
        "kernels": {
            "a": kernel | work | {"implementation": "xla", "ms": 0.8},
            "b": kernel | work | {"implementation": "mosaic_gpu", "ms": 0.2},
            "c": kernel | work | {"implementation": "fla", "ms": 0.7},
            "d": {"implementation": "cudnn attention", "length": 8192, "kind": "both", "ms": 0.9},
        },
        "training": {
            "a": step | {"ms": 1, "length": 8192, "tokens_per_second": 61_812.5},
            "b": step | {"ms": 1, "length": 2048, "tokens_per_second": 60_000},
            "c": step | {"ms": 1, "length": 32_768, "tokens_per_second": 58_800},
        },
        "decoding": {
            "a": decoded | traffic | {"ms": 3.75, "position": 100},
            "b": decoded | traffic | {"ms": 3.78, "position": 100_000},
            "6.7B retnet best batch position 8192": {"ms": 1, "tokens_per_second": 9000},
            "6.7B transformer best batch position 8192": {"ms": 1, "tokens_per_second": 1000},
        },
    }
    data = {name: {"planned": [], "cases": cases} for name, cases in sections.items()}
    found = report.Report({"device": "NVIDIA H200", "sections": data})
    numbers = {goal.what: goal.found(found) for goal in report.GOALS}
    assert {name: x for name, x in numbers.items() if x is not None} == pytest.approx(
        {
            "forward+backward, 256/512 at 8k, against fla": 3.5,
            "forward+backward, 256/512 at 8k, of the roofline": 0.5,
            "forward+backward, 256/512 at 8k, against cuDNN attention": 4.5,
            "training 1.3B at 8k, MFU": 0.5,
            "training 1.3B, tokens/s at 32k of those at 2k": 0.98,
            "decoding 6.7B, batch 1, of the bandwidth bound": 0.8,
            "decoding 6.7B, time of a token at 100,000 to that at 100": 1.008,
            "decoding 6.7B at 8k, best throughput against the Transformer": 9.0,
        }
    )


def test_the_docs_have_the_table_of_goals():
    """The goals, and a column for each device: its numbers as the benchmark reports them."""
    lines = (ROOT / "docs/measurements.md").read_text().splitlines()
    for device, column in (("h200", 3), ("h100", 4)):
        data = json.loads((ROOT / f"benchmarks/results/accelerator_{device}.json").read_text())
        for row in report.goals_table(report.Report(data)).splitlines()[2:]:
            *goal, number = [cell.strip() for cell in row.strip("|").split("|")]
            found = [
                cells
                for line in lines
                if (cells := [cell.strip() for cell in line.strip("|").split("|")])[:3] == goal
            ]
            assert len(found) == 1, row
            assert found[0][column] == number.replace("not yet measured", "not measured"), row


@pytest.mark.slow
def test_failures_are_recorded_and_the_next_case_runs(tmp_path):
    def raising(error):
        def measure():
            raise error

        return measure

    cases = [
        Case("kernel", raising(NotImplementedError("needs a GPU"))),
        Case("library", raising(ModuleNotFoundError("No module named 'fla'"))),
        Case("memory", raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))),
        Case("wrong", raising(ValueError("q\ndoes not fit"))),
        Case("device", raising(jax.errors.JaxRuntimeError("INTERNAL: illegal address"))),
        Case("number", lambda: {"ms": 1.0}),
    ]
    path = tmp_path / "results.json"
    with pytest.raises(BrokenDeviceError):  # a new process measures the remaining cases
        run(Results(path), "kernels", cases, time.time() + 60)
    run(Results(path), "kernels", cases, time.time() + 60)
    records = Results(path).records("kernels")
    for record in records.values():
        del record["took_seconds"], record["commit"]
    assert records == {
        "kernel": {"not_here": "needs a GPU"},
        "library": {"not_here": "No module named 'fla'"},
        "memory": {"out_of_memory": "RESOURCE_EXHAUSTED: Out of memory"},
        "wrong": {"error": "ValueError: q does not fit"},
        "device": {"error": "JaxRuntimeError: INTERNAL: illegal address"},
        "number": {"ms": 1.0},
    }


def test_cases_that_were_not_reached_are_listed(tmp_path):
    path = tmp_path / "results.json"
    run(Results(path), "kernels", [Case("first", dict), Case("second", dict)], deadline=0)
    text = report.text(report.Report(json.loads(path.read_text())))
    assert "| kernels | first | not reached |\n| kernels | second | not reached |" in text


# A case ends the first process; another case hangs in the second process.
FAILING = """
import json, sys, time
from pathlib import Path

path = Path(next(x.split("=")[1] for x in sys.argv if x.startswith("--output=")))
data = json.loads(path.read_text()) if path.exists() else {"sections": {}}
first = not data["sections"]
if first:
    data["sections"]["kernels"] = {"planned": ["dies", "hangs"], "cases": {}}
data["running"] = {"section": "kernels", "name": "dies" if first else "hangs"}
path.write_text(json.dumps(data))
if first:
    sys.exit(9)
time.sleep(600)
"""


def test_the_supervisor_survives_processes_that_die_or_hang(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{FAILING}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(supervisor, "_MEMORY_SECONDS", 0.1)
    path = tmp_path / "results.json"
    supervisor.run(["kernels"], path, seconds=3, options=[])
    assert Results(path).records("kernels") == {
        "dies": {"ended": "the process ended with status 9; see its output"},
        "hangs": {"cut_off": "the section's time was over"},
    }


@pytest.mark.slow
def test_the_script_needs_no_libraries_of_data_or_checkpoints(tmp_path):
    """The script and all sections run although importing these libraries or torch fails."""
    for name in ("grain", "orbax", "tokenizers", "ml_collections", "tensorboardX", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_NUM_CPU_DEVICES": "1"}
    program = (
        "from benchmarks.accelerator.sections import SECTIONS, cases_of\n"
        "print([len(cases_of(name, tiny=False)) > 2 for name in SECTIONS])"
    )
    script = [sys.executable, "-m", "benchmarks.accelerator", "--tiny", "--sections=limits"]
    script.append(f"--output={tmp_path}/results.json")
    for command, expected in (
        ([sys.executable, "-c", program], "[True, True, True, True, True]"),
        (script, "limits: matrix: ms "),
    ):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert len(Results(tmp_path / "results.json").records("limits")) == 3


def test_results_that_a_program_wrote_do_not_change_its_commit(tmp_path):
    """Each record of a long experiment has the commit of its code."""
    assert current_commit(tmp_path) == "unknown"
    code, results = tmp_path / "code.py", tmp_path / "experiments" / "results" / "some.json"
    results.parent.mkdir(parents=True)
    for path in (code, results):
        path.write_text("1\n")
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    commit = current_commit(tmp_path)
    assert len(commit) >= 7
    results.write_text("2\n")
    (tmp_path / "untracked.py").write_text("3\n")
    assert current_commit(tmp_path) == commit
    code.write_text("4\n")
    assert current_commit(tmp_path) == f"{commit}-dirty"
