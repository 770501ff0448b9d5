"""What does training cost, in memory and time: RetNet or Transformer?

Memory by the compilers, without the devices: the step of one row of 8,192 tokens on each device, as
in Table 4 of the paper. The paper's 1.3B, 2.7B and 6.7B on one H200 and on one TPU v5p, and 13B on
eight of each, which share parameters and optimiser (mesh.fsdp=8); activations in bfloat16,
parameters and Adam's moments in float32, and each way of recomputation: none, all, and all but
large products ("products", which the measured steps of `benchmarks/accelerator` have). The
Transformer has no flash attention on the H200, because jax chooses cuDNN's on a machine with a GPU
only; on the TPU both with it (splash) and without. Memory that does not fit is what the compiler
says is needed.

Time and memory as measured, on this machine: steps of the quickstart's RetNet and Transformer, each
with its recipe, of 16,384 tokens in rows of 512 to 16,384; both take turns in one process, and the
memory of each is that of a process of its own. Beside them, what was measured on one H200
(`benchmarks/results/accelerator_h200.json`).

    python -m experiments.training_cost                  42 runs, 35 minutes on two quiet cores
    python -m experiments.training_cost --budget=small   2 runs, half a minute

The first needs the compilers: make .venv/cuda .venv/libtpu.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accelerator.report import written_out
from benchmarks.measure import RESULTS, interleaved_seconds
from benchmarks.programs import TrainingStep, random_tokens
from experiments import training_cost_figure
from experiments.compiled_costs import training_memory
from experiments.processes import compilers, in_own_process
from experiments.runs import Measurement, Records, main
from retnet_jax.config import Config
from retnet_jax.configs.quickstart import get_config
from retnet_jax.evaluation.tables import Table, as_markdown

BUDGETS = ("small", "2cores")
ARCHITECTURES = ("retnet", "transformer")
SIZES = ("1.3B", "2.7B", "6.7B", "13B")
REMATS = {"none": "none", "products": "q,k,v,gate,retention,out,up", "full": "full"}
LENGTH = 8192
# Table 4 of arXiv 2307.08621: GB of memory, on eight A100 of 80 GB, of the Transformer, the
# Transformer with FlashAttention, and the RetNet; then their words per second.
PAPER = {
    "1.3B": ((74.8, 38.8, 34.5), (10832.4, 63965.2, 73344.8)),
    "2.7B": ((69.6, 42.1, 42.0), (5186.0, 34990.2, 38921.2)),
    "6.7B": ((69.0, 51.4, 48.0), (2754.4, 16230.1, 17458.6)),
    "13B": ((61.4, 46.3, 45.9), (1208.9, 7945.1, 8642.2)),
}
TOKENS = 16_384  # of a measured step
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384)
ROUNDS = 5
MOST_BYTES = 14 * 2**30  # a step that needs more is not run


def runs(budget: str, records: Records) -> list[Measurement]:
    """Each program that is compiled, then each length that is measured."""
    if budget == "small":
        compiled = _compiled("tiny", "transformer", "full", 128, "cpu", 1, flash=True)
        return [compiled, _measured(256, tokens=256, rounds=1)]
    found = []
    for device in ("H200", "TPU v5p"):
        for size in SIZES:
            count = 8 if size == "13B" else 1
            for architecture in ARCHITECTURES:
                # The TPU's programs take minutes, so there is one of each.
                remats = REMATS if device == "H200" else ("products",)
                with_flash = [device != "H200"]
                if device != "H200" and architecture == "transformer":
                    with_flash.append(False)
                found += [
                    _compiled(size, architecture, remat, LENGTH, device, count, flash)
                    for remat in remats
                    for flash in with_flash
                ]
    return [*found, *(_measured(length, TOKENS, ROUNDS) for length in LENGTHS)]


def _compiled(
    size: str, architecture: str, remat: str, length: int, device: str, count: int, flash: bool
) -> Measurement:
    about = {
        "kind": "compiled",
        "size": size,
        "architecture": architecture,
        "remat": remat,
        "length": length,
        "device": device,
        "count": count,
        "flash": flash,
    }
    name = f"{device.replace(' ', '')}_{size}_{architecture}_{remat}"
    if architecture == "transformer" and device != "H200" and not flash:
        name += "_no_flash"
    arguments = (size, architecture, REMATS[remat], length, 1, device, count, flash)

    def measure() -> dict[str, Any]:
        packages = () if device == "cpu" else compilers()
        return in_own_process(training_memory, *arguments, packages=packages)

    return Measurement(name, about, measure)


def _measured(length: int, tokens: int, rounds: int) -> Measurement:
    about = {"kind": "measured", "length": length, "rows": tokens // length}
    return Measurement(f"measured_{length}", about, partial(measured_steps, length, tokens, rounds))


def step_config(architecture: str, length: int, tokens: int) -> Config:
    """The quickstart's recipe with rows of another length."""
    config = get_config(architecture)
    config.data.sequence_length = length
    config.train.batch_size = tokens // length
    return config


