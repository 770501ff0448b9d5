"""Checkpoints of other RetNets: loaded, saved, and converted into each other.

    model = interop.load(directory)                      # whatever layout it has
    interop.fla.save(model, directory)                   # or torchscale, syncdoth
    interop.convert(directory, target, "own")            # tensor by tensor

Each layout is one table in its module, read in both directions (`layout.Rule`). What a layout
cannot express is refused, with the reasons.
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
from retnet_jax.files.paths import place
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
    looked_for,
    open_tensor_files,
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
# Beside the weights: what tokenizers of Hugging Face, SentencePiece, tiktoken and fairseq are made
# of, and what says how a model is talked to.
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


def load(directory: str | Path, mesh: Mesh | None = None, **changes: Any) -> LanguageModel:
    """The model in a directory, whatever layout it has.

    Args:
      directory: a checkpoint of fla, torchscale or syncdoth, or one of ours.
      mesh: where the parameters go, laid out as in training; None: the first device.
      changes: fields of `ModelConfig` that change no parameter, such as dtype="bfloat16".

    Raises:
      ConfigError: for a config that this project cannot compute, and changes that do not fit.
      CheckpointError: for weights that are missing, damaged or not the config's.
    """
    return load_model(open_source(place(directory)), mesh, **changes)


def save(model: LanguageModel, directory: str | Path, layout: str, **options: Any) -> None:
    """Writes a model as a directory of a layout.

    Args:
      model: what is written.
      directory: must not exist, or be empty.
      layout: "own", or one of `LAYOUTS`.
      options: as of `Layout.save`.

    Raises:
      ConfigError: if the layout cannot say what the model computes.
      CheckpointError: if the directory has something in it, or the disk has no room.
    """
    _layout(layout, model.config).save(model, directory, **options)


def convert(
    source: str | Path,
    target: str | Path,
    layout: str,
    *,
    fold_head_norm: bool = False,
    **options: Any,
) -> None:
    """Rewrites a checkpoint in another layout, tensor by tensor, with its tokenizer's files.

    Args:
      source: a directory as for `load`.
      target: must not exist, or be empty.
      layout: "own", or one of `LAYOUTS`.
      fold_head_norm: multiply the scale of the head norm, which only fla has, into the output
        projection.
      options: as of `Layout.write`.

    Raises:
      ConfigError: if the layout cannot say what the model computes, with the reasons.
      CheckpointError: as `load` and `save`.
    """
    source = place(source)
    parameters = open_source(source)
    if fold_head_norm:
        parameters = HeadNormFolded(parameters)
    description = parameters.description
    tokenizer = _tokenizer_in(source)
    if description.bos_id is None and tokenizer is not None:
        ends = list(tokenizer.end_ids)
        description = dataclasses.replace(
            description, bos_id=tokenizer.bos_id, eos_id=ends if len(ends) > 1 else ends[0]
        )
    _layout(layout, description.model).write(parameters, target, description=description, **options)
    for path in source.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in BESIDE_WEIGHTS) and path.is_file():
            (Path(target) / path.name).write_bytes(path.read_bytes())
    # What only the source's config.json said of the ends of texts has to stand somewhere.
    copy = _tokenizer_in(Path(target))
    if tokenizer is not None and (copy is None or copy.end_ids != tokenizer.end_ids):
        tokenizer.save(Path(target))


def _tokenizer_in(directory: AnyPath) -> Tokenizer | None:
    """The tokenizer in a directory; None if there is none, or none that can be used by itself."""
    if not has_tokenizer(directory):
        return None
    try:
        return load_tokenizer(directory)
    except ValueError:
        return None


def open_source(directory: AnyPath) -> Source:
    """The parameters in a directory, whatever layout it has; raises as `load`."""
    check_has_model(directory)
    if (directory / "checkpoints").is_dir():
        return RunSource(directory)
    files = open_tensor_files(directory)
    if "embedding" in files.infos:
        config = config_of(config_values(directory)).model
        return own_layout(config).open(directory, files)
    return _recognised(directory, files).open(directory, files)


def check_has_model(directory: AnyPath) -> None:
    """Raises `CheckpointError` if there is neither a training run nor a file with weights.

    The error says what was looked for and what is there.
    """
    if (directory / "checkpoints").is_dir() or has_tensor_files(directory):
        return
    what = (
        f"a --workdir of train.py has config.json and checkpoints/; in a checkpoint {looked_for()}"
    )
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file: name the directory that it is in; {what}")
    if not directory.exists():
        text, hub = str(directory), ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            hub = (
                "; for a model of Hugging Face's hub, which nothing here downloads: "
                f"hf download {text} --local-dir DIRECTORY"
            )
        raise CheckpointError(f"{directory} is no directory{hub}")
    if below := models_below(directory):
        raise CheckpointError(
            f"{directory} has no weights, but {len(below)} of its directories have: name one, "
            f"such as {below[-1]}"
        )
    names = sorted(path.name for path in directory.iterdir())
    found = ", ".join(names[:8]) or "nothing"
    more = "" if len(names) <= 8 else f" and {len(names) - 8} more"
    raise CheckpointError(f"{directory} has no weights: {what}; there is {found}{more}")


def models_below(directory: AnyPath) -> list[AnyPath]:
    """The directories in a directory that hold a model, as trainers write checkpoint-100."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_dir() and ((path / "checkpoints").is_dir() or has_tensor_files(path))
    )


def _recognised(directory: AnyPath, files: TensorFiles) -> Layout:
    """The layout that names the embedding, and the head norm, as the files do."""
    names = set(files.infos)
    if any(".attn.g_norm.weight" in name for name in names):
        return fla.UNFUSED
    for layout in (fla.LAYOUT, syncdoth.LAYOUT, torchscale.LAYOUT):
        if layout.rules[0].foreign in names:
            return layout
    known = ", ".join(layout.rules[0].foreign for layout in LAYOUTS.values())
    some = ", ".join(sorted(names)[:5]) or "none"
    raise CheckpointError(
        f"{directory}: no layout is known that has tensors such as {some}; an embedding named "
        f"{known} or, by us, embedding is looked for"
    )


def _layout(name: str, config: ModelConfig) -> Layout:
    if name == "own":
        return own_layout(config)
    if name not in LAYOUTS:
        raise ConfigError(f"layout={name!r} is not one of own, {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
