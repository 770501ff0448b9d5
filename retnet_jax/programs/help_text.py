"""The text of `--help`: the program's description, its flags by group, all options of a config."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from absl import flags

from retnet_jax.config import Config
from retnet_jax.config.as_text import option_help

_WIDTH = 100


def help_text(
    description: str, groups: Iterable[tuple[str, Sequence[str]]], config: Config | None
) -> str:
    """The text of `--help`.

    Args:
      description: Text on what the program does and how to call it.
      groups: Title and names of the flags of each group.
      config: Config whose values are shown; None: the defaults.
    """
    lines = [description.strip()]
    for title, names in groups:
        lines += ["", f"{title}:"]
        for name in names:
            lines += _flag_lines(flags.FLAGS[name])
    if "config" in flags.FLAGS:
        lines += ["", "Options of the config, set by --config.NAME=VALUE:", *option_help(config)]
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
    # Without the text that absl adds.
    text = flag.help.split(";\n    repeat this option")[0].removeprefix(f"<{value[1:]}>: ")
    yield f"  --{flag.name}{value}{_default(flag)}"
    yield from textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")


_PLACEHOLDERS = {"int": "N", "float": "X", "comma separated list of strings": "A,B,..."}


def _default(flag: flags.Flag) -> str:
    if flag.default is None or flag.default in ("", []) or flag.flag_type() == "bool":
        return ""
    values = flag.default if isinstance(flag.default, list) else [flag.default]
    return f" (default {','.join(map(str, values))})"
