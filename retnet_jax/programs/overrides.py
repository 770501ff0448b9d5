"""Options of a config on the command line: --config.SECTION.FIELD=VALUE.

A value is parsed by the declared type of its field: `py,c` or `('py', 'c')` for a tuple, `1/32` for
a number, `None` where a field may be None. ml_collections, which loads the config's file, cannot do
this: it parses values as Python and takes `py,c` for a single extension.
"""

import ast
import re
import typing
from collections.abc import Sequence
from typing import Any

from retnet_jax.config import Config
from retnet_jax.config.as_json import check_option, options
from retnet_jax.config.attention import attention_layers_from_text
from retnet_jax.errors import ConfigError

_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(=.*)?", re.DOTALL)


def taken_out(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Splits a command line into its other arguments, and the names and values of config options.

    Raises:
      ConfigError: for an unknown option, and for a value that is not of its type.
    """
    rest, found, waiting = [], [], iter(arguments)
    for argument in waiting:
        match = _OVERRIDE.fullmatch(argument)
        if argument == "--":  # arguments after it are not flags
            rest += [argument, *waiting]
        elif match is None:
            rest.append(argument)
        else:
            negated, name, value = match.groups()
            check_option(name)
            if options()[name].type is bool and value is None:
                value = f"={not negated}"
            elif negated:
                raise ConfigError(
                    f"{argument}: only an option that is true or false can be negated"
                )
            if value is None and (value := next(waiting, None)) is None:
                raise ConfigError(f"--config.{name} needs a value: --config.{name}=VALUE")
            found.append((name, option_from_text(name, value.removeprefix("="))))
    return rest, found


def apply(config: Config, overrides: Sequence[tuple[str, Any]]) -> None:
    """Sets options of a config; the values of a tuple given several times are concatenated."""
    given: dict[str, Any] = {}
    for name, value in overrides:
        several = isinstance(value, tuple) and name in given
        given[name] = given[name] + value if several else value
    for name, value in given.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(config, section) if section else config, field, value)


def option_from_text(name: str, text: str) -> Any:
    """The value of an option such as "model.key_dim", parsed from the command line's text.

    Raises:
      ConfigError: for a text that is no value of the option's type.
    """
    field = options()[name]
    kinds: tuple[Any, ...] = (
        typing.get_args(field.type) if _is_optional(field.type) else (field.type,)
    )
    if type(None) in kinds and text.strip().lower() in ("none", "null", ""):
        return None
    (kind,) = (kind for kind in kinds if kind is not type(None))
    if kind is str and text == "None" and field.default == "":
        return ""
    try:
        if typing.get_origin(kind) is dict:
            return shares_from_text(text)
        if name == "model.attention_layers":
            return attention_layers_from_text(_unquoted(text))
        if typing.get_origin(kind) is tuple:
            return _tuple_from_text(text, typing.get_args(kind))
        return _scalar_from_text(text, kind)
    except ValueError as error:
        raise ConfigError(f"--config.{name}={text}: {error}") from None


def shares_from_text(text: str) -> dict[str, float]:
    """Stores of a mixture and their shares: data/pile:0.6,data/c4:0.4, or {'data/pile': 0.6}."""
    inside, shares = text.strip(), {}
    if inside.startswith("{") and inside.endswith("}"):
        inside = inside[1:-1]
    for part in inside.split(",") if inside else []:
        name, _, share = part.rpartition(":")
        try:
            shares[_unquoted(name)] = float(share)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"expected STORE:SHARE such as data/pile:0.6, got {part!r}")
    return shares


def _tuple_from_text(text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    inside = text.strip()
    if inside[:1] + inside[-1:] in ("()", "[]"):
        inside = inside[1:-1].strip()
    if inside in ("", "None"):
        return ()
    parts = [part.strip() for part in inside.removesuffix(",").split(",")]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(parts)
    if len(parts) != len(kinds):
        raise ValueError(f"{len(kinds)} values are needed, such as 1/32,1/512")
    return tuple(_scalar_from_text(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _scalar_from_text(text: str, kind: type) -> Any:
    if kind is str:
        return _unquoted(text)
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() in _TRUE
    if kind is int:
        return _integer(text)
    above, divided, below = text.partition("/")
    try:
        return float(above) / float(below) if divided else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is no number, such as 0.03 or 1/32") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)  # 1e6
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text!r} is no integer, such as 8; several are written with commas, 8,9")


def _unquoted(text: str) -> str:
    """A text without the quotes that it may have as in Python: 'py'."""
    text = text.strip() if text.strip()[:1] in ("'", '"') else text
    if len(text) > 1 and text[0] == text[-1] and text[0] in ("'", '"'):
        try:
            return str(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            return text
    return text


def _is_optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)
