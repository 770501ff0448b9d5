"""The command line of `benchmarks.accelerator`; see there."""

import os
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks.accelerator import cases, supervisor
from benchmarks.measure import RESULTS

flags.DEFINE_float("minutes", 10.0, "for all, plots included")
flags.DEFINE_list("sections", list(supervisor.SECTIONS), "what to measure")
flags.DEFINE_string("output", None, "the JSON; .md and .png are written beside it")
flags.DEFINE_bool("tiny", False, "small shapes, to see that the script works")
flags.DEFINE_bool("resume", False, "keep the records there are, measure what has none")
flags.DEFINE_bool("plot_only", False, "tables and plots of the JSON that is there")
# Of the processes that the script starts.
flags.DEFINE_enum("section", None, list(supervisor.SECTIONS), "measure one in this process")
flags.DEFINE_float("deadline", 0.0, "seconds since 1970, for --section")

_FOR_REPORT = 15  # seconds


def main(_) -> None:
    args, begin = flags.FLAGS, time.time()
    output = Path(args.output).absolute() if args.output else default_output(args.tiny)
    if args.section:
        measure_section(args.section, output, args.tiny, args.deadline)
        return
    if unknown := set(args.sections) - set(supervisor.SECTIONS):
        raise app.UsageError(f"--sections: there is no {', '.join(sorted(unknown))}")
    if not args.plot_only:
        output.parent.mkdir(parents=True, exist_ok=True)
        if args.resume:
            cases.Results(output).forget("cut_off")
        else:
            output.unlink(missing_ok=True)
        ordered = [name for name in supervisor.SECTIONS if name in args.sections]
        seconds = 60 * args.minutes - _FOR_REPORT - (time.time() - begin)
        supervisor.run(ordered, output, seconds, ["--tiny"] if args.tiny else [])
    from benchmarks.accelerator.report import write

    write(output)


def default_output(tiny: bool) -> Path:
    """Results of tiny shapes are no results."""
    return (
        Path(tempfile.gettempdir()) / "accelerator_tiny.json"
        if tiny
        else (RESULTS / "accelerator.json")
    )


def measure_section(section: str, output: Path, tiny: bool, deadline: float) -> None:
    """What a process of the supervisor does."""
    results = cases.Results(output)
    describe(results, tiny)
    try:
        cases.run(results, section, cases_of(section, tiny), deadline)
    except cases.BrokenDeviceError:
        sys.stdout.flush()
        os._exit(supervisor.BROKEN)  # clean-up can hang on a broken device


def describe(results: cases.Results, tiny: bool) -> None:
    """Date, device, versions and commit, and what of the device's memory is to be had."""
    from benchmarks.accelerator.timing import memory_limit
    from benchmarks.measure import provenance

    results.describe(**provenance(), memory_limit=memory_limit(), tiny=tiny)


def cases_of(section: str, tiny: bool) -> list[cases.Case]:
    """All cases of a section, the most important first."""
    # Imported here, so that a section does not fail with another's libraries.
    if section == "limits":
        from benchmarks.accelerator import limits as module
    elif section == "kernels":
        from benchmarks.accelerator import kernels as module
    elif section == "training":
        from benchmarks.accelerator import training as module
    else:
        from benchmarks.accelerator import decoding as module
    return list(module.cases(tiny))


if __name__ == "__main__":
    app.run(main)
