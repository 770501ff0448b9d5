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
import os
import socket
from collections.abc import Iterator

from etils import epath

from retnet_jax.config import TOKENIZERS, Config
from retnet_jax.config_json import differences, marked, read_config, to_json
from retnet_jax.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from retnet_jax.data.tokenizers.pretrained import CONFIG_NAME, NAMES
from retnet_jax.errors import ConfigError

LOCK = "lock"


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Holds a workdir, made if it is not there, as long as the `with` lasts.

    On local and network disks; object stores have no locks.

    Raises:
      ConfigError: if another process holds it, or it is no workdir but has something in it.
    """
    # What a start leaves that is cut off before it has recorded a config.
    ours = {*NAMES, CONFIG_NAME, "config.json.unfinished", LOCK}
    names = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
    if "config.json" not in names and names - ours:
        raise ConfigError(
            f"--workdir={workdir} has files in it but no config.json, so it is no run to resume; "
            "name a new or an empty directory"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if "://" in str(workdir):
        yield
        return
    import fcntl  # not on Windows, where nothing else here needs it

    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"--workdir={workdir} is in use by another run ({file.read().strip()}): "
                "wait for it, stop it, or name another directory"
            ) from None
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
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
        _record(workdir, config)
        return []
    changes = differences(read_config(workdir / "config.json"), config)
    lines = {name: f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()}
    refused = [line for name, line in lines.items() if name not in marked("changeable")]
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
        _record(workdir, config)
    return list(lines.values())


def _record(workdir: epath.Path, config: Config) -> None:
    """Writes config.json in one piece."""
    unfinished = workdir / "config.json.unfinished"
    unfinished.write_text(to_json(config))
    unfinished.replace(workdir / "config.json")


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
