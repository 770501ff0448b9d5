"""The directory of a run.

config.json         the whole config
tokenizer.json      the tokenizer (and tokenizer_config.json, or tokenizer.model)
stores.json         the fingerprint of each token store that the run is trained on
metrics.jsonl       one JSON object for each logged step or evaluation
checkpoints/STEP/   see `checkpoint.py`
starts.jsonl        one JSON object for each start of the run
profile/            traces, with `config.profile`
lock                held by the process that trains
events.out.*        the metrics for TensorBoard
wandb_id            id of the run at Weights & Biases
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from retnet_jax.config import TOKENIZERS, Config
from retnet_jax.config.as_json import config_differences, marked, read_config, to_json
from retnet_jax.data.token_store import TokenStore
from retnet_jax.data.tokenizers import (
    SAVED_FILES,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import atomic, lock
from retnet_jax.files.paths import missing_directories, remove_empty
from retnet_jax.runs.json_lines import records_in

STORES = "stores.json"


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Locks a workdir for this process until the `with` ends; creates it if it does not exist.

    A workdir that was created here is removed again if no run was recorded in it, and so are the
    empty parents that were created for it. The lock works on local and network disks; object stores
    have no locks.

    Raises:
      ConfigError: if another process holds the lock, or if the directory has files but is no
        workdir.
    """
    # Files that a start may leave if it is cut off before it records its config.
    ours = {*SAVED_FILES, STORES, lock.FILE_NAME}
    created = missing_directories(workdir)
    new = not workdir.exists()
    found = list(workdir.iterdir()) if workdir.is_dir() else []
    names = {path.name for path in found if not atomic.is_unfinished(path)}
    if "config.json" not in names and names - ours:
        raise ConfigError(
            f"--workdir={workdir} has files in it but no config.json, so it is not a run; "
            "give a new or an empty directory"
        )
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(workdir))
        except OSError as error:
            raise ConfigError(
                f"--workdir={workdir} cannot be written to ({error}); give a directory that can"
            ) from error
        except lock.HeldError as holder:
            raise ConfigError(
                f"--workdir={workdir} is in use by another run ({holder}): "
                "wait for it, stop it, or give another directory"
            ) from None
        try:
            yield
        finally:
            if new and not (workdir / "config.json").exists():
                _remove_unused(workdir)
                remove_empty(created)


def _remove_unused(workdir: epath.Path) -> None:
    """Deletes a workdir that has no file but the lock."""
    if workdir.is_dir() and {path.name for path in workdir.iterdir()} <= {lock.FILE_NAME}:
        workdir.rmtree()


def recorded_config(workdir: epath.Path) -> Config | None:
    """The config of the run in a workdir; None if no run is recorded there.

    Raises:
      ConfigError: if it cannot be read.
    """
    path = workdir / "config.json"
    return read_config(path) if path.exists() else None


def record_start(
    workdir: epath.PathLike,
    config: Config,
    recorded: Config | None,
    tokenizer: Tokenizer,
    stores: Sequence[TokenStore] = (),
) -> list[str]:
    """Records config, tokenizer and stores of a new run, or compares those of a resumed run.

    Args:
      workdir: Directory of the run, locked by this process.
      config: Config of this start.
      recorded: Config that the workdir records; None: a new run.
      tokenizer: Tokenizer of this start.
      stores: Stores that this start trains on.

    Returns:
      The allowed differences from the recorded config, one line for each option.

    Raises:
      ConfigError: if the workdir belongs to a run with another config, tokenizer or data.
    """
    workdir = epath.Path(workdir)
    if recorded is None:
        _record(workdir, config, tokenizer, stores)
        return []
    changes = config_differences(recorded, config)
    lines = {name: f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()}
    refused = [line for name, line in lines.items() if name not in marked("changeable")]
    if refused:
        raise ConfigError(
            f"{workdir} belongs to a run with another config (recorded value -> given value):\n  "
            + "\n  ".join(refused)
            + "\ngive the recorded values or another --workdir; to change this run, change its "
            f"{workdir / 'config.json'} too"
        )
    of_run = _recorded_tokenizer(workdir)
    if of_run.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data.store={config.data.store!r} has another tokenizer "
            f"({tokenizer.fingerprint[:12]}) than {workdir} ({of_run.fingerprint[:12]}), so its "
            "token ids stand for other text: give the store that the run began with"
        )
    for store in stores:
        check_store(workdir, store)
    _record_stores(workdir, stores)  # a run begun by an older version has no record of them
    if changes:
        atomic.write_text(workdir / "config.json", to_json(config))
    return list(lines.values())


