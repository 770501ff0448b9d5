"""Reads the rows of a task from local files, the Hugging Face hub or tensorflow_datasets."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.tasks import Row, Task

HUBS = ("hf", "tfds")


@dataclass(frozen=True)
class Rows:
    """The checked rows of one split.

    Attributes:
      rows: Rows in the order of the data set.
      names: Origin of each row for messages, such as a file and a line.
    """

    rows: list[Row]
    names: list[str]

    @property
    def sha256(self) -> str:
        """SHA-256, in hex, of the rows as JSON; it depends on their order."""
        lines = (json.dumps(row, sort_keys=True, default=str) for row in self.rows)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_rows(task: Task, split: str, source: str) -> Rows:
    """Reads one split of a task.

    Args:
      task: Task from `TASKS`.
      split: Name of the split, such as `task.split`.
      source: Directory with TASK/SPLIT.jsonl, one row per line with the fields of the data set; or
        "hf" (Hugging Face datasets) or "tfds" (tensorflow_datasets), which download it.

    Raises:
      ConfigError: for a missing or empty split, and for a row that is not valid JSON or has a field
        that is missing, of another type or out of range.
    """
    if source == "hf":
        named = _from_hugging_face(task, split)
    elif source == "tfds":
        named = _from_tfds(task, split)
    else:
        named = _from_file(Path(source) / task.name / f"{split}.jsonl", task)
    if not named:
        raise ConfigError(f"{task.name} has no rows in split {split!r} of {source}")
    for name, row in named:
        _check(task, row, name)
    names, rows = zip(*named, strict=True)
    return Rows(list(rows), list(names))


def _from_file(path: Path, task: Task) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: {task.name} needs a file with one row per line and the fields "
            f"{', '.join(task.fields)}"
        )
    named = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name = f"{path}, line {number}"
            try:
                named.append((name, json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{name}: not JSON ({error})") from None
    return named


def _from_hugging_face(task: Task, split: str) -> list[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError("--data=hf needs `pip install datasets`") from None
    path, configuration = task.hub
    try:
        rows = datasets.load_dataset(path, configuration, split=split)
    except Exception as error:  # of many types: no network, no such split, no access
        raise ConfigError(f"datasets cannot load {path} ({split}): {error}") from error
    return [(f"{path}, {split} row {number}", row) for number, row in enumerate(rows)]


def _from_tfds(task: Task, split: str) -> list[tuple[str, Any]]:
    if task.tfds is None:
        raise ConfigError(
            f"{task.name} has other fields in tensorflow_datasets; use --data=hf or a directory"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ConfigError("--data=tfds needs `pip install tensorflow-datasets`") from None
    try:
        rows = tfds.data_source(task.tfds, split=split)
    except Exception as error:  # as above
        raise ConfigError(
            f"tensorflow_datasets cannot load {task.tfds} ({split}): {error}"
        ) from error
    return [(f"{task.tfds}, {split} row {n}", _as_python(row)) for n, row in enumerate(rows)]


def _as_python(row: dict[str, Any]) -> dict[str, Any]:
    """A row of tensorflow_datasets with str for bytes and numbers for arrays."""
    plain = {name: x.item() if hasattr(x, "item") else x for name, x in row.items()}
    return {name: x.decode() if isinstance(x, bytes) else x for name, x in plain.items()}


def _check(task: Task, row: Any, name: str) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f"{name}: {row!r} is not an object with the fields of {task.name}")
    for field, kind in task.fields.items():
        if field not in row:
            raise ConfigError(
                f"{name}: the field {field!r} of {task.name} is missing; found "
                f"{', '.join(map(repr, row))}"
            )
        if not isinstance(row[field], kind):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(
                f"{name}: {field}={row[field]!r} is of type {type(row[field]).__name__}; "
                f"{task.name} needs {kinds}"
            )
    try:
        question = task.question(row, "lm_eval")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: not a row of {task.name} ({type(error).__name__}: {error}): {row!r}"
        ) from None
    if question.choices != task.choices or not 0 <= question.label < task.choices:
        raise ConfigError(
            f"{name}: {task.name} has {task.choices} choices; this row has {question.choices}, and "
            f"its label is choice {question.label}, counted from 0"
        )
