"""A layout: how another implementation names, shapes and describes the parameters of a RetNet.

Its table of `Rule`s is read in both directions, so that import and export are inverses of each
other by construction. Parameters have their own names here, such as `layers/mixer/q/kernel`, and
come one layer at a time.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from retnet_jax.config import ModelConfig
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import atomic
from retnet_jax.files.paths import is_remote
from retnet_jax.interop.parameter_source import (
    Description,
    ModelSource,
    Source,
    load_model,
)
from retnet_jax.interop.safetensors_reader import DTYPES, AnyPath
from retnet_jax.interop.tensor_files import (
    TensorFiles,
    TensorInfo,
    TensorToWrite,
    open_tensor_files,
    write_safetensors,
    write_torch,
)
from retnet_jax.model import LanguageModel
from retnet_jax.model.parameters import parameter_shape, parameter_shapes


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      own: a parameter's own name. What begins with "layers/" is stacked there: [n ...].
      foreign: the layout's name. With "{layer}" in it, each layer has a tensor of its own.
      transposed: the layout has [out, in] where our kernels are [in, out].
    """

    own: str
    foreign: str
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """A foreign layout, or our own.

    Attributes:
      name: for people and the command line.
      rules: the table. Rules for parameters that a model does not have are skipped.
      read_config: the checkpoint's config, and the names of its tensors -> description. Raises
        `ConfigError` for features that this project does not have.
      write_config: description -> the checkpoint's config. Raises `ConfigError` that gives the
        reasons if this layout cannot say what the model computes.
      buffers: tensors of a checkpoint that follow from the config: checked when read.
      writes_tied_head: whether the output head is in the file when it is the embedding.
      split: renames and splits tensors that older checkpoints hold together.
    """

    name: str
    rules: tuple[Rule, ...]
    read_config: Callable[[dict[str, Any], Mapping[str, TensorInfo]], Description]
    write_config: Callable[[Description], dict[str, Any]]
    buffers: Callable[[ModelConfig], dict[str, np.ndarray]] = lambda _: {}
    writes_tied_head: bool = False
    split: Callable[[TensorFiles], TensorFiles] = lambda files: files

    def load(
        self, directory: str | Path, mesh: Mesh | None = None, **changes: Any
    ) -> LanguageModel:
        """The model in a directory of this layout.

        Args:
          directory: holds config.json and weights.
          mesh: where the parameters go, laid out as in training; None: the first device.
          changes: fields of `ModelConfig` that change no parameter, such as dtype="bfloat16".

        Raises:
          ConfigError: for a config that this project cannot compute, and changes that do not fit.
          CheckpointError: for weights that are missing, damaged or not the config's.
        """
        directory = epath.Path(directory)
        return load_model(self.open(directory, open_tensor_files(directory)), mesh, **changes)

    def save(
        self,
        model: LanguageModel,
        directory: str | Path,
        **options: Any,
    ) -> None:
        """Writes a model as a directory of this layout.

        Args:
          model: what is written.
          directory: must not exist, or be empty.
          options: as of `write`.

        Raises:
          ConfigError: if this layout cannot say what the model computes.
          CheckpointError: if the directory has something in it, or the disk has no room.
        """
        self.write(ModelSource(model), directory, **options)

    def open(self, directory: AnyPath, files: TensorFiles) -> "LayoutSource":
        """The parameters in a directory whose weights are open; raises as `load`."""
        description = self.read_config(config_values(directory, files), files.infos)
        description.model.check()
        return self.source(description, files, str(directory))

    def write(
        self,
        source: Source,
        directory: str | Path,
        *,
        description: Description | None = None,
        dtype: str | None = None,
        max_file_bytes: int = 5 * 10**9,
        torch_file: bool = False,
    ) -> None:
        """Writes the parameters of a source as a directory of this layout, one by one.

        Args:
          source: what is written.
          directory: on a local disk; must not exist, or be empty. It appears when all is written.
          description: of the source, with what it does not know itself, such as `bos_id`.
          dtype: "float32", "float16" or "bfloat16"; None: as the source has them.
          max_file_bytes: of one safetensors file; a larger model is divided over several.
          torch_file: write one PyTorch file, as fairseq has them, instead; all of it in memory.

        Raises:
          as `save`.
        """
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype={dtype!r} is not one of float32, float16, bfloat16")
        if is_remote(directory):
            raise ConfigError(
                f"{directory} cannot be written to: name a directory on a local disk, and copy it "
                "there afterwards"
            )
        directory = Path(directory)
        values = self.write_config(description or source.description)
        numpy_dtype = next((x for x in DTYPES.values() if x.name == dtype), None)
        tensors = self.tensors(source, numpy_dtype)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(f"{directory} exists and is not empty; name a new directory")
        with atomic.directory(directory) as unfinished:
            if torch_file:
                write_torch(unfinished / "model.pt", tensors)
            else:
                write_safetensors(unfinished, tensors, max_file_bytes)
            (unfinished / "config.json").write_text(json.dumps(values, indent=2) + "\n")

    def foreign_names(self, config: ModelConfig) -> Iterator[tuple[str, Rule, int | None]]:
        """Each tensor of a checkpoint, with its rule and its layer, None for all or none."""
        own = parameter_shapes(config)
        for rule in self.rules:
            if rule.own not in own:
                continue
            if "{layer}" in rule.foreign:
                for layer in range(config.n_layers):
                    yield rule.foreign.format(layer=layer), rule, layer
            else:
                yield rule.foreign, rule, None

    def tied_head(self, config: ModelConfig) -> str | None:
        """The layout's name of the output head, if that is the embedding."""
        if not config.tie_embeddings:
            return None
        return next((rule.foreign for rule in self.rules if rule.own == "head"), None)

    def source(self, description: Description, files: TensorFiles, origin: str) -> "LayoutSource":
        """The parameters in open files.

        Raises:
          CheckpointError: that lists all tensors that are missing, extra or misshapen, with the
            expected and the found shape, and buffers and tied heads that say something else.
        """
        config = description.model
        files = self.split(files)
        buffers, head = self.buffers(config), self.tied_head(config)
        expected = {
            name: _foreign_shape(rule, layer, config)
            for name, rule, layer in self.foreign_names(config)
        }
        optional = {name: value.shape for name, value in buffers.items()}
        if head is not None:
            optional[head] = (config.vocab_size, config.d_model)
        wrong = []
        for name in sorted(expected | optional | dict.fromkeys(files.infos, None)):
            needed = expected.get(name, optional.get(name, "nothing"))
            found = files.infos[name].shape if name in files.infos else "nothing"
            if found != needed and not (found == "nothing" and name in optional):
                wrong.append(f"{name}: {needed} is expected, {found} is there")
        if not wrong:
            wrong = [
                f"{name}: its values are not those that the config gives, {_brief(value)}"
                for name, value in buffers.items()
                if name in files.infos and not _near(files.read(name), value)
            ]
            embedding = next(rule.foreign for rule in self.rules if rule.own == "embedding")
            if head in files.infos and not np.array_equal(files.read(head), files.read(embedding)):
                wrong.append(f"{head}: differs from {embedding}, but the config ties them")
        if wrong:
            raise CheckpointError(
                f"{origin} does not hold the {self.name} model that its config describes:\n  "
                + "\n  ".join(wrong)
            )
        return LayoutSource(self, description, files)

    def tensors(self, source: Source, dtype: np.dtype | None) -> list[TensorToWrite]:
        """All tensors of a checkpoint in this layout, each read when it is written.

        Args:
          source: the parameters.
          dtype: of all but the buffers; None: as the source has them.
        """
        config = source.description.model
        tensors = []
        for name, rule, layer in self.foreign_names(config):
            tensors.append(self._tensor(name, rule, layer, source, dtype))
        head = self.tied_head(config)
        if head is not None and self.writes_tied_head:
            tensors.append(self._tensor(head, Rule("embedding", head), None, source, dtype))
        for name, value in self.buffers(config).items():
            tensors.append(TensorToWrite(name, TensorInfo(value.shape, value.dtype), [value]))
        return tensors

    def _tensor(
        self, name: str, rule: Rule, layer: int | None, source: Source, dtype: np.dtype | None
    ) -> TensorToWrite:
        config = source.description.model
        stacked = rule.own.startswith("layers/") and layer is None
        info = source.info(rule.own, 0 if stacked else layer)
        info = TensorInfo(_foreign_shape(rule, layer, config), dtype or info.dtype)
        layers = range(config.n_layers) if stacked else [layer]
        return TensorToWrite(name, info, _Pieces(source, rule, layers, info.dtype))


