"""The command line of `benchmarks.accelerator`; see its docstring."""

import json
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks.accelerator import cases, report, sections, supervisor, sweep
from benchmarks.measure import RESULTS, current_commit

flags.DEFINE_float("minutes", 10.0, "Time for all sections and plots, in minutes")
flags.DEFINE_list("sections", list(sections.SECTIONS), "Sections to measure")
flags.DEFINE_string("only", "", "Regular expression of the names of cases to measure")
flags.DEFINE_string("output", None, "JSON file to write, with .md and .png beside it")
flags.DEFINE_bool("tiny", False, "Small shapes, to test the script")
flags.DEFINE_bool("resume", False, "Keep existing records, and measure the missing cases")
flags.DEFINE_bool("plot_only", False, "Only write the tables and plots of an existing JSON file")
flags.DEFINE_string("commit", None, "Commit to record; default: what git says, if it can")
flags.DEFINE_bool("sweep", False, "Measure the tilings of Hopper kernels, and write their table")
flags.DEFINE_float("sweep_seconds", 530.0, "Time for the sweep, in seconds")
flags.DEFINE_bool("sweep_again", False, "Also measure kernels that are in the table already")
# For the processes that the script starts.
flags.DEFINE_enum(
    "section", None, [*sections.SECTIONS, "sweep"], "Section to measure in this process"
)
flags.DEFINE_float("deadline", 0.0, "Deadline of --section, in seconds since 1970")

_FOR_REPORT = 15  # seconds


def main(_) -> None:
    args, begin = flags.FLAGS, time.time()
    _check_flags(args)
    output = Path(args.output).absolute() if args.output else default_output(args.tiny, args.sweep)
    commit = args.commit or current_commit()
    if args.section == "sweep":
        sweep.measure(output, args.tiny, args.only, args.deadline, commit, args.sweep_again)
        return
    if args.section:
        sections.measure(args.section, output, args.tiny, args.only, args.deadline, commit)
        return
    # The commit is passed on, because git calls it dirty as soon as results are written.
    options = [f"--only={args.only}", f"--commit={commit}"] + ["--tiny"] * args.tiny
    if args.sweep:
        output.parent.mkdir(parents=True, exist_ok=True)
        if args.sweep_again:
            output.unlink(missing_ok=True)
            options.append("--sweep_again")
        supervisor.run_section("sweep", output, begin + args.sweep_seconds, options)
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
        supervisor.run(ordered, output, seconds, options)
    write_report(output)


def _check_flags(args: flags.FlagValues) -> None:
    """Refuses flags that would have no effect."""
    sweeps = args.sweep or args.section == "sweep"
    if sweeps:
        without_effect = ("minutes", "sections", "resume", "plot_only")
    else:
        without_effect = ("sweep_seconds", "sweep_again")
    for name in without_effect:
        if args[name].present:
            raise app.UsageError(
                f"--{name} has no effect {'with' if sweeps else 'without'} --sweep"
            )


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


def default_output(tiny: bool, sweep: bool) -> Path:
    """The default of --output; results of tiny shapes are temporary."""
    name = "sweep" if sweep else "accelerator"
    if tiny:
        return Path(tempfile.gettempdir()) / f"{name}_tiny.json"
    return RESULTS / f"{name}.json"


if __name__ == "__main__":
    app.run(main)
