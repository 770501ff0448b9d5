"""Loads, saves and converts checkpoints of other RetNet implementations.

    model = interop.load(directory)                      # in any layout
    interop.fla.save(model, directory)                   # or torchscale, syncdoth
    interop.convert(directory, target, "own")            # tensor by tensor

A layout is the checkpoint format of an implementation. Each is one table in its module, used for
reading and for writing (`tables.Rule`). A model that a layout cannot express is refused, with the
reasons.
"""

import dataclasses
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from retnet_jax.config import ModelConfig
from retnet_jax.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files.hub import model_directory
from retnet_jax.interop import fla, syncdoth, torchscale
from retnet_jax.interop.own import RunSource, config_of, own_layout
from retnet_jax.interop.parameter_source import (
    Description,
    HeadNormFolded,
    Source,
    load_model,
)
from retnet_jax.interop.safetensors_reader import AnyPath
from retnet_jax.interop.tables import Layout, config_values
from retnet_jax.interop.tensor_files import (
    TensorFiles,
    has_tensor_files,
    open_tensor_files,
    weights_files,
)
from retnet_jax.model import LanguageModel

__all__ = [
    "LAYOUTS",
    "Description",
    "convert",
    "load",
    "open_source",
    "save",
]

LAYOUTS = {
    layout.name: layout for layout in (fla.LAYOUT, fla.UNFUSED, torchscale.LAYOUT, syncdoth.LAYOUT)
}
# Files that are copied with the weights: those of tokenizers (Hugging Face, SentencePiece,
# tiktoken, fairseq), chat templates and generation options.
BESIDE_WEIGHTS = (
    "*token*.json",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "encoder.json",
    "dict.txt",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "tokenization_*.py",
    "*.jinja",
    "chat_template*.json",
    "generation_config.json",
)


def load(directory: str | AnyPath, mesh: Mesh | None = None, **changes: Any) -> LanguageModel:
    """Loads the model in a directory, in any layout.

    Args:
      directory: Checkpoint of fla, torchscale or syncdoth, or one of this project; or the name of
        one on the Hugging Face hub, which is downloaded.
      mesh: Devices for the parameters, sharded as in training; None: the first device.
      changes: Fields of `ModelConfig` that change no parameter, such as dtype="bfloat16".

    Raises:
      ConfigError: for a config that this project cannot compute, and for invalid changes.
      CheckpointError: for weights that are missing, damaged, or do not fit the config.
    """
    return load_model(open_source(model_directory(directory)), mesh, **changes)


def save(model: LanguageModel, directory: str | Path, layout: str, **options: Any) -> None:
    """Saves a model to a directory in a layout.

    Args:
      model: Model to save.
      directory: Target; must not exist, or be empty.
      layout: "own", or one of `LAYOUTS`.
      options: Further options of `Layout.save`.

    Raises:
      ConfigError: if the layout cannot express the model.
      CheckpointError: if the directory is not empty, or the disk is full.
    """
    _layout(layout, model.config).save(model, directory, **options)


def convert(
    source: str | AnyPath,
    target: str | Path,
    layout: str,
    *,
    fold_head_norm: bool = False,
    **options: Any,
) -> int | None:
    """Converts a checkpoint to another layout, tensor by tensor, and copies its tokenizer.

    Args:
      source: Directory as for `load`.
      target: Directory to write; must not exist, or be empty.
      layout: "own", or one of `LAYOUTS`.
      fold_head_norm: Whether to multiply the scale of the head norm, which only fla has, into the
        output projection.
      options: Further options of `Layout.write`.

    Returns:
      Step of the checkpoint that was converted, if the source is a training run; else None.

    Raises:
      ConfigError: if the layout cannot express the model, with the reasons.
      CheckpointError: as `load` and `save`.
    """
    directory = model_directory(source)
    parameters = open_source(directory)
    step = parameters.step if isinstance(parameters, RunSource) else None
    if fold_head_norm:
        parameters = HeadNormFolded(parameters)
    description = parameters.description
    tokenizer = _tokenizer_in(directory)
    if description.bos_id is None and tokenizer is not None:
        ends = list(tokenizer.end_ids)
        description = dataclasses.replace(
            description, bos_id=tokenizer.bos_id, eos_id=ends if len(ends) > 1 else ends[0]
        )
    _layout(layout, description.model).write(parameters, target, description=description, **options)
    for path in directory.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in BESIDE_WEIGHTS) and path.is_file():
            (Path(target) / path.name).write_bytes(path.read_bytes())
    # End-of-text ids that only the source's config.json names must be kept somewhere.
    copy = _tokenizer_in(Path(target))
    if tokenizer is not None and (copy is None or copy.end_ids != tokenizer.end_ids):
        tokenizer.save(Path(target))
    return step


