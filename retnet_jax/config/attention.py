"""The attention layers of a hybrid: their settings, and the text that states them in one line.

This module does not postpone annotations, as `run.py`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from retnet_jax.config.fields import check_at_least, check_positive, check_values
from retnet_jax.errors import ConfigError

_EXAMPLE = "1,5:n_heads=8,n_kv_heads=2,window=128"


@dataclass(frozen=True, kw_only=True)
class AttentionLayers:
    """Layers of a RetNet whose mixer is softmax attention instead of retention.

    On the command line: 1,5:n_heads=8,window=128 for the layers 1 and 5. Layers with other settings
    are a second entry, after a semicolon.

    Attributes:
      layers: Numbers of the layers; the first layer is 0.
      n_heads: Number of query heads. A head has width d_model / n_heads.
      n_kv_heads: Number of heads of keys and values; query head h uses key head
        h // (n_heads / n_kv_heads). None: n_heads.
      window: Number of tokens that a query sees, itself included; None: all before it.
      bias: Biases in q, k and v.
      rope_base: Base of the rotation's angles, position * rope_base^(-2i/k).
    """

    layers: tuple[int, ...]
    n_heads: int
    n_kv_heads: int | None = None
    window: int | None = None
    bias: bool = False
    rope_base: float = 10_000.0

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def matrices(self, d_model: int) -> int:
        """Parameters of the matrices of one layer's mixer."""
        return 2 * d_model * (d_model + d_model * self.kv_heads // self.n_heads)

    def vectors(self, d_model: int) -> int:
        """Parameters of the biases of one layer's mixer."""
        return self.bias * d_model * (self.n_heads + 2 * self.kv_heads) // self.n_heads

    def __str__(self) -> str:
        """The text that `from_text` reads."""
        settings = [
            f"{field.name}={getattr(self, field.name):g}"
            if field.type is float
            else f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)[1:]
            if getattr(self, field.name) != field.default
        ]
        return f"{','.join(map(str, self.layers))}:{','.join(settings)}"

    def check(self, name: str, d_model: int, n_layers: int) -> None:
        """Raises `ConfigError` for settings that do not fit a model.

        Args:
          name: Name of this entry in messages, such as "model.attention_layers[0]".
          d_model: Width of the model.
          n_layers: Number of the model's layers.
        """
        check_values(name, self)
        if not self.layers:
            raise ConfigError(f"{name}.layers is empty; name at least one layer, or leave it out")
        for layer in self.layers:
            if not 0 <= layer < n_layers:
                raise ConfigError(
                    f"{name}.layers={self.layers}: layer {layer} is not one of the "
                    f"{n_layers} layers 0 to {n_layers - 1} (model.n_layers)"
                )
        for field in ("n_heads", "n_kv_heads", "window"):
            if getattr(self, field) is not None:
                check_at_least(f"{name}.{field}", getattr(self, field), 1)
        check_positive(f"{name}.rope_base", self.rope_base)
        if d_model % (2 * self.n_heads):
            raise ConfigError(
                f"{name}.n_heads={self.n_heads} gives heads of width {d_model}/{self.n_heads} "
                "(model.d_model); the width must be an even integer, because pairs of numbers are "
                "rotated"
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"{name}.n_kv_heads={self.n_kv_heads} does not divide {name}.n_heads={self.n_heads}"
            )


def check_attention_layers(
    entries: tuple[AttentionLayers, ...], d_model: int, n_layers: int
) -> None:
    """Raises `ConfigError` for entries that do not fit a model or each other."""
    seen: set[int] = set()
    for number, entry in enumerate(entries):
        name = f"model.attention_layers[{number}]"
        entry.check(name, d_model, n_layers)
        for layer in entry.layers:
            if layer in seen:
                raise ConfigError(f"{name}.layers={entry.layers}: layer {layer} is listed twice")
            seen.add(layer)


def layer_kinds(entries: tuple[AttentionLayers, ...], n_layers: int) -> tuple[int | None, ...]:
    """The number of the entry that each layer of a model is in; None: it is in none."""
    kinds: list[int | None] = [None] * n_layers
    for number, entry in enumerate(entries):
        for layer in entry.layers:
            kinds[layer] = number
    return tuple(kinds)


def attention_layers_from_text(text: str) -> tuple[AttentionLayers, ...]:
    """The entries in a text such as 1,5:n_heads=8,window=128;3:n_heads=4.

    Raises:
      ValueError: for a text of another form.
    """
    inside = text.strip()
    if inside in ("", "()", "None"):
        return ()
    return tuple(_entry(part.strip()) for part in inside.split(";"))


def _entry(text: str) -> AttentionLayers:
    layers, _, settings = text.partition(":")
    kinds = {field.name: field.type for field in dataclasses.fields(AttentionLayers)[1:]}
    try:
        values: dict[str, Any] = {"layers": tuple(int(layer) for layer in layers.split(","))}
        for setting in settings.split(",") if settings else []:
            name, _, value = setting.partition("=")
            values[name.strip()] = _value(value.strip(), kinds[name.strip()])
        return AttentionLayers(**values)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{text!r} is not LAYERS:SETTINGS such as {_EXAMPLE}; the settings are "
            f"{', '.join(kinds)}, and n_heads is needed"
        ) from None


def _value(text: str, kind) -> int | float | bool | None:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is float:
        return float(text)
    return None if text == "None" and kind is not int else int(text)
