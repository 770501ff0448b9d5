"""Loads trained models: of training runs, of other programs, and from the Hugging Face hub.

`load_pretrained` loads the model, `read_pretrained` reads the config and the tokenizer beside it.
"""

import contextlib
import dataclasses
from typing import Any

from jax.sharding import Mesh

from retnet_jax import interop
from retnet_jax.config import TOKENIZERS, Config, DataConfig, ModelConfig
from retnet_jax.config.as_json import marked, read_config
from retnet_jax.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files.hub import cached_name, hub_name, model_directory, tokenizer_directory
from retnet_jax.interop import check_has_model, models_below
from retnet_jax.interop.parameter_source import changed
from retnet_jax.interop.safetensors_reader import AnyPath
from retnet_jax.interop.tensor_files import has_tensor_files
from retnet_jax.model import LanguageModel
from retnet_jax.model.parameters import abstract_model
from retnet_jax.parallel.mesh import first_device
from retnet_jax.parallel.sharding import with_shardings
from retnet_jax.provenance import files_sha256
from retnet_jax.runs.workdir import read_workdir


def load_pretrained(
    directory: str | AnyPath,
    mesh: Mesh | None = None,
    *,
    revision: str | None = None,
    **changes: Any,
) -> LanguageModel:
    """Loads the model in a directory or on the Hugging Face hub.

    Args:
      directory: `--workdir` of train.py (its newest checkpoint is loaded), or a checkpoint of
        flash-linear-attention, torchscale, syncdoth or `tools/convert_checkpoint.py`. Or the name
        of a model on the hub, such as "fla-hub/retnet-1.3B-100B", which is downloaded
        (`files/hub.py`).
      mesh: Devices for the parameters, sharded as in training; None: the first device.
      revision: Branch, tag or commit of a model on the hub; None: the newest commit.
      changes: Fields of `ModelConfig` that change no parameter, such as dtype="bfloat16".

    Raises:
      ConfigError: for a config that is missing or that this project cannot compute, for invalid
        changes, and for a name or a revision that does not exist.
      CheckpointError: for weights that are missing, damaged, or do not fit the config, and if the
        hub cannot be reached.
    """
    return load_checkpoint(directory, mesh, revision=revision, **changes)[0]


def load_checkpoint(
    directory: str | AnyPath,
    mesh: Mesh | None = None,
    *,
    revision: str | None = None,
    **changes: Any,
) -> tuple[LanguageModel, int | None]:
    """As `load_pretrained`; also returns the step of a training run's newest checkpoint."""
    from retnet_jax.runs.checkpoint import restore_model

    directory = model_directory(directory, revision)
    if not is_run(directory):
        return interop.load(directory, mesh, **changes), None

    _check_has_model(directory)
    config = changed(read_config(directory / "config.json").model, changes)
    shape = with_shardings(abstract_model(config), mesh or first_device())
    return restore_model(directory / "checkpoints", shape)


def read_pretrained(
    directory: str | AnyPath, revision: str | None = None
) -> tuple[Config, Tokenizer]:
    """Reads the config and the tokenizer of a model as for `load_pretrained`, not the weights.

    Raises:
      ConfigError: as `load_pretrained`, and if the tokenizer is missing or does not fit the model.
    """
    directory = model_directory(directory, revision)
    if is_run(directory):
        _check_has_model(directory)
        return read_workdir(directory)
    config = _read_foreign_config(directory)
    if not has_tokenizer(directory):
        name = cached_name(directory)
        copy = "copy the model's tokenizer there"
        if name is not None:
            copy = (
                f"download the model (hf download {name.repository} --local-dir DIRECTORY), copy "
                "its tokenizer there, and give DIRECTORY"
            )
        raise ConfigError(f"{name or directory} has no tokenizer.json or tokenizer.model: {copy}")
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tokenizer.check_fits(f"the tokenizer in {directory}", config.model.vocab_size)
    return config, tokenizer


