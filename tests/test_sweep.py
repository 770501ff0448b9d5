"""The table of tilings of the Hopper kernels, and the sweep of benchmarks.accelerator for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.accelerator import cases, sweep
from benchmarks.accelerator.cases import Results
from benchmarks.accelerator.sweep import Measured
from retnet_jax.ops.retention import mosaic_gpu
from retnet_jax.ops.retention.mosaic_gpu import tuned
from retnet_jax.ops.retention.mosaic_gpu.scores import default_stages
from retnet_jax.ops.retention.mosaic_gpu.tiling import Tiling
from retnet_jax.ops.retention.mosaic_gpu.tuned import Scores, Walk

ROOT = Path(__file__).parent.parent
WALK = Measured(Walk(256, 512, 8192, reverse=False), rows=1, heads=1)
HALVED = Measured(Walk(512, 256, 8192, reverse=True), rows=1, heads=1)  # over two warpgroups
SCORES = Measured(Scores(256, 8192), rows=1, heads=1)


def table_of(monkeypatch, path, device, entries):
    """Makes the kernels read a table with these choices, by kernel, for one device."""
    written = {str(kernel): {"choice": choice} for kernel, choice in entries.items()}
    path.write_text(json.dumps({device: written}))
    monkeypatch.setattr(tuned, "TABLE", path)


@pytest.mark.parametrize(
    ("contracted", "written", "halves", "tiles", "groups", "cluster", "chunks_ahead"),
    [
        (64, 64, 1, 1, 1, 1, 2),
        (64, 128, 1, 1, 2, 1, 2),
        (128, 64, 1, 2, 1, 1, 2),
        (128, 128, 1, 2, 2, 1, 2),
        (128, 256, 1, 2, 2, 2, 2),
        (256, 128, 1, 4, 2, 1, 2),
        (256, 432, 1, 4, 2, 2, 2),
        (256, 512, 1, 4, 2, 2, 2),
        (512, 256, 2, 4, 1, 2, 1),
        (512, 320, 2, 4, 1, 1, 1),
    ],
)
def test_tilings_without_an_entry(
    contracted, written, halves, tiles, groups, cluster, chunks_ahead, monkeypatch, tmp_path
):
    table_of(monkeypatch, tmp_path / "table.json", "NVIDIA H200", {})
    expected = Tiling(halves, tiles, groups, cluster, chunks_ahead)
    for reverse in (False, True):
        assert tuned.tiling(Walk(contracted, written, 8192, reverse)) == expected
    assert expected.refused(written) is None
    assert tuned.stages(Scores(contracted, 8192)) == min(4, -(-contracted // 64))


def test_an_entry_is_for_one_device_shape_and_direction(monkeypatch, tmp_path):
    choice = {"groups": 1, "cluster": 4, "chunks_ahead": 1}
    entries = {WALK.kernel: choice, SCORES.kernel: {"stages": 2}}
    table_of(monkeypatch, tmp_path / "cpu.json", "cpu", entries)
    default = Tiling.of(256, 512)
    assert tuned.tiling(WALK.kernel) == default._replace(**choice) != default
    assert tuned.stages(SCORES.kernel) == 2 != default_stages(256)
    assert tuned.tiling(WALK.kernel._replace(length=4096)) == default
    assert tuned.tiling(WALK.kernel._replace(reverse=True)) == default
    assert tuned.stages(SCORES.kernel._replace(width=512)) == default_stages(512)
    table_of(monkeypatch, tmp_path / "h100.json", "NVIDIA H100 80GB HBM3", entries)
    assert tuned.tiling(WALK.kernel) == default
    assert tuned.stages(SCORES.kernel) == default_stages(256)


def test_the_kernels_are_traced_with_the_entries(monkeypatch, tmp_path):
    """Forward and backward of heads of 64/256, traced for an H200, which this machine has not."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("device",), abstract_device=device)
    narrow, wide = (jax.ShapeDtypeStruct((1, 128, 1, x), jnp.bfloat16) for x in (64, 256))

    def loss(q, k, v):
        return mosaic_gpu.chunkwise(q, k, v, jnp.full(1, -0.1), None, None)[0].sum()

    def clusters() -> list[int]:
        with jax.sharding.use_abstract_mesh(mesh):
            text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(narrow, narrow, wide))
        return [int(x) for x in re.findall(r"cluster=\((\d+),\)", text)]

    path = tmp_path / "table.json"
    table_of(monkeypatch, path, "NVIDIA H200", {})
    # y, d_q, d_k and d_v: d_q and d_k are one CTA wide.
    assert clusters() == [2, 1, 1, 2]
    backwards = {Walk(64, 256, 128, True): {"groups": 1, "cluster": 4, "chunks_ahead": 3}}
    table_of(monkeypatch, tmp_path / "backwards.json", "NVIDIA H200", backwards)
    assert clusters() == [2, 1, 1, 4]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"groups": 4}, "4 computing warpgroups; a CTA has registers for 2"),
        ({"cluster": 3}, "4 CTAs for a head do not divide into clusters of 3"),
        ({"chunks_ahead": 3}, "289792 bytes of shared memory; a CTA has 226304"),
    ],
)
def test_reasons_of_refused_tilings(choice, reason):
    assert Tiling.of(256, 512)._replace(**choice).refused(512) == reason


