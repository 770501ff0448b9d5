"""The plan of a build, `plan.json`, from which a killed build is resumed."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from retnet_jax.data.store_options import differences
from retnet_jax.data.token_store import FORMAT, FORMATS
from retnet_jax.data.tokenizers import SAVED_FILES, has_tokenizer
from retnet_jax.data.workers import say
from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic, lock


def begin_or_resume(directory: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes the plan of a new build, or reads the plan of a build to resume.

    Args:
      directory: Directory of the store.
      plan: Plan of a new build.

    Raises:
      ConfigError: if the directory has a tokenizer or shards of other files or of another version.
    """
    path = directory / "plan.json"
    found = json.loads(path.read_text()) if path.exists() else None
    if found is not None:
        changes = differences(found["options"], plan["options"])
        if changes:
            say(f"{directory} was begun with other options and is built anew:{changes}")
        is_other = found["format"] not in FORMATS or found["shards"] != plan["shards"]
        if changes or (is_other and not is_written(directory)):
            discard_plan(directory)
            found = None
    if found is not None:
        if found["format"] not in FORMATS:
            raise ConfigError(
                f"data.store={str(directory)!r} was begun by another version, in format "
                f"{found['format']}; this one writes format {FORMAT}: finish it with that version, "
                "give another directory in data.store, or delete this one"
            )
        if found["shards"] != plan["shards"]:
            raise ConfigError(
                f"data.store={str(directory)!r} was begun with other files, or they have changed; "
                "give another directory in data.store, or delete this one"
            )
        for unfinished in [*directory.glob("shards/.*"), *directory.glob("work/tmp*")]:
            shutil.rmtree(unfinished, ignore_errors=True)
        if found["format"] != FORMAT:  # `_encode` completes the shards that are there
            found["format"] = FORMAT
            atomic.write_text(path, json.dumps(found, indent=1) + "\n")
        return found
    if not has_only_a_lock(directory):
        raise ConfigError(
            f"data.store={str(directory)!r} has files in it and no plan.json; give a new directory"
        )
    atomic.write_text(path, json.dumps(plan, indent=1) + "\n")
    return plan


def has_only_a_lock(directory: Path) -> bool:
    """Whether a directory has no file but the lock."""
    return all(path.name == lock.FILE_NAME for path in directory.iterdir())


def is_written(directory: Path) -> bool:
    """Whether an unfinished store already has its tokenizer or a shard."""
    return has_tokenizer(directory) or any(directory.glob("shards/[0-9]*"))


def discard_plan(directory: Path) -> None:
    """Deletes an unfinished store: its shards, tokenizer and surveys, and the plan last."""
    (directory / "work").mkdir(exist_ok=True)
    if (directory / "shards").exists():
        # Moved at once, because a build must never find a shard that is half deleted.
        (directory / "shards").rename(tempfile.mkdtemp(prefix="tmp", dir=directory / "work"))
    for name in SAVED_FILES:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "work", ignore_errors=True)
    (directory / "plan.json").unlink()