@dataclass(frozen=True)
class _Pieces:
    """A tensor, read layer by layer when it is iterated over."""

    source: Source
    rule: Rule
    layers: Iterable[int | None]
    dtype: np.dtype

    def __iter__(self) -> Iterator[np.ndarray]:
        for layer in self.layers:
            array = self.source.read(self.rule.own, layer)
            yield self._rounded(array.T if self.rule.transposed else array)

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = array.astype(self.dtype, copy=False)
        too_large = array.dtype != self.dtype and np.isinf(rounded) & np.isfinite(array)
        if np.any(too_large):
            raise CheckpointError(
                f"{self.rule.own}: {np.abs(array[too_large]).max():g} is too large for "
                f"{self.dtype.name}; nothing is written: bfloat16 and float32 have more room"
            )
        return rounded


@dataclass(frozen=True)
class LayoutSource:
    """The parameters of a checkpoint; made by `Layout.source`."""

    layout: Layout
    description: Description
    files: TensorFiles

    def info(self, own: str, layer: int | None) -> TensorInfo:
        name, _ = self._place(own, layer)
        return TensorInfo(
            parameter_shape(self.description.model, own, layer), self.files.infos[name].dtype
        )

    def read(self, own: str, layer: int | None) -> np.ndarray:
        name, rule = self._place(own, layer)
        if "{layer}" in rule.foreign or layer is None:
            array = self.files.read(name)
        else:
            array = self.files.read(name, slice(layer, layer + 1))[0]
        return array.T if rule.transposed else array

    def _place(self, own: str, layer: int | None) -> tuple[str, Rule]:
        for rule in self.layout.rules:
            name = rule.foreign.format(layer=layer)
            if rule.own == own and name in self.files.infos:
                return name, rule
        raise KeyError(own)


