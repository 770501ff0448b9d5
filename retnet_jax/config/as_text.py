"""Configs as text to read: the list of options in `--help`, and the summary of a run's config."""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from retnet_jax.config.as_json import flatten, options
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.config.run import Config


def option_help(config: Config | None = None, width: int = 100) -> Iterator[str]:
    """Lines that list every option by section: name, value, help.

    Args:
      config: Config whose values are shown, with the default where it differs; None: the defaults.
      width: Width of a line.
    """
    defaults = flatten(Config())
    values = defaults if config is None else flatten(config)
    section, foreign = None, False
    for name, field in options().items():
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            yield f"\n{_section_title(section)}"
        if field.metadata.get("foreign") and not foreign:
            yield f"\n{section}, only for checkpoints of other implementations:"
        foreign = field.metadata.get("foreign", False)
        default = "" if values[name] == defaults[name] else f"  (default {_shown(defaults[name])})"
        yield f"  {name} = {_shown(values[name])}{default}"
        resumable = ". May change when a run is resumed" if field.metadata.get("changeable") else ""
        yield from textwrap.wrap(
            field.metadata["help"] + resumable,
            width,
            initial_indent="      ",
            subsequent_indent="      ",
        )


def summary(config: Config, width: int = 100) -> str:
    """All values in a few lines, one section each. * marks values that are not the default."""
    defaults, sections = flatten(Config()), {}
    for name, value in flatten(config).items():
        section, _, field = name.rpartition(".")
        mark = "" if value == defaults[name] else "*"
        # So that lines are not broken inside a value.
        shown = f"{mark}{field}={_shown(value)}".replace(" ", "\0")
        sections.setdefault(section or "config", []).append(shown)
    paragraphs = (
        textwrap.fill(
            f"{section}: {' '.join(shown)}",
            width,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for section, shown in sections.items()
    )
    return "\n".join(paragraphs).replace("\0", " ")


def _section_title(section: str) -> str:
    if not section:
        return "others"
    kind = {field.name: field.type for field in dataclasses.fields(Config)}[section]
    return f"{section}: {' '.join((kind.__doc__ or '').split())}"


def _shown(value: Any) -> str:
    """A value as typed on the command line."""
    if isinstance(value, tuple) and value and isinstance(value[0], AttentionLayers):
        return ";".join(map(str, value))
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "()"
    if isinstance(value, dict):
        return ",".join(f"{name}:{_shown(share)}" for name, share in value.items()) or "{}"
    if isinstance(value, float):
        return _fraction(value)
    return "''" if value == "" else str(value)


def _fraction(value: float) -> str:
    """A float such as 0.03, or 1/32 for one over an integer."""
    if 0 < value < 1 and (1 / value) == round(1 / value) and len(repr(value)) > 5:
        return f"1/{round(1 / value)}"
    return f"{value:g}"
