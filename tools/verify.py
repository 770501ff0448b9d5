"""Verifies every file of a run or a token store.

    python tools/verify.py runs/quickstart
    python tools/verify.py data/stdlib_bpe4096

For a run it reads the config, the tokenizer, the log, every checkpoint and the token stores. It
prints every problem, and exits with status 1 if there are any.
"""

import sys

from absl import flags

from retnet_jax.data.store_problems import store_problems
from retnet_jax.errors import ConfigError
from retnet_jax.files.paths import exists, place
from retnet_jax.programs import command_line
from retnet_jax.runs.verification import run_problems, stores_of, unchecked

flags.DEFINE_string("path", None, "directory of a run or of a token store")


def main() -> int:
    """Prints all problems; returns 1 if there are any."""
    if flags.FLAGS.path is None:
        raise ConfigError("give a run or a token store: python tools/verify.py RUN_OR_STORE")
    path = place(flags.FLAGS.path)
    if any(exists(path / name) for name in ("manifest.json", "plan.json")):
        return report({str(path): store_problems(str(path))})
    if not (path / "config.json").exists():
        raise ConfigError(
            f"{path} is neither a run (it has no config.json) nor a token store (no manifest.json)"
        )
    found = {str(path): list(run_problems(path)), **dict(stores_of(path))}
    for line in unchecked(path):
        print(line)
    return report(found)


def report(found: dict[str, list[str]]) -> int:
    """Prints the problems of each directory; returns 1 if there are any."""
    for directory, problems in found.items():
        for problem in problems:
            print(problem, file=sys.stderr)
        print(f"{directory}: {_verdict(len(problems))}")
    return int(any(found.values()))


def _verdict(count: int) -> str:
    return {0: "intact", 1: "1 problem"}.get(count, f"{count} problems")


if __name__ == "__main__":
    command_line.run(main, positional=("path",))