def assert_valid(table):
    """Entries are of kernels that are swept, with accepted choices and where they come from."""
    swept = {str(x.kernel): x for x in sweep.all_kernels(tiny=False)}
    for entries in table.values():
        for name, entry in entries.items():
            assert entry["choice"] in swept[name].choices()
            assert swept[name].refused(entry["choice"]) is None
            assert 0 < entry["ms"] <= entry["default_ms"]
            for field in ("date", "commit", "jax"):
                assert entry[field] not in ("", "unknown"), f"{name} has no {field}"


def test_the_committed_table_is_valid():
    table = sweep.read_table(tuned.TABLE)
    assert all("H100" in device or "H200" in device for device in table)
    assert_valid(table)


class Timing:
    """Stands for the device: times by choice, and a clock that each measurement advances by 1."""

    def __init__(self, monkeypatch, best):
        self.best, self.now, self.measured = best, 0, []
        monkeypatch.setattr(cases, "time", SimpleNamespace(time=lambda: self.now))

    def __call__(self, found, choice):
        self.now += 1
        self.measured.append(found.case_name(choice))
        if found.refused(choice):
            return sweep.time_choice(found, choice)
        ms = 1.0 if choice == self.best else 2.0
        return {"ms": ms, "samples_ms": [ms - 0.1, ms, ms + 0.1]}


def begin(path) -> Results:
    results = Results(path)
    results.describe(device="cpu", date="2026-01-01", commit="1234567", jax="0.11.2")
    return results


def test_the_fastest_accepted_choice_becomes_the_entry(monkeypatch, tmp_path):
    best = {"groups": 1, "cluster": 4, "chunks_ahead": 2}
    timing, table = Timing(monkeypatch, best), tmp_path / "table.json"
    results = begin(tmp_path / "sweep.json")
    sweep.sweep(results, table, [WALK, HALVED, SCORES], 1e9, again=False, measure_choice=timing)
    assert timing.measured[0] == WALK.case_name(WALK.default)
    records = results.records("sweep")
    assert list(records) == timing.measured
    refused = {x["not_here"] for x in records.values() if "ms" not in x}
    assert "4 computing warpgroups; a CTA has registers for 2" in refused
    assert "289792 bytes of shared memory; a CTA has 226304" in refused
    # Of two groups with clusters of 1, 2 and 4, and of one, one or two chunks ahead fit.
    timed = [name for name, x in records.items() if "ms" in x]
    assert sum(name.startswith(str(WALK.kernel)) for name in timed) == 6 * 2
    assert sum(name.startswith(str(HALVED.kernel)) for name in timed) == 3 * 1

    found = json.loads(table.read_text())
    assert_valid(found)
    assert found["cpu"][str(WALK.kernel)] == {
        "choice": best,
        "ms": 1.0,
        "default_ms": 2.0,
        "rows": 1,
        "heads": 1,
        "date": "2026-01-01",
        "commit": "1234567",
        "jax": "0.11.2",
    }
    assert found["cpu"][str(SCORES.kernel)]["choice"] == {"stages": 4}  # none was faster
    monkeypatch.setattr(tuned, "TABLE", table)
    assert tuned.tiling(WALK.kernel) == Tiling.of(256, 512)._replace(**best)


