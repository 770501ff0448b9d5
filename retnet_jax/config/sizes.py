"""Parameters and FLOPs that follow from a model's options, derived here and nowhere else.

`ModelConfig` has them as methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retnet_jax.own_objects import is_own, own_object

if TYPE_CHECKING:
    from retnet_jax.config.model import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of trainable parameters, embedding and output head included."""
    heads = 1 if config.tie_embeddings else 2
    mixers = _own_layers(config) * (_mixer_matrices(config) + _mixer_vectors(config))
    for entry in config.attention_layers:
        one = entry.matrices(config.d_model) + entry.vectors(config.d_model)
        mixers += len(entry.layers) * one
    layer = _ffn_matrices(config) + _layer_vectors(config)
    norms = config.embedding_norm + (not config.post_norm)
    return (
        heads * config.vocab_size * config.d_model
        + mixers
        + config.n_layers * layer
        + norms * _norm_parameters(config.norm, config.d_model)
    )


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """`ModelConfig.training_flops_per_token`."""
    own = _own_layers(config)
    weights = own * (_mixer_matrices(config) + _convolutions(config))
    cores = own * _core_flops(config, sequence_length)
    for entry in config.attention_layers:
        weights += len(entry.layers) * entry.matrices(config.d_model)
        seen = _mean_keys(sequence_length, entry.window)
        cores += len(entry.layers) * 4 * config.d_model * seen
    weights += config.n_layers * _ffn_matrices(config) + config.vocab_size * config.d_model
    return 6 * weights + 3 * cores


def twin_ffn_width(config: ModelConfig) -> int:
    """Inner width of the feed-forward layer with which the Transformer has as many parameters.

    Attention has 4 d^2 parameters in place of those of this model's mixers, their convolutions
    included.
    """
    own = _own_layers(config)
    mixers = own * (_mixer_matrices(config) + _convolutions(config))
    mixers += sum(len(x.layers) * x.matrices(config.d_model) for x in config.attention_layers)
    surplus = mixers / config.n_layers - 4 * config.d_model**2
    matrices = 3 if config.ffn_gated else 2
    return config.ffn_width + round(surplus / (matrices * config.d_model))


def _own_layers(config: ModelConfig) -> int:
    """Number of layers with the model's mixer; a hybrid has others."""
    return config.n_layers - sum(len(entry.layers) for entry in config.attention_layers)


def _mixer_matrices(config: ModelConfig) -> int:
    """Parameters of the matrices of one layer's mixer; all parameters of the user's own mixer."""
    if is_own(config.mixer):
        return own_object("model.mixer", config.mixer).parameter_count(config)
    outputs = config.q_width + config.k_channels + config.v_channels
    if config.mixer == "attention":
        return config.d_model * (outputs + config.v_width)
    return config.d_model * (outputs + (2 if config.output_gate else 1) * config.v_width)


def _core_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of a token's forward pass through the algorithm of one layer's mixer."""
    if config.mixer == "attention":
        return 4 * config.q_width * _mean_keys(sequence_length, config.window)
    if is_own(config.mixer):
        return own_object("model.mixer", config.mixer).flops_per_token(config, sequence_length)
    return 4 * config.q_width * config.v_width / config.n_heads


def _convolutions(config: ModelConfig) -> int:
    """Weights of the convolutions of one layer."""
    channels = config.q_width + config.k_channels + config.v_channels
    return (config.short_conv or 0) * channels


def _mixer_vectors(config: ModelConfig) -> int:
    """Parameters of one layer's mixer that are not in matrices."""
    if is_own(config.mixer):
        return 0
    count = _convolutions(config)
    count += {"prelu": 1, "xielu": 2}.get(config.feature_map or "", 0)
    if config.qk_norm:
        count += 2 * (config.q_width // config.n_heads)
    gates = config.mixer == "retention" and config.output_gate
    if config.mixer_bias:
        count += config.q_width + config.k_channels + config.v_channels + config.d_model
        count += config.v_width if gates else 0
    if config.head_norm_scale and config.mixer == "retention":
        count += config.v_width // config.n_heads
    return count


def _mean_keys(sequence_length: int, window: int | None) -> float:
    """The mean number of keys that a token of a row sees."""
    w = min(window or sequence_length, sequence_length)
    return (w * (w + 1) / 2 + (sequence_length - w) * w) / sequence_length


def _ffn_matrices(config: ModelConfig) -> int:
    """Parameters of the matrices of a feed-forward layer."""
    return config.d_model * config.ffn_width * (3 if config.ffn_gated else 2)


def _layer_vectors(config: ModelConfig) -> int:
    """Parameters in the norms and in the feed-forward biases of one layer."""
    count = 2 * _norm_parameters(config.norm, config.d_model)
    if config.ffn_bias:
        count += (2 if config.ffn_gated else 1) * config.ffn_width + config.d_model
    if config.ffn_norm is not None:
        count += _norm_parameters(config.ffn_norm, config.ffn_width)
    return count


def _norm_parameters(norm: str, width: int) -> int:
    return width * (2 if norm == "layer" else 1)
