"""flash-linear-attention: Hugging Face directories such as fla-hub/retnet-1.3B-100B.

fla's RetNetForCausalLM does not pass `use_short_conv` on to its layers, so models with convolutions
come from programs that build the layers themselves. The tensors of a file say whether it has them.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from retnet_jax.config import ModelConfig
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.errors import ConfigError
from retnet_jax.interop.parameter_source import Description
from retnet_jax.interop.presets import FLA
from retnet_jax.interop.tables import Layout, Rule, check_exact, check_types, refuse_features
from retnet_jax.interop.tensor_files import TensorFiles, TensorInfo

TYPES = {
    int: "hidden_size num_heads num_hidden_layers vocab_size max_position_embeddings "
    "intermediate_size num_kv_heads conv_size",
    float: "expand_k expand_v norm_eps hidden_ratio",
    bool: "tie_word_embeddings use_short_conv use_output_gate",
    str: "feature_map",
}
# Fields in which fla reads null as "derived from the others", "no limit" or "none".
MAY_BE_NULL = (
    *("intermediate_size", "hidden_ratio", "max_position_embeddings"),
    *("num_kv_heads", "feature_map"),
)
_LAYER = "model.layers.{layer}."
RULES = (
    Rule("embedding", "model.embeddings.weight"),
    Rule("layers/mixer_norm/scale", _LAYER + "attn_norm.weight"),
    Rule("layers/mixer/q/kernel", _LAYER + "attn.q_proj.weight", transposed=True),
    Rule("layers/mixer/q/bias", _LAYER + "attn.q_proj.bias"),
    Rule("layers/mixer/k/kernel", _LAYER + "attn.k_proj.weight", transposed=True),
    Rule("layers/mixer/k/bias", _LAYER + "attn.k_proj.bias"),
    Rule("layers/mixer/v/kernel", _LAYER + "attn.v_proj.weight", transposed=True),
    Rule("layers/mixer/v/bias", _LAYER + "attn.v_proj.bias"),
    Rule("layers/mixer/gate/kernel", _LAYER + "attn.g_proj.weight", transposed=True),
    Rule("layers/mixer/q_conv/weight", _LAYER + "attn.q_conv1d.weight", depthwise=True),
    Rule("layers/mixer/k_conv/weight", _LAYER + "attn.k_conv1d.weight", depthwise=True),
    Rule("layers/mixer/v_conv/weight", _LAYER + "attn.v_conv1d.weight", depthwise=True),
    Rule("layers/mixer/feature_map/weight", _LAYER + "attn.feature_map_fn.weight"),
    Rule("layers/mixer/feature_map/alpha_p", _LAYER + "attn.feature_map_fn.alpha_p"),
    Rule("layers/mixer/feature_map/alpha_n", _LAYER + "attn.feature_map_fn.alpha_n"),
    Rule(
        "layers/mixer/head_norm/scale",
        _LAYER + "attn.g_norm_swish_gate.weight",
        when=lambda model: model.output_gate,
    ),
    Rule(
        "layers/mixer/head_norm/scale",
        _LAYER + "attn.g_norm.weight",
        when=lambda model: not model.output_gate,
    ),
    Rule("layers/mixer/out/kernel", _LAYER + "attn.o_proj.weight", transposed=True),
    Rule("layers/ffn_norm/scale", _LAYER + "mlp_norm.weight"),
    Rule("layers/ffn/up/kernel", _LAYER + "mlp.gate_proj.weight", transposed=True),
    Rule("layers/ffn/linear/kernel", _LAYER + "mlp.up_proj.weight", transposed=True),
    Rule("layers/ffn/down/kernel", _LAYER + "mlp.down_proj.weight", transposed=True),
    Rule("final_norm/scale", "model.norm.weight"),
    Rule("head", "lm_head.weight"),
)
UNFUSED_RULES = tuple(
    replace(rule, foreign=rule.foreign.replace("g_norm_swish_gate", "g_norm")) for rule in RULES
)


def read_config(values: dict[str, Any], infos: Mapping[str, TensorInfo]) -> Description:
    """The description in a `config.json`; missing fields have fla's defaults."""
    heads = values.get("num_heads", 8)
    nulls = {name for name in MAY_BE_NULL if name in values and values[name] is None}
    check_types("fla", {name: x for name, x in values.items() if name not in nulls}, TYPES)
    refuse_features(
        "fla",
        values,
        {
            "model_type": ("another architecture", "retnet"),
            "hidden_act": ("another activation", "swish", "silu"),
            "attnres_block_size": ("attention residuals", None),
        },
    )
    width = values.get("hidden_size", 2048)
    has_convolutions = any(name.endswith(".attn.q_conv1d.weight") for name in infos)
    kv_heads = values.get("num_kv_heads")
    model = ModelConfig(
        **FLA,
        vocab_size=values.get("vocab_size", 32_000),
        d_model=width,
        n_layers=values.get("num_hidden_layers", 24),
        n_heads=heads,
        key_dim=_expanded(width, values.get("expand_k", 1.0), "expand_k"),
        value_dim=_expanded(width, values.get("expand_v", 2.0), "expand_v"),
        ffn_dim=values.get("intermediate_size") or _default_ffn(width, values),
        norm_epsilon=values.get("norm_eps", 1e-6),
        head_norm_scale=bool(values.get("elementwise_affine", True)),
        short_conv=(
            values.get("conv_size", 4)
            if has_convolutions and values.get("use_short_conv", False)
            else None
        ),
        n_kv_heads=None if kv_heads == heads else kv_heads,
        feature_map=values.get("feature_map"),
        output_gate=values.get("use_output_gate", True),
        tie_embeddings=values.get("tie_word_embeddings", False),
        attention_layers=_attention_layers(values.get("attn")),
    )
    return Description(
        model,
        context_length=values.get("max_position_embeddings") or 2048,
        bos_id=values.get("bos_token_id", 1),
        eos_id=values.get("eos_token_id", 2),
    )