def restore_if_gone(
    workdir: epath.Path, config: Config, tokenizer: Tokenizer, stores: Sequence[TokenStore]
) -> bool:
    """Writes the workdir again if it was moved or deleted during the run; whether it was.

    Raises:
      CheckpointError: if it cannot be written.
    """
    try:
        if (workdir / "config.json").exists():
            return False
        _record(workdir, config, tokenizer, stores)
    except OSError as error:
        raise CheckpointError(
            f"{workdir} no longer exists and cannot be written again: {error}"
        ) from error
    return True


def _record(
    workdir: epath.Path, config: Config, tokenizer: Tokenizer, stores: Sequence[TokenStore]
) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir)
    _record_stores(workdir, stores)
    # Written last: a directory with a config.json is a workdir.
    atomic.write_text(workdir / "config.json", to_json(config))


def check_store(workdir: Path | epath.Path, store: TokenStore) -> None:
    """Raises `ConfigError` if a store holds other data than when the run began.

    With other data, held-out documents may be among those that the model was trained on, and a
    resumed run would continue with other text.
    """
    expected = _recorded_stores(workdir).get(store.directory)
    if expected not in (None, store.fingerprint):
        raise ConfigError(
            f"the token store {store.directory!r} holds other data ({store.fingerprint[:12]}) than "
            f"when the run in {workdir} began ({expected[:12]}): it was built again from other "
            "text or by another version; restore the old store, or start a new run with another "
            "--workdir"
        )


def _recorded_stores(workdir: Path | epath.Path) -> dict[str, str]:
    path = epath.Path(workdir) / STORES
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); it holds the fingerprints of the run's token stores: "
            "restore it, or delete it to skip that check"
        ) from error


def _record_stores(workdir: epath.Path, stores: Sequence[TokenStore]) -> None:
    found = {store.directory: store.fingerprint for store in stores}
    if found != _recorded_stores(workdir):
        atomic.write_text(workdir / STORES, json.dumps(found, indent=2) + "\n")


def read_workdir(workdir: Path | epath.Path) -> tuple[Config, Tokenizer]:
    """The config and the tokenizer of a run.

    Raises:
      ConfigError: if `workdir` is not one, or has no tokenizer or that of another model.
    """
    config = read_config(workdir / "config.json")
    tokenizer = _recorded_tokenizer(workdir)
    kind = {ByteTokenizer: "byte", BPETokenizer: "bpe"}.get(type(tokenizer))
    expected = config.data.tokenizer if config.data.tokenizer in TOKENIZERS else None
    pretrained = expected is None  # then it may be of any kind
    if not (pretrained or kind == expected) or tokenizer.surplus(config.model.vocab_size):
        raise ConfigError(
            f"the tokenizer in {workdir} ({kind}, {tokenizer.vocab_size} ids) does not fit "
            f"data.tokenizer={config.data.tokenizer!r} and model.vocab_size="
            f"{config.model.vocab_size} of the run; restore the tokenizer that it began with"
        )
    return config, tokenizer


def progress_of_old_checkpoint(workdir: epath.Path, step: int) -> dict[str, float]:
    """The times of a run up to a step, for an old checkpoint that does not record them.

    They are in the log: the start of the run in starts.jsonl, its seconds in metrics.jsonl.
    """
    seconds = [
        record.get("training_seconds", 0.0)
        for record in records_in(workdir / "metrics.jsonl")
        if record["step"] <= step
    ]
    starts = [x["time"] for x in records_in(workdir / "starts.jsonl") if "time" in x]
    return {
        "run_began": min(starts, default=time.time()),
        "training_seconds": max(seconds, default=0.0),
    }


def _recorded_tokenizer(workdir: Path | epath.Path) -> Tokenizer:
    try:
        return load_tokenizer(workdir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{error}; restore the tokenizer that the run began with: its data.store has it"
        ) from error
