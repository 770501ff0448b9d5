"""The command line of `benchmarks.accelerator`; see its docstring."""

import json
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks.accelerator import cases, report, sections, supervisor
from benchmarks.measure import RESULTS

flags.DEFINE_float("minutes", 10.0, "Time for all sections and plots, in minutes")
flags.DEFINE_list("sections", list(sections.SECTIONS), "Sections to measure")
flags.DEFINE_string("only", "", "Regular expression of the names of cases to measure")
flags.DEFINE_string("output", None, "JSON file to write, with .md and .png beside it")
flags.DEFINE_bool("tiny", False, "Small shapes, to test the script")
flags.DEFINE_bool("resume", False, "Keep existing records, and measure the missing cases")
flags.DEFINE_bool("plot_only", False, "Only write the tables and plots of an existing JSON file")
# For the processes that the script starts.
flags.DEFINE_enum("section", None, list(sections.SECTIONS), "Section to measure in this process")
flags.DEFINE_float("deadline", 0.0, "Deadline of --section, in seconds since 1970")

_FOR_REPORT = 15  # seconds


def main(_) -> None:
    args, begin = flags.FLAGS, time.time()
    output = Path(args.output).absolute() if args.output else default_output(args.tiny)
    if args.section:
        sections.measure(args.section, output, args.tiny, args.only, args.deadline)
        return
    if unknown := set(args.sections) - set(sections.SECTIONS):
        raise app.UsageError(
            f"--sections: {', '.join(sorted(unknown))} is not one of {', '.join(sections.SECTIONS)}"
        )
    if args.plot_only and not output.exists():
        raise app.UsageError(f"--plot_only: {output} does not exist")
    if not args.plot_only:
        output.parent.mkdir(parents=True, exist_ok=True)
        if args.resume:
            cases.Results(output).forget("cut_off")
        else:
            output.unlink(missing_ok=True)
        ordered = [name for name in sections.SECTIONS if name in args.sections]
        seconds = 60 * args.minutes - _FOR_REPORT - (time.time() - begin)
        options = [f"--only={args.only}"] + ["--tiny"] * args.tiny
        supervisor.run(ordered, output, seconds, options)
    write_report(output)


def write_report(path: Path) -> None:
    """Writes the tables, and the plots if matplotlib is installed, beside the JSON file."""
    found = report.Report(json.loads(path.read_text()))
    tables = report.text(found)
    path.with_suffix(".md").write_text(tables)
    print(tables)
    try:
        import matplotlib
    except ImportError:
        print(f"no plots without matplotlib; with it, use --plot_only --output={path}")
        return
    matplotlib.use("Agg")
    from benchmarks.accelerator.plots import plot

    plot(found, path.with_suffix(".png"))
    print(f"written to {path}, .md and .png")


def default_output(tiny: bool) -> Path:
    """The default of --output; results of tiny shapes are temporary."""
    if tiny:
        return Path(tempfile.gettempdir()) / "accelerator_tiny.json"
    return RESULTS / "accelerator.json"


if __name__ == "__main__":
    app.run(main)
