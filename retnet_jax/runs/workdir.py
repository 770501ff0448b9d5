"""The directory of a run.

config.json         the whole config
tokenizer.json      what its token ids mean (and tokenizer_config.json, or tokenizer.model)
metrics.jsonl       one JSON object a logged step
checkpoints/STEP/   see `checkpoint.py`
starts.jsonl        one JSON object for each time the run was started
profile/            traces, as `config.profile` asks for
lock                held by the process that trains
events.out.*        the metrics for TensorBoard
"""

import contextlib
from collections.abc import Iterator

from etils import epath

from retnet_jax.config import TOKENIZERS, Config
from retnet_jax.config_json import differences, read_config, to_json
from retnet_jax.data.tokenizers import (
    SAVED_FILES,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)
from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic, lock

# Of a config, what a run can go on with in another way: where and how it is computed, what it
# reports and keeps, and which batches it passes over.
CHANGEABLE = (
    "mesh.",
    "profile.",
    "data.skip_steps",
    "model.remat",
    "model.chunk_size",
    "train.micro_batches",
    "train.log_every",
    "train.eval_",
    "train.checkpoint_",
    "train.keep_",
    "train.wandb",
    "train.spike_deviations",
    "train.most_skipped",
)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Holds a workdir for this process until the `with` ends; a missing one is made.

    On local and network disks; object stores have no locks.

    Raises:
      ConfigError: if another process holds it, or it is no workdir but has something in it.
    """
    # What a start leaves that is cut off before it has recorded a config.
    ours = {*SAVED_FILES, lock.FILE_NAME}
    found = list(workdir.iterdir()) if workdir.is_dir() else []
    names = {path.name for path in found if not atomic.is_unfinished(path)}
    if "config.json" not in names and names - ours:
        raise ConfigError(
            f"--workdir={workdir} has files in it but no config.json, so it is no run to resume; "
            "name a new or an empty directory"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(workdir))
        except lock.HeldError as holder:
            raise ConfigError(
                f"--workdir={workdir} is in use by another run ({holder}): "
                "wait for it, stop it, or name another directory"
            ) from None
        yield


def open_workdir(workdir: epath.PathLike, config: Config, tokenizer: Tokenizer) -> list[str]:
    """Records config and tokenizer in a new workdir, or compares them with what it records.

    Returns:
      What is other than when the run began, and may be: one line for each field.

    Raises:
      ConfigError: if the workdir belongs to a run with another config or tokenizer.
    """
    workdir = epath.Path(workdir)
    if not (workdir / "config.json").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir)
        # Written last: what has a config.json is a workdir.
        atomic.write_text(workdir / "config.json", to_json(config))
        return []
    changes = differences(read_config(workdir / "config.json"), config)
    refused = [change for change in changes if not change.startswith(CHANGEABLE)]
    if refused:
        raise ConfigError(
            f"{workdir} belongs to a run with another config (its value -> the one given):\n  "
            + "\n  ".join(refused)
            + "\ngive the same values or another --workdir; if the change is meant for this "
            f"run, make it in {workdir / 'config.json'} as well"
        )
    recorded = _recorded_tokenizer(workdir)
    if recorded.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data.store={config.data.store!r} has another tokenizer "
            f"({tokenizer.fingerprint[:12]}) than {workdir} ({recorded.fingerprint[:12]}); "
            "its token ids would mean other text: name the store the run began with"
        )
    if changes:
        atomic.write_text(workdir / "config.json", to_json(config))
    return changes


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
    if not (pretrained or kind == expected) or tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer in {workdir} ({kind}, {tokenizer.vocab_size} ids) does not fit "
            f"data.tokenizer={config.data.tokenizer!r} and model.vocab_size="
            f"{config.model.vocab_size} of the run; put back the one it began with"
        )
    return config, tokenizer


def _recorded_tokenizer(workdir: epath.Path) -> Tokenizer:
    try:
        return load_tokenizer(workdir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{error}; put back the tokenizer that the run began with: its data.store has it"
        ) from error
