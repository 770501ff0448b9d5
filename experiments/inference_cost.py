"""What does generation cost, in memory, throughput and latency: RetNet, hybrid or Transformer?

The article's three plots (Figure 6 of the paper), after 128 to 32,768 tokens and for batches of 1
to 64. The models are those of `cost_models.py`, of equal numbers of parameters; a hybrid has
attention to a window of 1,024 tokens in every fourth layer. States are random numbers of the size
that they have after so many tokens, and each call decodes a few tokens greedily in one program.

200M parameters are measured on this machine in float32, in bfloat16 (weights, activations and
states) and with int8 weights (the rest in float32): in each run the three models take turns at each
length, and the bandwidth of a copy is measured before. States of more than 5 GB are left out. 1.3B
and 6.7B are compiled for one H200 in bfloat16, without it: memory is what the compiler says; the
time of a token is at least that of moving the program's bytes at the copy bandwidth that was
measured on an H200. Times that were measured on it (`benchmarks/results/accelerator_h200.json`,
without short convolutions) are beside them.

    python -m experiments.inference_cost                  36 runs, an hour on two quiet cores
    python -m experiments.inference_cost --budget=small   2 runs, half a minute

The first needs the compiler: make .venv/cuda .venv/libtpu.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.measure import RESULTS, copy_bandwidth, interleaved_seconds
from benchmarks.programs import (
    PRECISIONS,
    Decoding,
    decoding_model,
    state_bytes,
    weight_bytes,
)
from experiments import inference_cost_figure
from experiments.compiled_costs import decoding_bytes
from experiments.cost_models import ARCHITECTURES, decoding_config, state_dtype
from experiments.processes import compilers, in_own_process
from experiments.runs import Measurement, Records, main
from retnet_jax.evaluation.tables import Table, as_markdown
from retnet_jax.model import LanguageModel

BUDGETS = ("small", "2cores")
LENGTHS = (128, 512, 2048, 8192, 32_768)
BATCHES = (1, 4, 16, 64)
H200_SIZES = ("1.3B", "6.7B")
TOKENS, ROUNDS = 4, 3  # tokens of a call, timed calls of each model
MOST_STATE = 5e9  # bytes of the states of a batch that is measured
# Figure 1 of arXiv 2307.08621, the 6.7B at length 8,192: how many times better the RetNet is.
PAPER = {"memory": 3.4, "throughput": 8.4, "latency": 15.6}


def runs(budget: str, records: Records) -> list[Measurement]:
    """Each precision and batch that is measured, then what is compiled for the H200."""
    if budget == "small":
        measured = _measured("tiny", "int8", 2, (16,), rounds=1)
        return [measured, _compiled("tiny", "retnet", 2, (16, 64), "cpu")]
    measured = [
        _measured("200M", precision, batch, LENGTHS, ROUNDS)
        for batch in BATCHES
        for precision in PRECISIONS
    ]
    compiled = [
        _compiled(size, architecture, batch, LENGTHS, "H200")
        for size in H200_SIZES
        for batch in BATCHES
        for architecture in ARCHITECTURES
    ]
    return [*measured, *compiled]


def _measured(
    size: str, precision: str, batch: int, lengths: Sequence[int], rounds: int
) -> Measurement:
    about = {"kind": "measured", "size": size, "precision": precision, "batch": batch}
    measure = partial(measured_decoding, size, precision, batch, lengths, rounds)
    return Measurement(f"{size}_{precision}_batch{batch}", about, measure)


def _compiled(
    size: str, architecture: str, batch: int, lengths: Sequence[int], device: str
) -> Measurement:
    about = {
        "kind": "compiled",
        "size": size,
        "architecture": architecture,
        "batch": batch,
        "device": device,
    }
    arguments = size, architecture, batch, lengths, device

    def measure() -> dict[str, Any]:
        packages = () if device == "cpu" else compilers()
        return {"cells": in_own_process(decoding_bytes, *arguments, packages=packages)}

    return Measurement(f"{device}_{size}_{architecture}_batch{batch}", about, measure)


def measured_decoding(
    size: str, precision: str, batch: int, lengths: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Milliseconds of a token of all rows and bytes, of each model after each length.

    Returns:
      copy_bandwidth, in bytes/s; and cells, one for each model and length, with milliseconds, one
      for each round. A cell whose states are too large has no milliseconds.
    """
    bandwidth, cells = copy_bandwidth(), []
    models = {name: _random_model(size, name, precision) for name in ARCHITECTURES}
    fixed: dict[str, Decoding] = {}  # of the models whose state does not grow with the length
    for length in lengths:
        calls, found = {}, {}
        for name, model in models.items():
            capacity = length + TOKENS * (2 * rounds + 2)
            weights, states = weight_bytes(model), state_bytes(model, batch, capacity)
            found[name] = {
                "architecture": name,
                "length": length,
                "weight_bytes": weights,
                "state_bytes": states,
                "peak_bytes": weights + states,
            }
            if states > MOST_STATE:
                continue
            decoding = fixed.get(name) or Decoding(model, batch, capacity, TOKENS)
            if name != "transformer":
                fixed[name] = decoding
            calls[name] = decoding.start(length)
            found[name]["peak_bytes"] = decoding.peak_bytes
        for name, seconds in interleaved_seconds(calls, rounds).items():
            found[name]["milliseconds"] = [1000 * x / TOKENS for x in seconds]
        cells += found.values()
    return {"copy_bandwidth": bandwidth, "cells": cells}


