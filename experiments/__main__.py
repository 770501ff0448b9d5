"""Lists the experiments: the question of each, and how many of its runs are done by budget.

python -m experiments                  the list
python -m experiments --budget=small   makes the missing runs of all experiments, by budget
"""

import importlib
import pkgutil
from types import ModuleType

from absl import app, flags

import experiments
from experiments.runs import BUDGETS, make_missing, read_records

flags.DEFINE_enum("budget", None, BUDGETS, "Make the missing runs of all that have this budget")


def modules() -> dict[str, ModuleType]:
    """The experiments by name: the modules of this package that have runs of their own."""
    names = [x.name for x in pkgutil.iter_modules(experiments.__path__) if x.name != "__main__"]
    found = {name: importlib.import_module(f"experiments.{name}") for name in sorted(names)}
    return {name: module for name, module in found.items() if hasattr(module, "report")}


def main(_) -> None:
    """Makes the runs of a budget if one is given, otherwise prints the list."""
    budget = flags.FLAGS.budget
    for name, module in modules().items():
        if budget in module.BUDGETS:
            print(module.report(budget, make_missing(name, budget, module.runs)), end="\n\n")
        elif budget is None:
            print(f"{name}: {(module.__doc__ or '').splitlines()[0]}")
            print(*(f"  {x:<7} {_done(name, module, x)}" for x in module.BUDGETS), sep="\n")


def _done(name: str, module: ModuleType, budget: str) -> str:
    records = read_records(name, budget)
    runs = module.runs(budget, records)
    return f"{sum(run.name in records for run in runs)} of {len(runs)} runs done"


if __name__ == "__main__":
    app.run(main)
