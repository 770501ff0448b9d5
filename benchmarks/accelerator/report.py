"""Tables and goals, from the JSON that `benchmarks.accelerator` writes.

Nothing is measured here. Shares of the device's limits refer to the copy bandwidth and the matrix
rate in the same file; missing measurements are marked as not yet measured.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.accelerator.bounds import Work, decoding_bytes
from benchmarks.accelerator.cases import PROBLEMS
from retnet_jax.parallel.chips import chip

NOT_MEASURED = "not yet measured"
Record = dict[str, Any]


class Goal(NamedTuple):
    """A goal for one H200: the required number, the desired one, and the measured one."""

    what: str
    must: float | None
    stretch: float
    found: Callable[["Report"], float | None]  # reads the number from a report
    percent: bool = False
    at_most: bool = False  # whether the numbers are upper limits

    def row(self, report: "Report") -> str:
        found = self.found(report)
        shown = [NOT_MEASURED if found is None else self._shown(found)]
        bound = "at most " if self.at_most else ""
        shown += ["" if x is None else bound + self._shown(x) for x in (self.must, self.stretch)]
        return f"| {self.what} | {shown[1]} | {shown[2]} | {shown[0]} |"

    def _shown(self, number: float) -> str:
        return f"{100 * number:.3g} %" if self.percent else f"{number:.3g}x"


class Report:
    """The records in a JSON file, and the numbers that follow from them."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    @property
    def title(self) -> str:
        """The name of the device."""
        tiny = ", tiny shapes: these are no measurements" if self.data.get("tiny") else ""
        return self.data.get("device", "no device") + tiny

    def records(self, section: str) -> dict[str, Record]:
        return self.data.get("sections", {}).get(section, {}).get("cases", {})

    def measured(self, section: str, **wanted: Any) -> list[Record]:
        """The records with numbers and with the given values of fields."""
        return [
            record
            for record in self.records(section).values()
            if "ms" in record and all(record.get(name) == x for name, x in wanted.items())
        ]

    @property
    def bandwidth(self) -> float | None:
        """Bytes/s, read plus written, of the faster copy."""
        speeds = [x["bytes_per_second"] for x in self.measured("limits") if "bytes_per_second" in x]
        return max(speeds, default=None)

    @property
    def matrix_rate(self) -> float | None:
        """FLOP/s of bfloat16 matrix products."""
        speeds = [x["flops_per_second"] for x in self.measured("limits") if "flops_per_second" in x]
        return max(speeds, default=None)

    def roofline_share(self, record: Record) -> float | None:
        """The minimal time of a kernel divided by its measured time."""
        if self.bandwidth is None or self.matrix_rate is None:
            return None
        work = Work(record["flops"], record["bytes"])
        return 1000 * work.seconds(self.matrix_rate, self.bandwidth) / record["ms"]

    def utilisation(self, record: Record) -> dict[str, float | None]:
        """Model FLOP/s of a training step, as shares of the data sheet and of the matrix rate."""
        speed = record["tokens_per_second"] * record["flops_per_token"]
        known = chip(self.data.get("device", ""))
        return {
            "mfu": None if known is None else speed / known.flops,
            "of_matrix_rate": None if self.matrix_rate is None else speed / self.matrix_rate,
        }

    def decoding_share(self, record: Record) -> float | None:
        """The time of a decoding step's bytes at the copy bandwidth, divided by its own time."""
        if self.bandwidth is None:
            return None
        state = record["state_read_bytes"], record["state_written_bytes"]
        moved = decoding_bytes(record["weight_bytes"], *state, record["batch"])
        return 1000 * moved / self.bandwidth / record["ms"]

    def kernel(self, widths: tuple[int, int], length: int, kind: str) -> Record | None:
        """The record of this project's fastest implementation."""
        wanted = {"key_width": widths[0], "value_width": widths[1], "length": length, "kind": kind}
        others = ("fla", "cudnn attention")
        own = [x for x in self.measured("kernels", **wanted) if x["implementation"] not in others]
        return min(own, key=lambda x: x["ms"], default=None)

    def times_faster(
        self, than: str, widths: tuple[int, int], length: int, kind: str
    ) -> float | None:
        """The speed of the fastest implementation, relative to fla or to cuDNN attention."""
        own = self.kernel(widths, length, kind)
        wanted = {"implementation": than, "length": length, "kind": kind}
        if than == "fla":
            wanted |= {"key_width": widths[0], "value_width": widths[1]}
        other = self.measured("kernels", **wanted)
        return other[0]["ms"] / own["ms"] if own and other else None

    def share_of_roofline(self, kind: str) -> float | None:
        own = self.kernel((256, 512), 8192, kind)
        return own and self.roofline_share(own)

    def training(self, length: int) -> Record | None:
        """The training step of the 1.3B RetNet, with its layers in a loop."""
        found = self.measured("training", size="1.3B", architecture="retnet", length=length)
        return next((x for x in found if not written_out(x)), None)

    def training_mfu(self) -> float | None:
        step = self.training(8192)
        return step and self.utilisation(step)["mfu"]

    def long_to_short(self) -> float | None:
        long, short = self.training(32_768), self.training(2048)
        if not long or not short:
            return None
        return long["tokens_per_second"] / short["tokens_per_second"]

    def decoded(self, batch: int, position: int) -> Record | None:
        """A decoding step of the 6.7B RetNet."""
        wanted = {"size": "6.7B", "architecture": "retnet", "batch": batch, "position": position}
        found = self.measured("decoding", **wanted)
        return found[0] if found else None

    def share_of_bandwidth(self, batch: int) -> float | None:
        record = self.decoded(batch, 100)
        return record and self.decoding_share(record)

    def far_to_near(self) -> float | None:
        near, far = self.decoded(1, 100), self.decoded(1, 100_000)
        return far["ms"] / near["ms"] if near and far else None

    def throughput_ratio(self) -> float | None:
        """The best tokens/s of the 6.7B RetNet at 8k, divided by the Transformer's."""
        best = [
            self.records("decoding").get(f"6.7B {name} best batch position 8192", {})
            for name in ("retnet", "transformer")
        ]
        if not all("ms" in record for record in best):
            return None
        return best[0]["tokens_per_second"] / best[1]["tokens_per_second"]