def write_config(description: Description, *, fused: bool) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
      ConfigError: if fla cannot express the model.
    """
    model = description.model
    check_exact("fla", model, FLA, _REASONS)
    return {
        "architectures": ["RetNetForCausalLM"],
        "attn": _attn(model),
        "attn_mode": "chunk",
        "bos_token_id": description.bos_id,
        "conv_size": model.short_conv or 4,
        "elementwise_affine": model.head_norm_scale,
        "eos_token_id": description.eos_id,
        "expand_k": _factor(model.d_model, model.q_width),
        "expand_v": _factor(model.d_model, model.v_width),
        "feature_map": model.feature_map,
        "fuse_cross_entropy": True,
        "fuse_norm": fused,
        "fuse_swiglu": True,
        "hidden_act": "swish",
        "hidden_ratio": 2,
        "hidden_size": model.d_model,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_width,
        "max_position_embeddings": description.context_length,
        "model_type": "retnet",
        "norm_eps": model.norm_epsilon,
        "num_heads": model.n_heads,
        "num_hidden_layers": model.n_layers,
        "num_kv_heads": model.n_kv_heads,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "use_output_gate": model.output_gate,
        "use_short_conv": model.short_conv is not None,
        "vocab_size": model.vocab_size,
    }


_ATTENTION_FIELDS = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")


def _attention_layers(attn: Any) -> tuple[AttentionLayers, ...]:
    """The attention layers in fla's field `attn`: null, one dictionary or a list of them.

    Raises:
      ConfigError: for fields that are missing, of the wrong type or unknown. fla ignores unknown
        ones, so its model is not what they say.
    """
    if attn is None:
        return ()
    entries = attn if isinstance(attn, list) else [attn]
    return tuple(_attention_entry(entry) for entry in entries)


def _attention_entry(entry: Any) -> AttentionLayers:
    if not isinstance(entry, dict):
        raise ConfigError(f"config.json: attn={entry!r} is not an object of fields")
    for name in entry:
        if name not in _ATTENTION_FIELDS:
            raise ConfigError(
                f"config.json: attn has the unknown field {name}={entry[name]!r}, which fla "
                f"ignores; delete it to load what fla computes; the known fields are "
                f"{', '.join(_ATTENTION_FIELDS)}"
            )
    for name in ("layers", "num_heads"):
        if name not in entry:
            raise ConfigError(f"config.json: attn={entry} has no field {name}")
    layers = entry["layers"]
    if not isinstance(layers, list):
        raise ConfigError(f"config.json: attn.layers={layers!r} is not a list of layers")
    nulls = {"num_kv_heads", "window_size"}
    given = {name: x for name, x in entry.items() if not (name in nulls and x is None)}
    check_types(
        "fla",
        given,
        {int: "num_heads num_kv_heads window_size", float: "rope_theta", bool: "qkv_bias"},
    )
    heads, kv_heads = entry["num_heads"], entry.get("num_kv_heads")
    return AttentionLayers(
        layers=tuple(layers),
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        window=entry.get("window_size"),
        bias=given.get("qkv_bias", False),
        rope_base=float(given.get("rope_theta", 10_000.0)),
    )


def _attn(model: ModelConfig) -> list[dict[str, Any]] | None:
    """The attention layers as fla's field `attn`."""
    entries = [
        {
            "layers": list(entry.layers),
            "num_heads": entry.n_heads,
            "num_kv_heads": entry.kv_heads,
            "qkv_bias": entry.bias,
            "window_size": entry.window,
            "rope_theta": entry.rope_base,
        }
        for entry in model.attention_layers
    ]
    return entries or None


