"""Model configs that compute exactly what other implementations compute.

    config = presets.fla(vocab_size=32_000, d_model=2048, n_layers=24, n_heads=8)

Each preset takes any field of `ModelConfig`. Such a model can be saved for that implementation, and
models trained there can be loaded (see `interop`).
"""

from typing import Any

from retnet_jax.config import ModelConfig


def paper(**options: Any) -> ModelConfig:
    """The authors' RetNet as published: torchscale until September 2023.

    LayerNorm, biases, gelu with a LayerNorm before W2, values of width 2 d_model. The experiments
    of arXiv 2307.08621 use decay="log_spaced" instead.
    """
    return _model(TORCHSCALE_2023 | {"norm_epsilon": 1e-5, "ffn_norm": "layer"}, options)


def torchscale(**options: Any) -> ModelConfig:
    """As torchscale since October 2023: RMSNorm, a gated feed-forward layer, no biases."""
    return _model(TORCHSCALE | {"ffn": "geglu"}, options)


def fla(**options: Any) -> ModelConfig:
    """As flash-linear-attention: rotary positions, no row normaliser, a scale in the head norm."""
    return _model(FLA | {"head_norm_scale": True}, options)


def syncdoth(**options: Any) -> ModelConfig:
    """As syncdoth/RetNet: torchscale since October 2023 in Hugging Face's format."""
    return _model(SYNCDOTH | {"ffn": "geglu", "decay": "powers_of_two"}, options)


def _model(fields: dict[str, Any], options: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**(fields | options))


# Options that no other implementation has, and then those that only fla has, at values that change
# nothing.
_OWN: dict[str, Any] = {"qk_norm": False, "head_norm": True, "head_norm_epsilon": None}
_NOT_FLA: dict[str, Any] = _OWN | {
    "short_conv": None,
    "n_kv_heads": None,
    "feature_map": None,
    "output_gate": True,
}
# The fields that are the same in all checkpoints of an implementation.
TORCHSCALE_2023: dict[str, Any] = _NOT_FLA | {
    "norm": "layer",
    "rotation": "torchscale",
    "row_normalizer": True,
    "decay": "powers_of_two",
    "mixer_bias": True,
    "ffn_bias": True,
    "head_norm_scale": False,
}
TORCHSCALE: dict[str, Any] = TORCHSCALE_2023 | {
    "norm": "rms",
    "mixer_bias": False,
    "ffn_bias": False,
    "ffn_norm": None,
}
SYNCDOTH: dict[str, Any] = _NOT_FLA | {
    "norm": "rms",
    "rotation": "torchscale",
    "row_normalizer": True,
    "mixer_bias": False,
    "head_norm_scale": False,
}
FLA: dict[str, Any] = _OWN | {
    "ffn": "swiglu",
    "norm": "rms",
    "rotation": "rope",
    "row_normalizer": False,
    "decay": "powers_of_two",
    "mixer_bias": False,
    "ffn_bias": False,
    "ffn_norm": None,
    "embedding_scale": False,
    "embedding_norm": False,
    "post_norm": False,
    "deepnorm": False,
}
