"""Configs as JSON, and what tells two of them apart."""

import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import Any

from retnet_jax.config import Config
from retnet_jax.errors import ConfigError


def to_json(config: Config) -> str:
    """The JSON text that `config_from_json` reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str, origin: str | Path = "config") -> Config:
    """Reads what `to_json` wrote; `origin` names the text in errors.

    Raises:
      ConfigError: for text that is no JSON object, and for an unknown or mistyped field.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin} is not valid JSON: {error}") from None
    return _from_dict(Config, values, path="", origin=str(origin))


def read_config(path: Path) -> Config:
    """The checked config in a file such as `workdir/config.json`.

    Raises:
      ConfigError: if there is no such file, and as `config_from_json` and `Config.check`.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: {path.parent} is not the --workdir of a training run"
        )
    config = config_from_json(path.read_text(), origin=path)
    config.check()
    return config


def differences(old: Config, new: Config) -> list[str]:
    """One line, `model.d_model: 128 -> 256`, for each field in which two configs differ."""
    old_values, new_values = flatten(old), flatten(new)
    return [
        f"{name}: {old_values[name]!r} -> {new_values[name]!r}"
        for name in old_values
        if old_values[name] != new_values[name]
    ]


def check_field(path: str) -> None:
    """Raises `ConfigError` if `path`, such as "train.steps", names no field of a `Config`."""
    known = flatten(Config())
    if path not in known:
        raise ConfigError(f"config.{path}: no such field{_suggestion(path, list(known))}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of all fields, by names such as "train.steps"."""
    flat: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{option.name}.")
        else:
            flat[prefix + option.name] = value
    return flat


def _from_dict(kind: type, values: Any, path: str, origin: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: {path or 'the whole'} is {values!r}, not an object of fields")
    types = typing.get_type_hints(kind)
    filled = {}
    for name, value in values.items():
        if name not in types:
            raise ConfigError(
                f"{origin}: {path}{name}: no such field{_suggestion(name, list(types))}"
            )
        if dataclasses.is_dataclass(types[name]):
            filled[name] = _from_dict(types[name], value, f"{path}{name}.", origin)
        else:
            filled[name] = _typed(value, types[name], f"{origin}: {path}{name}")
    return kind(**filled)


def _typed(value: Any, expected: Any, where: str) -> Any:
    """`value` as `expected`, the declared type of a field; JSON has no tuples and one number."""
    if typing.get_origin(expected) is dict and isinstance(value, dict):
        of_keys, of_values = typing.get_args(expected)
        return {
            _typed(k, of_keys, where): _typed(v, of_values, f"{where}[{k!r}]")
            for k, v in value.items()
        }
    plain = typing.get_origin(expected) in (tuple, dict)
    choices = () if plain else typing.get_args(expected)
    for choice in choices or (expected,):
        if choice is type(None) and value is None:
            return None
        if typing.get_origin(choice) is tuple and isinstance(value, list | tuple):
            types = typing.get_args(choice)
            if types[-1] is Ellipsis:
                types = types[:1] * len(value)
            return tuple(_typed(v, t, where) for v, t in zip(value, types, strict=True))
        if choice is float and type(value) in (int, float):
            return float(value)
        if type(value) is choice:
            return value
    shown = expected.__name__ if isinstance(expected, type) else expected
    raise ConfigError(f"{where}={value!r} is not of type {shown}")


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are {', '.join(known)}"
