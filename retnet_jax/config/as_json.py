"""Configs as JSON, and the differences between two configs."""

import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_jax.config.run import Config
from retnet_jax.errors import ConfigError

if TYPE_CHECKING:
    from etils import epath  # only for types: options need no library for storage

# Old names of options, which old configs may have.
OLD_NAMES: dict[str, str] = {
    "data.skip_steps": "data.skip_batches",
    "train.most_skipped": "train.max_skipped",
}


def to_json(config: Config) -> str:
    """A config as JSON text, which `config_from_json` reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def config_from_json(text: str, origin: "str | Path | epath.Path" = "config") -> Config:
    """Reads the text of `to_json`; `origin` names the text in error messages.

    Raises:
      ConfigError: for text that is not a JSON object, and for an unknown or mistyped field.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of 4,301 digits, deep nesting
        raise ConfigError(f"{origin} is not valid JSON: {error}") from None
    return _from_dict(Config, values, path="", origin=str(origin))


def read_config(path: "Path | epath.Path") -> Config:
    """Reads and checks the config in a file such as `workdir/config.json`.

    Raises:
      ConfigError: if there is no such file, and as `config_from_json` and `Config.check`.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: {path.parent} is not the --workdir of a training run"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    config = config_from_json(text, origin=path)
    config.check()
    return config


def config_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The options in which two configs differ: name -> (old value, new value)."""
    old_values, new_values = flatten(old), flatten(new)
    return {
        name: (value, new_values[name])
        for name, value in old_values.items()
        if value != new_values[name]
    }


def check_option(name: str) -> None:
    """Raises `ConfigError` if there is no option with a name such as "train.steps"."""
    known = options()
    if name in OLD_NAMES:
        raise ConfigError(f"config.{name} was renamed: use config.{OLD_NAMES[name]}")
    if name not in known:
        raise ConfigError(f"config.{name}: no such field{_suggestion(name, list(known))}")


def options(kind: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """The fields of all options, by names such as "train.steps", with the metadata of `option`."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= options(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field
    return found


def marked(mark: str) -> list[str]:
    """The names of the options with a mark of `option`, such as "changeable" or "in_store"."""
    return [name for name, field in options().items() if field.metadata.get(mark)]


def flatten(config: Config) -> dict[str, Any]:
    """The values of all options, by name."""
    values = {}
    for name in options():
        section, _, rest = name.rpartition(".")
        values[name] = getattr(getattr(config, section) if section else config, rest)
    return values


def _from_dict(kind: type, values: Any, path: str, origin: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: {path or 'the whole'} is {values!r}, not an object of fields")
    types = typing.get_type_hints(kind)
    filled = {}
    for name, value in values.items():
        full: str = path + name
        name = OLD_NAMES.get(full, full).removeprefix(path)
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
    """A JSON value as the declared type of its field: lists as tuples, integers as floats."""
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
            if len(types) != len(value):
                raise ConfigError(f"{where}={value!r}: {len(types)} values are needed")
            return tuple(_typed(v, t, where) for v, t in zip(value, types, strict=True))
        if dataclasses.is_dataclass(choice) and isinstance(value, dict):
            path, _, name = where.rpartition(": ")
            return _from_dict(choice, value, f"{name}.", path)  # pyright: ignore[reportArgumentType]
        if choice is float and type(value) in (int, float):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"{where} is an integer of {value.bit_length()} bits") from None
        if type(value) is choice:
            return value
    shown = expected.__name__ if isinstance(expected, type) else expected
    raise ConfigError(f"{where}={value!r} is not of type {shown}")


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; the fields are {', '.join(known)}"