_WIDE, _SQUARE = (256, 512), (128, 128)
GOALS = (
    Goal(
        "retention forward, 256/512 at 8k, against fla",
        1.5,
        3,
        lambda x: x.times_faster("fla", _WIDE, 8192, "forward"),
    ),
    Goal(
        "forward+backward, 256/512 at 8k, against fla",
        2.5,
        5,
        lambda x: x.times_faster("fla", _WIDE, 8192, "both"),
    ),
    Goal(
        "forward, 128/128 at 8k, against fla",
        1.5,
        3,
        lambda x: x.times_faster("fla", _SQUARE, 8192, "forward"),
    ),
    Goal(
        "forward+backward, 128/128 at 8k, against fla",
        1.5,
        3,
        lambda x: x.times_faster("fla", _SQUARE, 8192, "both"),
    ),
    Goal(
        "forward, 256/512 at 8k, of the roofline",
        0.35,
        0.6,
        lambda x: x.share_of_roofline("forward"),
        percent=True,
    ),
    Goal(
        "forward+backward, 256/512 at 8k, of the roofline",
        0.25,
        0.45,
        lambda x: x.share_of_roofline("both"),
        percent=True,
    ),
    Goal(
        "forward+backward, 256/512 at 8k, against cuDNN attention",
        3,
        4,
        lambda x: x.times_faster("cudnn attention", _WIDE, 8192, "both"),
    ),
    Goal(
        "forward+backward, 256/512 at 32k, against cuDNN attention",
        None,
        12,
        lambda x: x.times_faster("cudnn attention", _WIDE, 32_768, "both"),
    ),
    Goal("training 1.3B at 8k, MFU", 0.45, 0.55, Report.training_mfu, percent=True),
    Goal(
        "training 1.3B, tokens/s at 32k of those at 2k",
        0.95,
        0.95,
        Report.long_to_short,
        percent=True,
    ),
    Goal(
        "decoding 6.7B, batch 1, of the bandwidth bound",
        0.7,
        0.82,
        lambda x: x.share_of_bandwidth(1),
        percent=True,
    ),
    Goal(
        "decoding 6.7B, batch 64, of the bandwidth bound",
        0.6,
        0.6,
        lambda x: x.share_of_bandwidth(64),
        percent=True,
    ),
    Goal(
        "decoding 6.7B, time of a token at 100,000 to that at 100",
        1.02,
        1.02,
        Report.far_to_near,
        at_most=True,
    ),
    Goal(
        "decoding 6.7B at 8k, best throughput against the Transformer",
        8.4,
        14,
        Report.throughput_ratio,
    ),
)


def goals_table(report: Report) -> str:
    """A line for each goal, in Markdown."""
    lines = [f"| goals for one H200 | must | stretch | {report.title} |", "|---|---|---|---|"]
    return "\n".join(lines + [goal.row(report) for goal in GOALS])