def _random_model(size: str, architecture: str, precision: str) -> LanguageModel:
    config = decoding_config(size, architecture)
    return decoding_model(config, precision, state_dtype(config, precision))


class Cell(NamedTuple):
    """One model at one batch and length."""

    size: str
    place: str  # "H200" or "cores"
    architecture: str
    precision: str
    batch: int
    length: int
    gigabytes: float
    milliseconds: list[float] | None  # of a token of all rows; None: it does not fit

    @property
    def latency(self) -> float:
        """Median milliseconds of a token of all rows."""
        assert self.milliseconds is not None
        return statistics.median(self.milliseconds)

    @property
    def throughput(self) -> float:
        """Tokens/s of all rows."""
        return 1000 * self.batch / self.latency


def cells_of(records: Records) -> Iterator[Cell]:
    """The cells of all records; those of the H200 have the least time of their bytes."""
    bandwidth = h200_bandwidth()
    for record in records.values():
        for cell in record["cells"]:
            milliseconds = cell.get("milliseconds")
            if record["kind"] == "compiled" and cell["fits"]:
                milliseconds = [1000 * cell["moved_bytes"] / bandwidth]
            yield Cell(
                record["size"],
                "cores" if record["kind"] == "measured" else "H200",
                cell.get("architecture") or record["architecture"],
                record.get("precision", "bfloat16"),
                record["batch"],
                cell["length"],
                cell["peak_bytes"] / 1e9,
                milliseconds,
            )


def h200_sections() -> dict[str, Any]:
    """What was measured on an H200."""
    return json.loads((RESULTS / "accelerator_h200.json").read_text())["sections"]


def h200_bandwidth() -> float:
    """Bytes/s that a copy on an H200 reads and writes."""
    return h200_sections()["limits"]["cases"]["copy"]["bytes_per_second"]


def h200_decoding() -> list[dict[str, Any]]:
    """The records of decoding that was measured on an H200, by model, batch and position."""
    found = h200_sections()["decoding"]["cases"].values()
    measured = [x for x in found if "batch" in x and "position" in x]
    return sorted(measured, key=lambda x: (x["size"], x["architecture"], x["batch"], x["position"]))


def report(budget: str, records: Records) -> str:
    """The tables as Markdown; draws the figure."""
    inference_cost_figure.draw(budget, list(cells_of(records)), h200_decoding(), PAPER)
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """Time and memory by size, and the ratios of the models beside the paper's."""
    cells = list(cells_of(records))
    sizes = dict.fromkeys((cell.place, cell.size) for cell in cells)
    found = [_table([x for x in cells if (x.place, x.size) == each]) for each in sizes]
    if budget != "small":
        found += [_paper_table(cells), _h200_table()]
    return found


