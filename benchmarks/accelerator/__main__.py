"""The command line of `benchmarks.accelerator`; see there."""

import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks.accelerator import cases, sections, supervisor
from benchmarks.measure import RESULTS

flags.DEFINE_float("minutes", 10.0, "for all, plots included")
flags.DEFINE_list("sections", list(sections.SECTIONS), "what to measure")
flags.DEFINE_string("output", None, "the JSON; .md and .png are written beside it")
flags.DEFINE_bool("tiny", False, "small shapes, to see that the script works")
flags.DEFINE_bool("resume", False, "keep the records there are, measure what has none")
flags.DEFINE_bool("plot_only", False, "tables and plots of the JSON that is there")
# Of the processes that the script starts.
flags.DEFINE_enum("section", None, list(sections.SECTIONS), "measure one in this process")
flags.DEFINE_float("deadline", 0.0, "seconds since 1970, for --section")

_FOR_REPORT = 15  # seconds


def main(_) -> None:
    args, begin = flags.FLAGS, time.time()
    output = Path(args.output).absolute() if args.output else default_output(args.tiny)
    if args.section:
        sections.measure(args.section, output, args.tiny, args.deadline)
        return
    if unknown := set(args.sections) - set(sections.SECTIONS):
        raise app.UsageError(f"--sections: there is no {', '.join(sorted(unknown))}")
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
        supervisor.run(ordered, output, seconds, ["--tiny"] if args.tiny else [])
    from benchmarks.accelerator.report import write

    write(output)


def default_output(tiny: bool) -> Path:
    """Results of tiny shapes are no results."""
    if tiny:
        return Path(tempfile.gettempdir()) / "accelerator_tiny.json"
    return RESULTS / "accelerator.json"


if __name__ == "__main__":
    app.run(main)