def buffers(model: ModelConfig) -> dict[str, np.ndarray]:
    """The constants of xIELU, which transformers stores with its parameters."""
    if model.feature_map != "xielu":
        return {}
    constants = {"beta": np.float32(0.5), "eps": np.float32(-1e-6)}
    return {
        f"{_LAYER.format(layer=layer)}attn.feature_map_fn.{name}": np.asarray(value)
        for layer, kind in enumerate(model.layer_kinds)
        if kind is None  # attention layers have no feature map
        for name, value in constants.items()
    }


def ignored(model: ModelConfig) -> str | None:
    """What fla drops of a model; None: nothing."""
    if model.short_conv is None:
        return None
    return (
        f"This model has short convolutions of q, k and v (model.short_conv={model.short_conv}). "
        "fla's RetNetForCausalLM builds no convolutions, whatever use_short_conv says, and drops "
        "their weights with a warning, so that it computes other logits."
    )


def split_fused_gates(files: TensorFiles) -> TensorFiles:
    """Splits tensors [2I, d] that hold gate_proj and up_proj, as fla wrote them until 2025-02."""
    fused = {
        name: name.replace("gate_proj", "up_proj")
        for name in files.infos
        if name.endswith("mlp.gate_proj.weight")
    }
    return files if any(up in files.infos for up in fused.values()) else _Split(files, fused)


class _Split:
    """Tensor files in which the halves of some tensors are two tensors."""

    def __init__(self, files: TensorFiles, fused: dict[str, str]):
        self._files = files
        self._part_of: dict[str, tuple[str, slice]] = {}
        self.infos = dict(files.infos)
        for first, second in fused.items():
            info = files.infos[first]
            half = info.shape[0] // 2
            for name, rows in ((first, slice(0, half)), (second, slice(half, 2 * half))):
                self._part_of[name] = first, rows
                self.infos[name] = TensorInfo((half, *info.shape[1:]), info.dtype)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self._part_of:
            return self._files.read(name, rows)
        whole, part = self._part_of[name]
        array = self._files.read(whole, part)
        return array if rows is None else array[rows]


def _expanded(width: int, factor: float, name: str) -> int:
    expanded = width * factor
    if abs(expanded - round(expanded)) > 1e-6 * width:
        raise ConfigError(
            f"config.json: hidden_size={width} times {name}={factor} is {expanded}, not an integer"
        )
    return round(expanded)


def _factor(width: int, expanded: int) -> float:
    """The factor from `width` to `expanded`; some versions of fla round the product down."""
    factor = expanded / width
    return factor if int(width * factor) == expanded else math.nextafter(factor, math.inf)


def _default_ffn(width: int, values: Mapping[str, Any]) -> int:
    """Two thirds of hidden_ratio * hidden_size, rounded up to a multiple of 256, as in fla."""
    ratio = values.get("hidden_ratio", 2)
    inner = int(width * (4 if ratio is None else ratio) * 2 / 3)
    return 256 * -(-inner // 256)


_REASONS = {
    "rotation": "the angles differ, and no permutation of q and k maps one set to the other",
    "row_normalizer": "it divides by a root that depends on the position, which no weight can undo",
    "decay": "fla's decays are fixed",
    "embedding_scale": "fla does not scale the embedding",
}


LAYOUT = Layout(
    name="fla",
    rules=RULES,
    read_config=read_config,
    write_config=partial(write_config, fused=True),
    buffers=buffers,
    split=split_fused_gates,
    ignored=ignored,
)
load, save = LAYOUT.load, LAYOUT.save
# fla with fuse_norm=False, which names the head norm differently.
UNFUSED = replace(
    LAYOUT,
    name="fla_unfused",
    rules=UNFUSED_RULES,
    write_config=partial(write_config, fused=False),
)
