"""Directories of runs that a command line need not name: runs/CONFIG, and the newest run."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retnet_jax.config.as_json import options
from retnet_jax.errors import ConfigError

RUNS = Path("runs")
_MOST_CHARACTERS = 80  # of the part of a name that says what was changed


def default_workdir(config: str, changes: Mapping[str, Any]) -> Path:
    """The directory of a run: its config's name, and what the command line changes of it.

    Args:
      config: value of --config, such as "configs/retnet_1p3b.py:transformer".
      changes: Options that differ from the config's own, by name. Those that may differ when a run
        is resumed do not count.

    Returns:
      Such as runs/quickstart_learning_rate-0.02; equal for equal arguments. A source of files is
      not named if the endings in `data.path` say it.
    """
    name, _, argument = config.partition(":")
    parts = [Path(name).stem, *([argument] if argument else [])]
    kept = {
        option: value
        for option, value in sorted(changes.items())
        if not options()[option].metadata.get("changeable")
    }
    if kept:
        suffix = "_".join(
            f"{option.rpartition('.')[2]}-{_word(value)}"
            for option, value in kept.items()
            if option != "data.source" or value != _source_of(kept.get("data.path", ""))
        )
        if len(suffix) > _MOST_CHARACTERS or _ambiguous(kept):
            digest = hashlib.sha256(repr(kept).encode()).hexdigest()[:8]
            suffix = f"{suffix[:_MOST_CHARACTERS]}_{digest}"
        parts.append(suffix)
    return RUNS / "_".join(parts)


def newest_run() -> Path:
    """The run under runs/ that has written a checkpoint last.

    Raises:
      ConfigError: if there is none.
    """
    written = {path.stat().st_mtime: path.parent for path in RUNS.glob("*/checkpoints")}
    if not written:
        raise ConfigError(
            f"no directory is given, and {RUNS.absolute()} has no run with a checkpoint: name the "
            "directory of a trained model, or train one with: python train.py"
        )
    return written[max(written)]


def _source_of(path: str) -> str:
    """The source that `data.path` makes a reader expect; "" for no path."""
    if not path:
        return ""
    return "parquet" if ".parquet" in path else "jsonl" if ".json" in path else "text"


def _word(value: Any) -> str:
    """A value as part of a file name; of a path its last part."""
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    if isinstance(value, float):
        return f"{value:g}"
    last = str(value).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.,-]+", "-", last).strip("-") or "none"


def _ambiguous(changes: Mapping[str, Any]) -> bool:
    """Whether another value might be the same word."""
    texts = [str(value) for value in changes.values() if not isinstance(value, int | float)]
    return any(_word(text) != text for text in texts)