def _tokenizer_in(directory: AnyPath) -> Tokenizer | None:
    """The tokenizer in a directory; None if there is none, or if it cannot be loaded."""
    if not has_tokenizer(directory):
        return None
    try:
        return load_tokenizer(directory)
    except ValueError:
        return None


def open_source(directory: AnyPath) -> Source:
    """Opens the parameters in a directory, in any layout; raises as `load`."""
    check_has_model(directory)
    if (directory / "checkpoints").is_dir():
        return RunSource(directory)
    files = open_tensor_files(directory)
    if "embedding" in files.infos:
        config = config_of(config_values(directory)).model
        return own_layout(config).open(directory, files)
    return _recognised(directory, files).open(directory, files)


def check_has_model(directory: AnyPath) -> None:
    """Raises `CheckpointError` if a directory holds neither a training run nor a weights file.

    The error says which files are expected and which exist.
    """
    if (directory / "checkpoints").is_dir() or has_tensor_files(directory):
        return
    expected = (
        "expected a --workdir of train.py (config.json and checkpoints/) or a checkpoint with "
        f"{weights_files()}"
    )
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file: name the directory it is in; {expected}")
    if not directory.exists():
        text, hub = str(directory), ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+(?:@\S+)?", text):
            hub = f"; for the model of this name on the Hugging Face hub, give hf://{text}"
        raise CheckpointError(f"{directory} is no directory{hub}")
    if below := models_below(directory):
        raise CheckpointError(
            f"{directory} has no weights, but {len(below)} of its subdirectories do: name one of "
            f"them, such as {below[-1]}"
        )
    names = sorted(path.name for path in directory.iterdir())
    found = ", ".join(names[:8]) or "nothing"
    more = "" if len(names) <= 8 else f" and {len(names) - 8} more"
    raise CheckpointError(f"{directory} has no weights: {expected}; found {found}{more}")


def models_below(directory: AnyPath) -> list[AnyPath]:
    """The subdirectories that hold a model, such as checkpoint-100 of Hugging Face's trainer."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_dir() and ((path / "checkpoints").is_dir() or has_tensor_files(path))
    )


def _recognised(directory: AnyPath, files: TensorFiles) -> Layout:
    """Recognises a layout by its name of the embedding, fla's unfused one by the head norm's."""
    names = set(files.infos)
    if any(".attn.g_norm.weight" in name for name in names):
        return fla.UNFUSED
    for layout in (fla.LAYOUT, syncdoth.LAYOUT, torchscale.LAYOUT):
        if layout.rules[0].foreign in names:
            return layout
    known = ", ".join(layout.rules[0].foreign for layout in LAYOUTS.values())
    some = ", ".join(sorted(names)[:5]) or "none"
    raise CheckpointError(
        f"{directory}: unknown layout, with tensors such as {some}; expected an embedding named "
        f"{known}, or embedding (this project)"
    )


def _layout(name: str, config: ModelConfig) -> Layout:
    if name == "own":
        return own_layout(config)
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r} is not one of own, {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
