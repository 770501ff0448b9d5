"""Makes the runs of an experiment one by one, keeps the record of each, and makes one again."""

import contextlib
import dataclasses
import difflib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from benchmarks.measure import provenance
from retnet_jax.config import Config
from retnet_jax.config.as_json import flatten
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.tables import Table
from retnet_jax.files import atomic, lock
from retnet_jax.programs.host_memory import keep_freed_memory
from retnet_jax.runs.log import HELD_OUT_LOSS
from retnet_jax.training.loop import Evaluator, TrainResult, train

RESULTS = Path(__file__).parent / "results"
WORKDIRS = Path("runs/experiments")
_MANY = 12  # numbers in one list
BUDGETS = ("small", "2cores", "gpu")

Records = dict[str, dict[str, Any]]  # by the name of the run


@dataclass(frozen=True)
class Run:
    """One training run of an experiment.

    Attributes:
      name: Unique in the experiment and budget.
      config: What to train.
      about: What tells this run apart, for tables; added to the record.
      measure: Numbers of the trained model, for the record.
      evaluators: Evaluators during training; their values are added to the record.
      prepare: Function that is called before training, to get its data; None: nothing is needed.
    """

    name: str
    config: Config
    about: dict[str, Any]
    measure: Callable[[TrainResult], dict[str, Any]]
    evaluators: Sequence[Evaluator] = ()
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Measurement:
    """One run of an experiment that measures without training, such as times and memory.

    Unlike a `Run` it begins again if it was stopped.

    Attributes:
      name: Unique in the experiment and budget.
      about: What tells this run apart, for tables; added to the record.
      measure: Function that measures and returns the numbers for the record.
    """

    name: str
    about: dict[str, Any]
    measure: Callable[[], dict[str, Any]]


def read_records(experiment: str, budget: str) -> Records:
    """The records of the runs that are done."""
    path = _path(experiment, budget)
    if not path.exists():
        return {}
    return {record["name"]: record for record in json.loads(path.read_text())}


def make_missing(
    experiment: str,
    budget: str,
    runs: Callable[[str, Records], Sequence[Run | Measurement]],
    only: str | None = None,
) -> Records:
    """Makes the runs that have no record yet; several processes can share the work.

    Args:
      experiment: Name of the experiment.
      budget: Name of the budget.
      runs: Function of budget and records that returns the runs, which may depend on the records.
        It is called after each run.
      only: Name of the only run to make; None: all.

    Returns:
      The records of all runs that are done. A run that another process is making is left to it.

    Raises:
      ConfigError: if there is no run of the name `only`.
    """
    busy: set[str] = set()
    if only is not None:
        _named(only, runs(budget, read_records(experiment, budget)))
    while True:
        records = read_records(experiment, budget)
        missing = [
            run for run in runs(budget, records) if run.name not in records | dict.fromkeys(busy)
        ]
        if only is not None:
            missing = [run for run in missing if run.name == only]
        if not missing:
            return records
        workdir = WORKDIRS / f"{experiment}_{budget}" / missing[0].name
        try:
            _make(experiment, budget, missing[0], workdir)
        except lock.HeldError:
            busy.add(missing[0].name)


def make_again(
    experiment: str,
    budget: str,
    runs: Callable[[str, Records], Sequence[Run | Measurement]],
    only: str,
) -> Table:
    """Makes a run that has a record again; returns the numbers of both. The record stays.

    Args:
      experiment: Name of the experiment.
      budget: Name of the budget.
      runs: As for `make_missing`.
      only: Name of the run.

    Raises:
      ConfigError: if there is no such run, or no record of it.
    """
    records = read_records(experiment, budget)
    run = _named(only, runs(budget, records))
    if only not in records:
        raise ConfigError(f"{only} has no record to compare with: leave --again out to make it")
    workdir = WORKDIRS / f"{experiment}_{budget}" / f"{only}.again"
    workdir.mkdir(parents=True, exist_ok=True)
    found = _measured(run) if isinstance(run, Measurement) else _trained(run, workdir)
    shutil.rmtree(workdir)
    return _compared(only, records[only], json.loads(_as_json(run.about | found)))


def _compared(name: str, recorded: dict[str, Any], found: dict[str, Any]) -> Table:
    """The numbers of a record beside those of the same run again, and options that differ."""
    options = [x.get("options", {}) for x in (recorded, found)]
    differ = [x for x in sorted(options[0] | options[1]) if options[0].get(x) != options[1].get(x)]
    note = f"The config is not that of the record: {', '.join(differ)} differ." if differ else ""
    table = Table(f"{name}, again", ("number", "recorded", "again", "difference"), note=note)
    before, now = (
        dict(_numbers({x: y for x, y in of.items() if x not in ("options", "machine")}))
        for of in (recorded, found)
    )
    for key in before | now:
        values = [x.get(key) for x in (before, now)]
        cells = ["-" if x is None else f"{x:.6g}" for x in values]
        table.add(key, *cells, "-" if None in values else f"{values[1] - values[0]:.6g}")
    return table


