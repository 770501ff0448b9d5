"""A layout: the names, shapes and config with which another implementation stores a RetNet.

Import and export use the same table of `Rule`s, so they are inverses by construction. Parameters
are named as in this project, such as `layers/mixer/q/kernel`, and read one layer at a time.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from retnet_jax.interop.rules import Rule
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
class Layout:
    """The checkpoint format of another implementation, or of this project.

    Attributes:
      name: Name in messages and on the command line.
      rules: The table. Rules for parameters that a model does not have are skipped.
      read_config: Maps a checkpoint's config and its tensors to a description. Raises
        `ConfigError` for features that this project does not have.
      write_config: Maps a description to a checkpoint's config. Raises `ConfigError` with the
        reasons if the layout cannot express the model.
      buffers: Tensors that follow from the config; they are checked when read.
      writes_tied_head: Whether an output head that is tied to the embedding is written too.
      split: Splits and renames the joined tensors of older checkpoints.
      ignored: What the implementation drops when it loads such a model, so that it computes
        something else; None: nothing.
    """

    name: str
    rules: tuple[Rule, ...]
    read_config: Callable[[dict[str, Any], Mapping[str, TensorInfo]], Description]
    write_config: Callable[[Description], dict[str, Any]]
    buffers: Callable[[ModelConfig], dict[str, np.ndarray]] = lambda _: {}
    writes_tied_head: bool = False
    split: Callable[[TensorFiles], TensorFiles] = lambda files: files
    ignored: Callable[[ModelConfig], str | None] = lambda _: None

    def load(
        self, directory: str | Path, mesh: Mesh | None = None, **changes: Any
    ) -> LanguageModel:
        """Loads the model in a directory of this layout.

        Args:
          directory: Directory with config.json and weights.
          mesh: Devices for the parameters, sharded as in training; None: the first device.
          changes: Fields of `ModelConfig` that change no parameter, such as dtype="bfloat16".

        Raises:
          ConfigError: for a config that this project cannot compute, and for invalid changes.
          CheckpointError: for weights that are missing, damaged, or do not fit the config.
        """
        path = epath.Path(directory)
        return load_model(self.open(path, open_tensor_files(path)), mesh, **changes)

    def save(
        self,
        model: LanguageModel,
        directory: str | Path,
        **options: Any,
    ) -> None:
        """Saves a model to a directory in this layout.

        Args:
          model: Model to save.
          directory: Target; must not exist, or be empty.
          options: Further options of `write`.

        Raises:
          ConfigError: if this layout cannot express the model.
          CheckpointError: if the directory is not empty, or the disk is full.
        """
        self.write(ModelSource(model), directory, **options)

    def open(self, directory: AnyPath, files: TensorFiles) -> "LayoutSource":
        """The parameters in a directory, given its open weights files; raises as `load`."""
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
        fla_ignores_conv: bool = False,
    ) -> None:
        """Writes the parameters of a source to a directory in this layout, one by one.

        Args:
          source: Source of the parameters.
          directory: Target on a local disk; must not exist, or be empty. It appears when complete.
          description: Description to write instead of the source's own, for example with `bos_id`.
          dtype: Dtype of the parameters, "float32", "float16" or "bfloat16"; None: the source's.
          max_file_bytes: Largest size of a safetensors file; a larger model is split into several.
          torch_file: Whether to write one PyTorch file as fairseq's instead, from memory.
          fla_ignores_conv: Whether to write a model with convolutions for fla, which drops them.
            Then a README.md in the directory says so.

        Raises:
          As `save`.
        """
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype={dtype!r} is not one of float32, float16, bfloat16")
        if is_remote(directory):
            raise ConfigError(
                f"{directory} is not on a local disk: write to a local directory, and copy it "
                "there afterwards"
            )
        directory = Path(directory)
        values = self.write_config(description or source.description)
        ignored = self.ignored(source.description.model)
        if ignored is not None and not fla_ignores_conv:
            raise ConfigError(
                f"{ignored}\n  fla_ignores_conv=True (--fla_ignores_conv) writes it all the same, "
                "for programs that use these weights, as this project does"
            )
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
            if ignored is not None:
                (unfinished / "README.md").write_text(f"# A RetNet\n\n{ignored}\n")

    def foreign_names(self, config: ModelConfig) -> Iterator[tuple[str, Rule, int | None]]:
        """The name of each tensor, its rule, and its layer (None: not a tensor of one layer)."""
        own = parameter_shapes(config)
        for rule in self.rules_of(config):
            if rule.own not in own or not rule.when(config):
                continue
            if "{layer}" in rule.foreign:
                for layer in range(own[rule.own][0]):
                    yield rule.foreign_name(layer), rule, layer
            else:
                yield rule.foreign, rule, None

    def rules_of(self, config: ModelConfig) -> tuple[Rule, ...]:
        """The table for a model: in a hybrid each place of the period has its own parameters."""
        if not config.attention_layers:
            return self.rules
        period = config.layer_period
        rules = []
        for rule in self.rules:
            if "{layer}" not in rule.foreign:
                rules.append(rule)
                continue
            for place in range(period):
                own = rule.own.replace("layers/", f"layers/{place}/", 1)
                rules.append(replace(rule, own=own, first=place, step=period))
        return tuple(rules)

    def tied_head(self, config: ModelConfig) -> str | None:
        """The layout's name of the output head if it is tied to the embedding, else None."""
        if not config.tie_embeddings:
            return None
        return next((rule.foreign for rule in self.rules if rule.own == "head"), None)

    def source(self, description: Description, files: TensorFiles, origin: str) -> "LayoutSource":
        """The parameters in open files.

        Raises:
          CheckpointError: for tensors that are missing, extra or of the wrong shape, listing all
            of them; and for buffers and tied heads that contradict the config.
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
                wrong.append(f"{name}: expected {needed}, found {found}")
        if not wrong:
            wrong = [
                f"{name}: expected the values that follow from the config, {_brief(value)}"
                for name, value in buffers.items()
                if name in files.infos and not _near(files.read(name), value)
            ]
            embedding = next(rule.foreign for rule in self.rules if rule.own == "embedding")
            if head in files.infos and not np.array_equal(files.read(head), files.read(embedding)):
                wrong.append(f"{head}: differs from {embedding}, but the config ties them")
        if wrong:
            raise CheckpointError(
                f"{origin}: the tensors are not those of the {self.name} model in its config:\n  "
                + "\n  ".join(wrong)
            )
        return LayoutSource(self, description, files)

    def tensors(self, source: Source, dtype: np.dtype | None) -> list[TensorToWrite]:
        """All tensors of a checkpoint in this layout; each is read when it is written.

        Args:
          source: Source of the parameters.
          dtype: Dtype of all tensors except buffers; None: the source's.
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
        layers = range(parameter_shape(config, rule.own, None)[0]) if stacked else [layer]
        return TensorToWrite(name, info, _Pieces(source, rule, layers, info.dtype))


