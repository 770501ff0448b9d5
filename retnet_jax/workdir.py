"""The directory of a run.

config.json         the whole config
tokenizer.json      what its token ids mean (and tokenizer_config.json, or tokenizer.model)
metrics.jsonl       one JSON object a logged step
checkpoints/STEP/   see `checkpoint.py`
events.out.*        the metrics for TensorBoard
"""

from pathlib import Path

from retnet_jax.config import TOKENIZERS, Config, ConfigError, differences, read_config
from retnet_jax.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer


def open_workdir(workdir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Records config and tokenizer in a new workdir, or compares them with what it records.

    Raises:
      ConfigError: if the workdir belongs to a run with another config or tokenizer, or is no
        workdir but has something in it.
    """
    if (workdir / "config.json").exists():
        changes = differences(read_config(workdir / "config.json"), config)
        if changes:
            raise ConfigError(
                f"{workdir} belongs to a run with another config (its value -> the one given):\n  "
                + "\n  ".join(changes)
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
        return
    # Of a start that was cut off right here.
    ours = {*tokenizer.files, "config.json.unfinished"}
    if workdir.is_dir() and {path.name for path in workdir.iterdir()} - ours:
        raise ConfigError(
            f"--workdir={workdir} has files in it but no config.json, so it is no run to resume; "
            "name a new or an empty directory"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir)
    # Written last, and in one piece: what has a config.json is a workdir.
    unfinished = workdir / "config.json.unfinished"
    unfinished.write_text(config.to_json())
    unfinished.rename(workdir / "config.json")


def read_workdir(workdir: Path) -> tuple[Config, Tokenizer]:
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


def _recorded_tokenizer(workdir: Path) -> Tokenizer:
    try:
        return load_tokenizer(workdir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{error}; put back the tokenizer that the run began with: its data.store has it"
        ) from error
