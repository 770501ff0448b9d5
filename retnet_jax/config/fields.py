"""The fields that sections of a config consist of: options with their help, and checks."""

import dataclasses
import types
import typing
from typing import Any

from retnet_jax.errors import ConfigError
from retnet_jax.own_objects import is_own

# On devices, floats are float32.
_FLOAT32_MOST = (2 - 2**-23) * 2.0**127
_FLOAT32_LEAST = 2.0**-126  # the smallest normal number; smaller ones are flushed to 0


def option(
    default: Any,
    text: str,
    *,
    changeable: bool = False,
    in_store: bool = False,
    computation: bool = False,
    foreign: bool = False,
) -> Any:
    """A field of a config.

    Args:
      default: Default value.
      text: One line of help, which `--help` prints.
      changeable: Whether a run may be resumed with another value.
      in_store: Whether the contents of a token store depend on it.
      computation: Whether it determines only how a model is computed or trained, not which
        function it is: a run that starts from a trained model (`init_from`) has its own value.
      foreign: Whether only checkpoints of other implementations need it.
    """
    marks = {
        "changeable": changeable,
        "in_store": in_store,
        "computation": computation,
        "foreign": foreign,
    }
    return dataclasses.field(default=default, metadata={"help": text} | marks)


def check_values(section: str, values: Any) -> None:
    """Raises `ConfigError` for an option of the wrong type, or a number that is not finite.

    After it no other check or computation meets a nan, an infinite number or a text for a number.
    """
    for each in dataclasses.fields(values):
        check_value(f"{section}.{each.name}", getattr(values, each.name), each.type)


def check_value(name: str, value: Any, kind: Any) -> None:
    """As `check_values`, for one option and its declared type."""
    parts = typing.get_args(kind)
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{name} is an integer of {value.bit_length()} bits, more than 63")
    elif typing.get_origin(kind) is tuple and isinstance(value, tuple):
        for place, part in enumerate(value):
            check_value(f"{name}[{place}]", part, parts[0])
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
        for key, part in value.items():
            check_value(f"a name in {name}", key, parts[0])
            check_value(f"{name}[{key!r}]", part, parts[1])
    elif not any(_is_of_type(value, each) for each in _alternatives(kind)):
        shown = kind.__name__ if isinstance(kind, type) else kind
        raise ConfigError(f"{name}={value!r} is not of type {shown}, but of {type(value).__name__}")
    elif isinstance(value, float) and not abs(value) <= _FLOAT32_MOST:
        raise ConfigError(f"{name}={value} is not a finite number in float32")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value has a type. An int is also a float, but a bool is not an int."""
    if typing.get_origin(kind) is not None:  # the type is a tuple or dict, the value is not
        return False
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_choice(name: str, value: str, choices: tuple[str, ...], own: bool = False) -> None:
    """Raises `ConfigError` if a value is not a choice. With `own`, "module:object" is one too."""
    if value not in choices and not (own and is_own(value)):
        raise ConfigError(
            f"{name}={value!r} is not one of {', '.join(map(repr, choices))}"
            + (", or a 'module:object' of your own" if own else "")
        )


def check_at_least(name: str, value: float, least: int) -> None:
    """Raises `ConfigError` if a value is less than `least`."""
    if value < least:
        raise ConfigError(f"{name}={value} is less than {least}")


def check_at_most(name: str, value: int, most: int) -> None:
    """Raises `ConfigError` if a value is more than `most`."""
    if value > most:
        raise ConfigError(f"{name}={value} is more than {most}")


def check_positive(name: str, value: float) -> None:
    """Raises `ConfigError` if a value is not greater than 0 in float32."""
    if not value > 0:
        raise ConfigError(f"{name}={value} is not greater than 0")
    if value < _FLOAT32_LEAST:
        raise ConfigError(f"{name}={value} is 0 in float32, whose smallest number is 1.2e-38")


def check_rate(name: str, value: float) -> None:
    """Raises `ConfigError` if a value is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(
            f"{name}={value} is not in [0, 1): 0 drops nothing, 0.1 one number in ten"
        )


def nearest_multiples(value: int, factor: int) -> str:
    """The multiples of `factor` around a value, for an error message."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else f"{factor}"