@dataclass(frozen=True)
class _Pieces:
    """The pieces of a tensor, read from the source layer by layer."""

    source: Source
    rule: Rule
    layers: Iterable[int | None]
    dtype: np.dtype

    def __iter__(self) -> Iterator[np.ndarray]:
        for layer in self.layers:
            array = self.source.read(self.rule.own, layer)
            yield self._rounded(self.rule.to_foreign(array))

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = array.astype(self.dtype, copy=False)
        too_large = array.dtype != self.dtype and np.isinf(rounded) & np.isfinite(array)
        if np.any(too_large):
            raise CheckpointError(
                f"{self.rule.own}: {np.abs(array[too_large]).max():g} is too large for "
                f"{self.dtype.name}; nothing was written: bfloat16 and float32 have a larger range"
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
        return rule.to_own(array)

    def _place(self, own: str, layer: int | None) -> tuple[str, Rule]:
        for rule in self.layout.rules_of(self.description.model):
            name = rule.foreign_name(layer)
            if rule.own == own and name in self.files.infos:
                return name, rule
        raise KeyError(own)


def config_values(directory: AnyPath, files: TensorFiles | None = None) -> dict[str, Any]:
    """The values in `config.json`; if there is none, fairseq's options in a PyTorch file.

    Raises:
      ConfigError: if there is no config, or it is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        inside = getattr(files, "options", None)
        if inside is None:
            raise ConfigError(
                f"{path} does not exist; it must hold the model's sizes: Hugging Face's "
                "config.json, or for torchscale the keywords of its RetNetConfig"
            )
        return inside
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not an object of fields")
    # Records of experiments nest a model's options.
    return values.get("retnet_config") or values.get("given") or values


def check_exact(
    layout: str, config: ModelConfig, expected: Mapping[str, Any], reasons: Mapping[str, str]
) -> None:
    """Raises `ConfigError` unless a model has the values that a layout takes for granted.

    Args:
      layout: Name of the layout.
      config: Config of the model.
      expected: Fields of the config, and the value that all models of the layout have.
      reasons: For some of these fields, why a model with another value cannot be converted.
    """
    config.check()
    if config.mixer != "retention":
        kind = "a Transformer" if config.mixer == "attention" else config.mixer
        raise ConfigError(f"{layout} holds RetNets; this is {kind} (model.mixer)")
    if config.attention_layers and layout != "fla":
        raise ConfigError(f"{layout} has no attention layers; this is a hybrid (attention_layers)")
    wrong = [
        f"model.{name} is {getattr(config, name)!r}, {layout} has {value!r}"
        + (f": {reasons[name]}" if name in reasons else "")
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise ConfigError(
            f"{layout} cannot express this model with the same outputs:\n  "
            + "\n  ".join(wrong)
            + "\nthe layout own holds every model; retnet_jax/interop/presets.py has the options "
            f"of models that {layout} can express"
        )


def refuse_features(layout: str, found: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    """Raises `ConfigError` for features this project does not have.

    Args:
      layout: Name of the layout.
      found: Values of a checkpoint's config.
      allowed: For each field, the name of the feature, and the values that turn it off.
    """
    wrong = [
        f"{name}={found[name]!r}: {feature}"
        for name, (feature, *values) in allowed.items()
        if name in found and found[name] not in values
    ]
    if wrong:
        raise ConfigError(
            f"config.json of a {layout} model has features that this project does not have:\n  "
            + "\n  ".join(wrong)
        )


def check_types(layout: str, found: Mapping[str, Any], expected: Mapping[type, str]) -> None:
    """Raises `ConfigError` for values of the wrong type.

    Args:
      layout: Name of the layout.
      found: Values of a checkpoint's config.
      expected: Names of the fields of each type: int, float (an int will do), bool and str.
    """
    wrong = [
        f"{name}={found[name]!r} is no {kind.__name__}"
        for kind, names in expected.items()
        for name in names.split()
        if name in found and type(found[name]) not in ((int, float) if kind is float else (kind,))
    ]
    if wrong:
        raise ConfigError(
            f"config.json of a {layout} model has values of the wrong type:\n  "
            + "\n  ".join(wrong)
        )


def _foreign_shape(rule: Rule, layer: int | None, config: ModelConfig) -> tuple[int, ...]:
    return rule.foreign_shape(parameter_shape(config, rule.own, layer))


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    tolerance = 1e-5 if found.dtype.itemsize >= 4 else 1e-2
    return np.allclose(found.astype(np.float64), expected, rtol=tolerance, atol=tolerance * 1e-3)


def _brief(values: np.ndarray) -> str:
    return np.array2string(values, threshold=4, precision=6)
