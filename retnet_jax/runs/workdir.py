"""The directory of a run.

config.json         the whole config
tokenizer.json      what its token ids mean (and tokenizer_config.json, or tokenizer.model)
stores.json         the fingerprint of each token store that it is trained on
metrics.jsonl       one JSON object a logged step
checkpoints/STEP/   see `checkpoint.py`
starts.jsonl        one JSON object for each time the run was started
profile/            traces, as `config.profile` asks for
lock                held by the process that trains
events.out.*        the metrics for TensorBoard
wandb_id            under which Weights & Biases knows the run
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence

from etils import epath

from retnet_jax.config import TOKENIZERS, Config
from retnet_jax.config_json import config_differences, marked, read_config, to_json
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
from retnet_jax.runs.json_lines import records_in

STORES = "stores.json"


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Holds a workdir for this process until the `with` ends; a missing one is made.

    One that was made here and in which no run was recorded is removed again. The lock works on
    local and network disks; object stores have none.

    Raises:
      ConfigError: if another process holds it, or if it has files in it but is no workdir.
    """
    # What a start leaves that is cut off before it has recorded a config.
    ours = {*SAVED_FILES, STORES, lock.FILE_NAME}
    new = not workdir.exists()
    found = list(workdir.iterdir()) if workdir.is_dir() else []
    names = {path.name for path in found if not atomic.is_unfinished(path)}
    if "config.json" not in names and names - ours:
        raise ConfigError(
            f"--workdir={workdir} has files in it but no config.json, so it is no run to resume; "
            "name a new or an empty directory"
        )
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(workdir))
        except OSError as error:
            raise ConfigError(
                f"--workdir={workdir} cannot be written to ({error}); name a directory that can"
            ) from error
        except lock.HeldError as holder:
            raise ConfigError(
                f"--workdir={workdir} is in use by another run ({holder}): "
                "wait for it, stop it, or name another directory"
            ) from None
        try:
            yield
        finally:
            if new and not (workdir / "config.json").exists():
                _remove_empty(workdir)


def _remove_empty(workdir: epath.Path) -> None:
    """Deletes a workdir that holds the lock and nothing else."""
    if workdir.is_dir() and {path.name for path in workdir.iterdir()} <= {lock.FILE_NAME}:
        workdir.rmtree()


def recorded_config(workdir: epath.Path) -> Config | None:
    """The config of the run in a workdir; None if no run has been recorded there.

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
    """Records config, tokenizer and stores of a new run, or compares those of one that is resumed.

    Args:
      workdir: of the run, held by this process.
      config: of the run that starts.
      recorded: what the workdir records.
      tokenizer: of the run that starts.
      stores: that it is trained on.

    Returns:
      The allowed differences from the recorded config: one line for each option.

    Raises:
      ConfigError: if the workdir belongs to a run with another config, tokenizer or other data.
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
            f"{workdir} belongs to a run with another config (its value -> the one given):\n  "
            + "\n  ".join(refused)
            + "\ngive the same values or another --workdir; if the change is meant for this "
            f"run, make it in {workdir / 'config.json'} as well"
        )
    of_run = _recorded_tokenizer(workdir)
    if of_run.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data.store={config.data.store!r} has another tokenizer "
            f"({tokenizer.fingerprint[:12]}) than {workdir} ({of_run.fingerprint[:12]}); "
            "its token ids would mean other text: name the store the run began with"
        )
    for store in stores:
        check_store(workdir, store)
    _record_stores(workdir, stores)  # what an older version began has none
    if changes:
        atomic.write_text(workdir / "config.json", to_json(config))
    return list(lines.values())


def restore_if_gone(
    workdir: epath.Path, config: Config, tokenizer: Tokenizer, stores: Sequence[TokenStore]
) -> bool:
    """Records a run again whose workdir was moved or deleted while it lasts; whether it was.

    Raises:
      CheckpointError: if it cannot be written.
    """
    try:
        if (workdir / "config.json").exists():
            return False
        _record(workdir, config, tokenizer, stores)
    except OSError as error:
        raise CheckpointError(
            f"{workdir} is not there any more and cannot be written again: {error}"
        ) from error
    return True


def _record(
    workdir: epath.Path, config: Config, tokenizer: Tokenizer, stores: Sequence[TokenStore]
) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir)
    _record_stores(workdir, stores)
    # Written last: what has a config.json is a workdir.
    atomic.write_text(workdir / "config.json", to_json(config))


def check_store(workdir: epath.Path, store: TokenStore) -> None:
    """Raises `ConfigError` if a store holds other data than when the run began.

    Then held-out documents may be among those that the model was trained on, and a run that is
    resumed would continue with other text.
    """
    expected = _recorded_stores(workdir).get(store.directory)
    if expected not in (None, store.fingerprint):
        raise ConfigError(
            f"the token store {store.directory!r} holds other data ({store.fingerprint[:12]}) than "
            f"when the run in {workdir} began ({expected[:12]}): it was built again from other "
            "text or by another version; put the old one back, or begin a new run with another "
            "--workdir"
        )


def _recorded_stores(workdir: epath.Path) -> dict[str, str]:
    path = epath.Path(workdir) / STORES
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); it holds the fingerprints of the run's token stores: "
            "put it back, or delete it to go without that check"
        ) from error


def _record_stores(workdir: epath.Path, stores: Sequence[TokenStore]) -> None:
    found = {store.directory: store.fingerprint for store in stores}
    if found != _recorded_stores(workdir):
        atomic.write_text(workdir / STORES, json.dumps(found, indent=2) + "\n")


def read_workdir(workdir: epath.Path) -> tuple[Config, Tokenizer]:
    """The config and the tokenizer of a run.

    Raises:
      ConfigError: if `workdir` is none, or has no tokenizer or another model's.
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
            f"{config.model.vocab_size} of the run; put back the one it began with"
        )
    return config, tokenizer


def progress_of_old_checkpoint(workdir: epath.Path, step: int) -> dict[str, float]:
    """What the checkpoint of a step says of a run's time, for one written before it did.

    Then the start of the run stood in starts.jsonl, and the seconds of its steps in metrics.jsonl.
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


def _recorded_tokenizer(workdir: epath.Path) -> Tokenizer:
    try:
        return load_tokenizer(workdir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{error}; put back the tokenizer that the run began with: its data.store has it"
        ) from error