def checkpoint_sha256(directory: str | AnyPath, step: int | None) -> str:
    """SHA-256, in hex, of the names and contents of a checkpoint's files.

    Args:
      directory: Directory as for `load_pretrained`.
      step: Step of a training run's checkpoint, as `load_checkpoint` returns it.
    """
    directory = model_directory(directory)
    return files_sha256(directory if step is None else directory / "checkpoints" / str(step))


def with_initial_model(config: Config, recorded: Config | None = None) -> Config:
    """A run's config with the model and the tokenizer of `config.init_from`, if that is set.

    Only the `run_options` of `config.model` are kept, such as dtype and dropout. A name on the
    Hugging Face hub, also that of `config.data.tokenizer`, is replaced by one with the commit, so
    that the run's config.json records the exact model and tokenizer.

    Args:
      config: Config of the run.
      recorded: Config recorded in the run's workdir. When a run is resumed, it is used instead of
        `init_from`, which may no longer exist; also instead of a newer commit on the hub.

    Raises:
      ConfigError, CheckpointError: as `load_pretrained`.
    """
    if not config.init_from:
        return _with_commit_of_tokenizer(config, recorded)
    if recorded is not None and _is_same_model(config.init_from, recorded.init_from):
        return _begun_from(dataclasses.replace(config, init_from=recorded.init_from), recorded)
    directory = model_directory(config.init_from)
    origin = str(directory)
    if hub_name(config.init_from) is not None:
        origin = str(cached_name(directory))
        config = dataclasses.replace(config, init_from=origin)
    if is_run(directory):
        _check_has_model(directory)
        found = read_config(directory / "config.json")
    else:
        found = _read_foreign_config(directory)
    if has_tokenizer(directory):
        tokenizer = origin
    else:
        tokenizer = _with_commit_of_tokenizer(config, recorded).data.tokenizer
    return _begun_from(
        config,
        dataclasses.replace(found, data=dataclasses.replace(found.data, tokenizer=tokenizer)),
    )


def run_options(model: ModelConfig) -> dict[str, Any]:
    """The options of a model that change how it is computed or trained, but not its function."""
    names = (name.removeprefix("model.") for name in marked("computation"))
    return {name: getattr(model, name) for name in names}


def _is_same_model(given: str, recorded: str) -> bool:
    """Whether two paths or names are of the same model; the first may lack the revision."""
    name, before = hub_name(given), hub_name(recorded)
    if given == recorded or name is None or before is None:
        return given == recorded
    return name.revision is None and name.repository == before.repository


def _with_commit_of_tokenizer(config: Config, recorded: Config | None) -> Config:
    """The config with the commit of a tokenizer on the hub, which is the recorded one if any."""
    given = config.data.tokenizer
    if given in TOKENIZERS or hub_name(given) is None:
        return config
    name = given
    if recorded is not None and _is_same_model(given, recorded.data.tokenizer):
        name = recorded.data.tokenizer
    else:
        # If it cannot be read, the store may have it; otherwise the same error is raised there.
        with contextlib.suppress(ConfigError, CheckpointError):
            name = str(cached_name(tokenizer_directory(given)))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))


def _begun_from(config: Config, found: Config) -> Config:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(found.model, **run_options(config.model)),
        data=dataclasses.replace(config.data, tokenizer=found.data.tokenizer),
    )


def _read_foreign_config(directory: AnyPath) -> Config:
    """The config of a foreign checkpoint: its model, and its training length."""
    description = interop.open_source(directory).description
    return Config(
        model=description.model, data=DataConfig(sequence_length=description.context_length)
    )


def is_run(directory: AnyPath) -> bool:
    """Whether a directory is a training run's workdir, or has no weights of another kind either."""
    return (directory / "checkpoints").is_dir() or not has_tensor_files(directory)


def _check_has_model(directory: AnyPath) -> None:
    """Raises `ConfigError` if a directory is neither a training run nor a checkpoint."""
    config = directory / "config.json"
    if config.is_file() and ((directory / "checkpoints").is_dir() or not models_below(directory)):
        return
    try:
        check_has_model(directory)
    except CheckpointError as error:
        problem = "is not that of a training run" if config.is_file() else "does not exist"
        raise ConfigError(f"{config} {problem}, and {error}") from error