def config_values(directory: AnyPath, files: TensorFiles | None = None) -> dict[str, Any]:
    """What `config.json` says, or fairseq's options inside a PyTorch file that has no such file.

    Raises:
      ConfigError: if there is no config, or it is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        inside = getattr(files, "options", None)
        if inside is None:
            raise ConfigError(
                f"{path} does not exist; it holds the model's sizes: Hugging Face's config.json, "
                "or for torchscale the keywords of its RetNetConfig"
            )
        return inside
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not an object of fields")
    # Records of experiments have a model's options one level down.
    return values.get("retnet_config") or values.get("given") or values


def check_exact(
    layout: str, config: ModelConfig, expected: Mapping[str, Any], reasons: Mapping[str, str]
) -> None:
    """Raises `ConfigError` unless the model has the values that a layout cannot say otherwise.

    Args:
      layout: its name.
      config: the model.
      expected: fields of the config, and the value that all models of the layout have.
      reasons: why no parameters could make up for another value, for the fields that need it said.
    """
    config.check()
    if config.mixer != "retention":
        kind = "a Transformer" if config.mixer == "attention" else config.mixer
        raise ConfigError(f"{layout} holds RetNets; this is {kind} (model.mixer)")
    wrong = [
        f"model.{name} is {getattr(config, name)!r}, {layout} has {value!r}"
        + (f": {reasons[name]}" if name in reasons else "")
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise ConfigError(
            f"this model cannot be written as {layout} with the same outputs:\n  "
            + "\n  ".join(wrong)
        )


def refuse_features(layout: str, found: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Raises `ConfigError` for features this project does not have.

    Args:
      layout: its name.
      found: a checkpoint's config.
      allowed: for each field, what the feature is called, and the values that do without it.
    """
    wrong = [
        f"{name}={found[name]!r}: {feature}"
        for name, (feature, *values) in allowed.items()
        if name in found and found[name] not in values
    ]
    if wrong:
        raise ConfigError(
            f"config.json asks for what this project does not have in a {layout} model:\n  "
            + "\n  ".join(wrong)
        )


def check_types(layout: str, found: Mapping[str, Any], expected: Mapping[type, str]) -> None:
    """Raises `ConfigError` for values of another type than the fields have.

    Args:
      layout: its name.
      found: a checkpoint's config.
      expected: for int, float and bool the names of the fields; a float may be written as an int.
    """
    wrong = [
        f"{name}={found[name]!r} is no {kind.__name__}"
        for kind, names in expected.items()
        for name in names.split()
        if name in found and type(found[name]) not in ((int, float) if kind is float else (kind,))
    ]
    if wrong:
        raise ConfigError(f"config.json is not that of a {layout} model:\n  " + "\n  ".join(wrong))


def _foreign_shape(rule: Rule, layer: int | None, config: ModelConfig) -> tuple[int, ...]:
    shape = parameter_shape(config, rule.own, layer)
    return shape[::-1] if rule.transposed else shape


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    tolerance = 1e-5 if found.dtype.itemsize >= 4 else 1e-2
    return np.allclose(found.astype(np.float64), expected, rtol=tolerance, atol=tolerance * 1e-3)


def _brief(values: np.ndarray) -> str:
    return np.array2string(values, threshold=4, precision=6)