def test_the_default_stays_unless_every_round_is_faster(monkeypatch, tmp_path):
    samples = {4: [2.0, 2.1, 2.2], 3: [1.8, 1.9, 2.05], 2: [1.95, 1.96, 1.97], 1: [3.0]}

    def timing(found, choice):
        rounds = samples[choice["stages"]]
        return {"ms": sorted(rounds)[len(rounds) // 2], "samples_ms": rounds}

    for stages in (4, 2):
        table = tmp_path / f"{stages}.json"
        results = begin(tmp_path / f"sweep {stages}.json")
        sweep.sweep(results, table, [SCORES], 1e18, again=False, measure_choice=timing)
        entry = json.loads(table.read_text())["cpu"][str(SCORES.kernel)]
        assert entry["choice"] == {"stages": stages}
        samples[3] = [3.0]  # now 2 stages have the smallest median, and no round as slow as 2.0


def test_the_sweep_ends_in_time_and_resumes(monkeypatch, tmp_path):
    timing, table, path = Timing(monkeypatch, None), tmp_path / "table.json", tmp_path / "s.json"
    narrow = Measured(Scores(128, 8192), rows=1, heads=1)
    found = [narrow, SCORES]  # 2 and 4 choices

    def run(results, deadline, again=False):
        del timing.measured[:]
        sweep.sweep(results, table, found, deadline, again, measure_choice=timing)
        return len(timing.measured)

    results = begin(path)
    assert run(results, deadline=3) == 3
    assert list(sweep.read_table(table)["cpu"]) == [str(narrow.kernel)]  # written already
    assert run(Results(path), deadline=3) == 0
    path.write_text(json.dumps(results.data))
    assert run(Results(path), deadline=1e9) == 3
    assert timing.measured == [SCORES.case_name(x) for x in SCORES.choices()[1:]]
    assert list(sweep.read_table(table)["cpu"]) == [str(x.kernel) for x in found]
    # With entries nothing is measured, even without records; `again` measures everything.
    assert run(begin(tmp_path / "none.json"), deadline=1e9) == 0
    assert run(begin(tmp_path / "again.json"), deadline=1e9, again=True) == 6


def test_an_entry_is_written_after_its_process_ended(monkeypatch, tmp_path):
    """The supervisor records the last choice, which ended the process."""
    timing, table, path = Timing(monkeypatch, None), tmp_path / "table.json", tmp_path / "s.json"
    narrow = Measured(Scores(128, 8192), rows=1, heads=1)
    sweep.sweep(begin(path), table, [narrow], 1, again=False, measure_choice=timing)
    last = narrow.case_name(narrow.choices()[1])
    assert not table.exists()
    Results(path).finish("sweep", last, {"ended": "it did not end within 45 seconds"})
    sweep.sweep(Results(path), table, [narrow], 1e9, again=False, measure_choice=timing)
    assert len(timing.measured) == 1
    entry = sweep.read_table(table)["cpu"][str(narrow.kernel)]
    assert entry["choice"] == narrow.default


def test_no_entry_without_a_time_of_the_default(tmp_path, capsys):
    def timing(found, choice):
        if choice == found.default:
            raise AssertionError("differs from XLA")
        return {"ms": 1.0, "samples_ms": [1.0]}

    table = tmp_path / "table.json"
    results = begin(tmp_path / "sweep.json")
    sweep.sweep(results, table, [SCORES], 1e18, again=False, measure_choice=timing)
    assert not table.exists()
    assert "scores 256, 8192 tokens: no entry, because the default" in capsys.readouterr().out


def test_records_of_other_kernels_are_measured_again(tmp_path, capsys):
    results = begin(tmp_path / "sweep.json")
    sweep.forget_other_code(results)
    results.finish("sweep", "a", {"ms": 1.0})
    sweep.forget_other_code(results)
    assert results.records("sweep") == {"a": {"ms": 1.0}}
    results.describe(code="jax 0.1, kernels 0")
    sweep.forget_other_code(results)
    assert results.records("sweep") == {}
    assert "was measured with jax 0.1, kernels 0, not jax" in capsys.readouterr().out


def test_the_sweep_begins_with_the_widest_heads_at_8k():
    found = [str(x.kernel) for x in sweep.all_kernels(tiny=False)]
    assert found[:6] == [
        "walk 256 to 512 forwards, 8192 tokens",
        "walk 256 to 512 backwards, 8192 tokens",
        "walk 512 to 256 forwards, 8192 tokens",
        "walk 512 to 256 backwards, 8192 tokens",
        "scores 256, 8192 tokens",
        "scores 512, 8192 tokens",
    ]
    assert len(found) == len(set(found))
    for x in sweep.all_kernels(tiny=False):
        assert x.choices()[0] == x.default
        assert x.refused(x.default) is None
        assert x.rows * x.kernel.length == 65_536


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--output={tmp_path}/sweep.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}

    def run(*flags):
        return subprocess.run(
            [*command, *flags], capture_output=True, text=True, cwd=ROOT, env=environment
        )

    for flags, message in (
        (["--sweep", "--minutes=3"], "--minutes has no effect with --sweep"),
        (["--sweep_again"], "--sweep_again has no effect without --sweep"),
    ):
        refused = run(*flags)
        assert refused.returncode != 0
        assert message in refused.stderr + refused.stdout
    found = run("--sweep", "--tiny", "--only=scores 128", "--commit=1234567")
    assert found.returncode == 0, found.stderr
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert data["commit"] == "1234567"
    assert list(data["sections"]["sweep"]["cases"]) == [
        "scores 128, 128 tokens: stages 2",
        "scores 128, 128 tokens: stages 1",
    ]
    assert sweep.read_table(tuned.TABLE).get("cpu") is None