def measured_steps(length: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds and memory of a step of each model, by architecture.

    Returns:
      For each: parameters; program_bytes, the memory of the step by the compiler; seconds of each
      timed step and peak_bytes, the most memory that a process had while it took two steps. The
      last two are missing for a step that needs more than `MOST_BYTES`.
    """
    found, steps = {}, {}
    for architecture in ARCHITECTURES:
        config = step_config(architecture, length, tokens)
        step = TrainingStep(config, random_tokens(config))
        found[architecture] = {
            "parameters": config.model.parameter_count(),
            "program_bytes": step.peak_bytes,
        }
        if step.peak_bytes <= MOST_BYTES:
            steps[architecture] = step
    for architecture, seconds in interleaved_seconds(steps, rounds).items():
        found[architecture]["seconds"] = seconds
    running = list(steps)
    steps.clear()  # their memory is free before others are measured
    del step
    for architecture in running:
        peak = in_own_process(peak_of_steps, architecture, length, tokens)
        found[architecture]["peak_bytes"] = peak
    return found


def peak_of_steps(architecture: str, length: int, tokens: int) -> int:
    """The largest resident memory of this process during two steps, in bytes."""
    config = step_config(architecture, length, tokens)
    step = TrainingStep(config, random_tokens(config))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, of the compiler
    step()
    step()
    status = Path("/proc/self/status").read_text()
    (line,) = (x for x in status.splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def report(budget: str, records: Records) -> str:
    """The tables as Markdown; draws the figure."""
    training_cost_figure.draw(budget, _compiled_records(records), _measured_records(records), PAPER)
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """Memory by the compilers, and speed and memory as measured."""
    found = [_memory_table(_compiled_records(records)), _step_table(_measured_records(records))]
    if budget != "small":
        found.append(_h200_table())
    return found


def _compiled_records(records: Records) -> list[dict[str, Any]]:
    return [record for record in records.values() if record["kind"] == "compiled"]


def _measured_records(records: Records) -> list[dict[str, Any]]:
    found = [record for record in records.values() if record["kind"] == "measured"]
    return sorted(found, key=lambda record: record["length"])


def _memory_table(compiled: Sequence[dict[str, Any]]) -> Table:
    """GiB of a device by size, program and recomputation, with the paper's."""
    remats = [x for x in REMATS if any(record["remat"] == x for record in compiled)]
    length = compiled[0]["length"] if compiled else LENGTH
    table = Table(
        f"GiB of each device in a step of {length:,} tokens on each",
        ("size, devices", "model", *remats, "kernels", "paper, GB"),
        note="> : more than the device has. The paper's: eight A100, its own batch sizes.",
    )
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in compiled:
        where = f"{record['size']}, {record['count']} {record['device']}"
        groups.setdefault((where, _label(record)), {})[record["remat"]] = record
    for (where, label), by_remat in groups.items():
        cells = [_gib(by_remat.get(remat)) for remat in remats]
        first = next(iter(by_remat.values()))
        kernels = next((str(x["kernels"]) for x in by_remat.values() if "kernels" in x), "")
        paper = PAPER.get(first["size"], ((None, None, None), ()))[0]
        column = {"Transformer": 0, "Transformer, flash": 1, "RetNet": 2}[label]
        table.add(where, label, *cells, kernels, str(paper[column] or ""))
    return table


def _label(record: dict[str, Any]) -> str:
    if record["architecture"] == "retnet":
        return "RetNet"
    on_tpu = record["device"].startswith("TPU")
    return "Transformer, flash" if record["flash"] and on_tpu else "Transformer"


def _gib(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if record["peak_bytes"] is None:
        return "> all"
    return ("" if record["fits"] else "> ") + f"{record['peak_bytes'] / 2**30:.1f}"


def _step_table(measured: Sequence[dict[str, Any]]) -> Table:
    """Tokens/s and memory by length, and the ratio of the two models in each round."""
    cores = measured[0]["machine"]["cores"] if measured else os.cpu_count()
    table = Table(
        f"training on {cores} cores: medians, and the least and most of the rounds",
        (
            *("length", "RetNet, tokens/s", "Transformer, tokens/s", "RetNet is faster"),
            *("RetNet, GiB", "Transformer, GiB"),
        ),
        note="GiB: most resident memory of a process, with Python and jax in it.",
    )
    for record in measured:
        tokens = record["rows"] * record["length"]
        seconds = [record[name].get("seconds") for name in ARCHITECTURES]
        rates = [x and [tokens / each for each in x] for x in seconds]
        times = None
        if None not in seconds:
            times = [b / a for a, b in zip(*seconds, strict=True)]
        memory = [record[name].get("peak_bytes") for name in ARCHITECTURES]
        table.add(
            f"{record['length']:,}",
            *(_median(x, "{:,.0f}") for x in rates),
            _median(times, "{:.2f}") + (" times" if times else ""),
            *(f"{x / 2**30:.2f}" if x else "does not fit" for x in memory),
        )
    return table


def _median(values: Sequence[float] | None, form: str) -> str:
    """The median, with the smallest and the largest value behind it."""
    if values is None:
        return "does not fit"
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def _h200_table() -> Table:
    """The steps that were measured on an H200."""
    found = json.loads((RESULTS / "accelerator_h200.json").read_text())
    table = Table(
        "measured on one H200 (python -m benchmarks.accelerator)",
        ("size", "model", "length", "rows", "tokens/s", "GiB"),
        note="The Transformer has cuDNN's flash attention; both recompute all but products.",
    )
    cases = found["sections"]["training"]["cases"].values()
    by_model = sorted(cases, key=lambda x: [x.get(y) for y in ("size", "architecture", "length")])
    for record in by_model:
        if "tokens_per_second" in record:
            table.add(
                record["size"],
                record["architecture"] + ", layers written out" * written_out(record),
                f"{record['length']:,}",
                str(record["rows"]),
                f"{record['tokens_per_second']:,.0f}",
                f"{record['peak_bytes'] / 2**30:.1f}",
            )
    return table


if __name__ == "__main__":
    main(sys.modules[__name__])
