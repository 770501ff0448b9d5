"""The text of `--help`: how a program is called, its flags by group, every option of a config."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from retnet_jax.config import Config
from retnet_jax.config_text import option_help

_WIDTH = 100


def help_text(
    description: str, groups: Iterable[tuple[str, Sequence[str]]], config: Config | None
) -> str:
    """The text of `--help`.

    Args:
      description: what the program does and how it is called.
      groups: titles, and the names of the flags in each.
      config: whose values are shown, if the command line names one.
    """
    lines = [description.strip()]
    for title, names in groups:
        lines += ["", f"{title}:"]
        for name in names:
            lines += _flag_lines(flags.FLAGS[name])
    if "config" in flags.FLAGS:
        lines += ["", "Options of the config, each as --config.NAME=VALUE", *option_help(config)]
    return "\n".join(lines)


def _flag_lines(flag: flags.Flag) -> Iterator[str]:
    kind = flag.flag_type()
    choices = getattr(flag.parser, "enum_values", None)
    if kind == "bool":
        value = ""
    elif choices is not None:
        value = f"={'|'.join(choices)}"
    elif flag.name == "config":
        value = "=FILE[:ARGUMENT]"
    else:
        value = f"={_PLACEHOLDERS.get(kind, 'TEXT')}"
    # Without what absl adds.
    text = flag.help.split(";\n    repeat this option")[0].removeprefix(f"<{value[1:]}>: ")
    yield f"  --{flag.name}{value}{_default(flag)}"
    yield from textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")


_PLACEHOLDERS = {"int": "N", "float": "X", "comma separated list of strings": "A,B,..."}


def _default(flag: flags.Flag) -> str:
    if flag.default is None or flag.default in ("", []) or flag.flag_type() == "bool":
        return ""
    values = flag.default if isinstance(flag.default, list) else [flag.default]
    return f" (default {','.join(map(str, values))})"