def _commits(data: dict[str, Any]) -> str:
    """The commits at which the cases were measured; `--resume` adds cases of later ones."""
    cases = [case for section in data["sections"].values() for case in section["cases"].values()]
    found = sorted({case.get("commit") or data.get("commit", "unknown") for case in cases})
    return f"commit {' or '.join(found)}" + ", as each record says" * (len(found) > 1)


def text(report: Report) -> str:
    """All tables, in Markdown."""
    data = report.data
    facts = [f"{name} {data[name]}" for name in ("date", "jax", "python") if name in data]
    facts.insert(1, _commits(data))
    parts = [f"# {report.title}", ", ".join(facts)]
    if report.bandwidth is not None and report.matrix_rate is not None:
        parts.append(
            f"Copy bandwidth {report.bandwidth / 1e12:.3g} TB/s, bfloat16 matrix products "
            f"{report.matrix_rate / 1e12:.4g} TFLOP/s."
        )
    parts += [
        goals_table(report),
        _checks(report),
        _kernels(report),
        _training(report),
        _decoding(report),
    ]
    parts += [_prefill(report), _without_numbers(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _checks(report: Report) -> str:
    rows = [
        [name, f"{x['largest_error']:.1e}"]
        for name, x in report.records("checks").items()
        if "largest_error" in x
    ]
    return _table("Checks", ["the kernel against XLA in float32", "largest error"], rows)


def _kernels(report: Report) -> str:
    rows = [
        [
            x["implementation"],
            f"{x['key_width']}/{x['value_width']}",
            x["length"],
            "forward+backward" if x["kind"] == "both" else "forward",
            f"{x['ms']:.3f}",
            _percent(report.roofline_share(x)),
            f"{x['relative_error']:.1e}" if "relative_error" in x else "",
            f"{x['host_share']:.2f}",
        ]
        for x in report.measured("kernels")
    ]
    names = ["kernel", "widths", "length", "", "ms", "of the roofline", "error", "host's share"]
    return _table("Kernels", names, rows)


def written_out(record: Record) -> bool:
    """Whether the layers of a training step are not in a loop; older records do not say."""
    return not record.get("scan_layers", True)


def _training(report: Report) -> str:
    rows = []
    for x in report.measured("training"):
        used = report.utilisation(x)
        rows.append(
            [
                f"{x['size']} {x['architecture']}" + ", written out" * written_out(x),
                x["length"],
                f"{x['tokens_per_second']:,.0f}",
                _percent(used["mfu"]),
                _percent(used["of_matrix_rate"]),
                f"{x['peak_bytes'] / 2**30:.1f}",
                x["rows"] // x["micro_batches"],
                x["remat"],
            ]
        )
    names = ["training", "length", "tokens/s", "MFU", "of the matrix rate", "GiB", "rows", "remat"]
    return _table("Training", names, rows)


def _decoding(report: Report) -> str:
    rows = [
        [
            f"{x['size']} {x['architecture']}" + (" (best)" if "tried" in x else ""),
            x["batch"],
            x["position"],
            f"{x['ms']:.3f}",
            f"{x['tokens_per_second']:,.0f}",
            _percent(report.decoding_share(x)),
            f"{x['peak_bytes'] / 2**30:.1f}",
        ]
        for x in report.measured("decoding")
        if "position" in x
    ]
    names = ["decoding", "batch", "position", "ms per token", "tokens/s", "of the bound", "GiB"]
    return _table("Decoding", names, rows)


def _prefill(report: Report) -> str:
    rows = [
        [
            f"{x['size']} {x['architecture']}",
            x["batch"],
            x["length"],
            f"{x['ms']:.1f}",
            f"{x['tokens_per_second']:,.0f}",
        ]
        for x in report.measured("decoding")
        if "position" not in x
    ]
    return _table("Prompts", ["reading", "batch", "length", "ms", "tokens/s"], rows)


def _without_numbers(report: Report) -> str:
    rows = []
    for section, found in report.data.get("sections", {}).items():
        if "problem" in found:
            rows.append([section, "all remaining cases", found["problem"]])
        for name in found["planned"]:
            record = found["cases"].get(name)
            if record is None:
                rows.append([section, name, "not reached"])
            elif problem := next((x for x in PROBLEMS if x in record), None):
                rows.append([section, name, f"{problem.replace('_', ' ')}: {record[problem]}"])
    return _table("Without numbers", ["section", "case", "why"], rows)


def _table(title: str, names: list[str], rows: list[list]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