def _table(cells: Sequence[Cell]) -> Table:
    """Time and memory of the models of one size at one place, by batch, precision and length."""
    first = cells[0]
    how = (
        "measured here, the median and the least and most of the rounds"
        if first.place == "cores"
        else "compiled for one H200, at least by the bytes it moves"
    )
    columns = [f"{name}, {unit}" for unit in ("ms", "GB") for name in ARCHITECTURES]
    table = Table(
        f"{first.size}: milliseconds of a token of all rows, {how}; GB of memory",
        ("precision", "batch", "length", *columns, "Transformer/RetNet"),
    )
    groups: dict[tuple[int, str, int], dict[str, Cell]] = {}
    for cell in cells:
        key = cell.batch, cell.precision, cell.length
        groups.setdefault(key, {})[cell.architecture] = cell
    for (batch, precision, length), by_model in sorted(groups.items()):
        found = [by_model.get(name) for name in ARCHITECTURES]
        table.add(
            precision,
            str(batch),
            f"{length:,}",
            *(_milliseconds(cell) for cell in found),
            *(f"{cell.gigabytes:.2f}" if cell else "" for cell in found),
            _ratio(by_model.get("transformer"), by_model.get("retnet")),
        )
    return table


def _milliseconds(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.milliseconds is None:
        return "does not fit"
    text = _three_digits(cell.latency)
    if len(cell.milliseconds) > 1:
        text += f" ({_three_digits(min(cell.milliseconds))} to "
        text += f"{_three_digits(max(cell.milliseconds))})"
    return text


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(one: Cell | None, other: Cell | None) -> str:
    """How many times the time of another model one takes; the median over rounds, and its range."""
    if one is None or other is None or one.milliseconds is None or other.milliseconds is None:
        return ""
    ratios = [a / b for a, b in zip(one.milliseconds, other.milliseconds, strict=True)]
    text = f"{statistics.median(ratios):.2f}"
    return f"{text} ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else text


def _paper_table(cells: Sequence[Cell]) -> Table:
    """The ratios of the paper's first figure, beside ours."""
    table = Table(
        "RetNet against Transformer at length 8,192: how many times better",
        ("size", "memory", "throughput", "latency"),
        note="Memory at a batch of 16; throughput at the best batch of each that fits; latency at "
        "the same batch of 16, where both models fit. The paper's are of its 6.7B on an A100, its "
        "batches are not stated. On these cores the Transformer's keys and values are stored in "
        "float32 in all precisions.",
    )
    table.add("paper, 6.7B on an A100", *(f"{x}" for x in PAPER.values()))
    for place, size in dict.fromkeys((cell.place, cell.size) for cell in cells):
        for precision in PRECISIONS:
            chosen = [
                x
                for x in cells
                if (x.place, x.size, x.precision, x.length) == (place, size, precision, 8192)
            ]
            if chosen:
                where = "an H200, by bytes" if place == "H200" else "these cores"
                table.add(f"{size} {precision} on {where}", *_advantages(chosen))
    return table


def _advantages(cells: Sequence[Cell]) -> list[str]:
    """How many times better the memory, throughput and latency of the RetNet are at one length."""
    found = {name: inference_cost_figure.ratio(cells, name) for name in PAPER}
    return ["" if x is None else f"{x:.1f}" for x in found.values()]


def _h200_table() -> Table:
    """Decoding that was measured on an H200."""
    table = Table(
        "measured on one H200, bfloat16 (python -m benchmarks.accelerator)",
        ("size", "model", "batch", "after tokens", "ms", "tokens/s", "GB"),
    )
    for x in h200_decoding():
        table.add(
            x["size"],
            x["architecture"],
            str(x["batch"]),
            f"{x['position']:,}",
            f"{x['ms']:.3g}",
            f"{x['tokens_per_second']:,.0f}",
            f"{x['peak_bytes'] / 1e9:.1f}",
        )
    return table


if __name__ == "__main__":
    main(sys.modules[__name__])
