"""The directory of a run.

config.json         the whole config
tokenizer.json      what its token ids mean
metrics.jsonl       one JSON object a logged step
checkpoints/STEP/   see `checkpoint.py`
events.out.*        the metrics for TensorBoard
"""

from pathlib import Path

from retnet_jax.config import Config, ConfigError, differences, read_config
from retnet_jax.data import Tokenizer, load_tokenizer


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
        recorded = load_tokenizer(workdir)
        if recorded.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"data.store={config.data.store!r} has another tokenizer "
                f"({tokenizer.fingerprint[:12]}) than {workdir} ({recorded.fingerprint[:12]}); "
                "its token ids would mean other text: name the store the run began with"
            )
        return
    if workdir.is_dir() and any(workdir.iterdir()):
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
      ConfigError: if `workdir` is none.
    """
    return read_config(workdir / "config.json"), load_tokenizer(workdir)