def _named(only: str, runs: Sequence[Run | Measurement]) -> Run | Measurement:
    """The run of a name.

    Raises:
      ConfigError: if there is none.
    """
    by_name = {run.name: run for run in runs}
    if only not in by_name:
        near = difflib.get_close_matches(only, by_name, n=3) or list(by_name)[:3]
        raise ConfigError(f"--only={only}: no run has this name; such as {', '.join(near)}")
    return by_name[only]


def _numbers(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by name; of many in one list, such as those of documents, the sum."""
    if isinstance(found, list) and len(found) > _MANY and all(map(_is_number, found)):
        yield f"{name}, sum of {len(found)}", sum(found)
    elif isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from _numbers(value, f"{name}.{key}".removeprefix("."))
    elif _is_number(found):
        yield name, found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _make(experiment: str, budget: str, run: Run | Measurement, workdir: Path) -> None:
    """Trains and measures one run and adds its record."""
    claim = workdir.with_name(f"{workdir.name}.claim")
    claim.mkdir(parents=True, exist_ok=True)
    with lock.held(claim):
        if run.name in read_records(experiment, budget):  # made by another process meanwhile
            return
        print(f"{experiment}, {budget}: {run.name}", file=sys.stderr)
        found = _measured(run) if isinstance(run, Measurement) else _trained(run, workdir)
        command = f"python -m experiments.{experiment} --budget={budget} --only={run.name}"
        record = {"name": run.name, **run.about, "command": command, **found}
        _add(experiment, budget, record)
        if isinstance(run, Run):
            # A process may map 65,530 areas of memory. Its compiled programs take them, and after
            # nine runs of perplexity_by_size the compiler found no more and the process ended.
            jax.clear_caches()
        shutil.rmtree(workdir, ignore_errors=True)  # a measurement has none
    shutil.rmtree(claim, ignore_errors=True)


def _measured(run: Measurement) -> dict[str, Any]:
    """What a measurement adds to its record."""
    begin = time.perf_counter()
    found = run.measure()
    return {"seconds": time.perf_counter() - begin, **found, "machine": _machine()}


def _trained(run: Run, workdir: Path) -> dict[str, Any]:
    """Trains and measures a run; returns what it adds to its record."""
    if run.prepare is not None:
        run.prepare()
    result = train(run.config, workdir, evaluators=run.evaluators)
    if result.status == "stopped":
        sys.exit(f"stopped; the same command resumes {run.name}")
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in log if "gradient_norm" in x]
    evaluations = [x for x in log if x.get("evaluator", HELD_OUT_LOSS) != HELD_OUT_LOSS]
    config = run.config
    defaults, values = flatten(Config()), flatten(config)
    return {
        "status": result.status,
        "parameters": config.model.parameter_count(),
        "tokens": result.step * config.train.batch_size * config.data.sequence_length,
        "training_seconds": steps[-1]["training_seconds"],
        "skipped_steps": sum(x["skipped_steps"] for x in steps),
        **run.measure(result),
        **({"evaluations": evaluations} if evaluations else {}),
        "machine": _machine(),
        "options": {name: x for name, x in values.items() if x != defaults[name]},
    }


def _machine() -> dict[str, Any]:
    return provenance() | {"cores": len(os.sched_getaffinity(0))}


def _add(experiment: str, budget: str, record: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with lock.held(RESULTS, waiting=lambda who: None):
        records = [*read_records(experiment, budget).values(), record]
        atomic.write_text(_path(experiment, budget), _as_json(records) + "\n")
    with contextlib.suppress(FileNotFoundError):
        (RESULTS / lock.FILE_NAME).unlink()


def _as_json(found: Any) -> str:
    # Options such as the attention layers of a hybrid are dataclasses.
    return json.dumps(found, indent=1, default=dataclasses.asdict)


def _path(experiment: str, budget: str) -> Path:
    return RESULTS / f"{experiment}_{budget}.json"


def main(module: ModuleType) -> None:
    """The command line of an experiment.

    The module has `runs(budget, records)`, the runs of a budget; `BUDGETS`, the names of those it
    has; and `report(budget, records)`, which draws figures and returns the tables as Markdown.
    """
    from absl import app, flags

    name = Path(str(module.__file__)).stem
    flags.DEFINE_enum("budget", module.BUDGETS[-1], module.BUDGETS, "Which runs to make")
    flags.DEFINE_string("only", None, "Name of the only run to make")
    flags.DEFINE_bool("plot_only", False, "Make no runs: only draw figures and tables again")
    flags.DEFINE_bool(
        "again", False, "Make the run of --only again, and compare it with its record"
    )

    def run(_) -> None:
        keep_freed_memory()
        given = flags.FLAGS
        if given.again and (given.only is None or given.plot_only):
            raise app.UsageError("--again needs --only=NAME, the run to make, and no --plot_only")
        try:
            if given.again:
                print(make_again(name, given.budget, module.runs, given.only))
                return
            if given.plot_only:
                records = read_records(name, given.budget)
            else:
                records = make_missing(name, given.budget, module.runs, given.only)
        except ConfigError as error:
            sys.exit(f"experiments.{name}: {error}")
        if records:
            print(module.report(given.budget, records))

    app.run(run)
