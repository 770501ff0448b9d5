"""microsoft/torchscale, both since October 2023 and before.

The two differ in norms and biases only, so one table serves both: rules for parameters that a model
does not have are skipped.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from retnet_jax.config import ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.interop.parameter_source import Description
from retnet_jax.interop.presets import TORCHSCALE, TORCHSCALE_2023
from retnet_jax.interop.tables import Layout, Rule, check_exact, check_types, refuse_features
from retnet_jax.interop.tensor_files import TensorInfo

TYPES = {
    int: "vocab_size decoder_embed_dim decoder_value_embed_dim decoder_ffn_embed_dim "
    "decoder_layers decoder_retention_heads max_target_positions",
    float: "layernorm_eps",
    bool: "decoder_normalize_before deepnorm layernorm_embedding no_scale_embedding subln "
    "share_decoder_input_output_embed tie_word_embeddings use_ffn_rms_norm use_glu use_lm_decay",
}
_ACTIVATIONS = ("relu", "gelu", "swish")
GATED = {"relu": "reglu", "gelu": "geglu", "swish": "swiglu"}
# Features that this project does not have, as arguments of `refuse_features`.
ABSENT = {
    "moe_freq": ("mixture of experts", 0),
    "multiway": ("multiway (two sets of parameters)", False),
    "no_output_layer": ("no output layer", False),
}


def rules(prefix: str, head: str) -> tuple[Rule, ...]:
    """The table, with a prefix before all names except that of the output head."""

    def norm(own: str, foreign: str) -> list[Rule]:
        return [Rule(f"{own}/scale", f"{foreign}.weight"), Rule(f"{own}/bias", f"{foreign}.bias")]

    def linear(own: str, foreign: str) -> list[Rule]:
        return [
            Rule(f"{own}/kernel", f"{foreign}.weight", transposed=True),
            Rule(f"{own}/bias", f"{foreign}.bias"),
        ]

    layer = prefix + "layers.{layer}."
    return (
        Rule("embedding", prefix + "embed_tokens.weight"),
        *norm("embedding_norm", prefix + "layernorm_embedding"),
        *norm("layers/mixer_norm", layer + "retention_layer_norm"),
        *linear("layers/mixer/q", layer + "retention.q_proj"),
        *linear("layers/mixer/k", layer + "retention.k_proj"),
        *linear("layers/mixer/v", layer + "retention.v_proj"),
        *linear("layers/mixer/gate", layer + "retention.g_proj"),
        *linear("layers/mixer/out", layer + "retention.out_proj"),
        *norm("layers/ffn_norm", layer + "final_layer_norm"),
        *linear("layers/ffn/up", layer + "ffn.fc1"),
        *linear("layers/ffn/linear", layer + "ffn.gate"),
        *norm("layers/ffn/norm", layer + "ffn.ffn_layernorm"),
        *linear("layers/ffn/down", layer + "ffn.fc2"),
        *norm("final_norm", prefix + "layer_norm"),
        Rule("head", head),
    )


def read_config(values: dict[str, Any], infos: Mapping[str, TensorInfo]) -> Description:
    """The description in torchscale's options; missing ones have torchscale's defaults.

    A model from before October 2023 is recognised by its biases. fairseq stores None for options
    that were not given, and does not store the vocabulary size.
    """
    values = {name: value for name, value in values.items() if value is not None}
    if "embed_tokens.weight" in infos:
        values = {"vocab_size": infos["embed_tokens.weight"].shape[0]} | values
    if pre_norm(values) != overridden_pre_norm(values):
        # The option is ambiguous: RetNetConfig overrode it until December 2023, but not since
        # then, nor for models built from fairseq's options. The tensors decide: only models with
        # pre-norm have a final norm.
        values |= {"decoder_normalize_before": "layer_norm.weight" in infos}
    check_types("torchscale", values, TYPES)
    refuse_features("torchscale", values, ABSENT)
    if any(name.endswith("retention.q_proj.bias") for name in infos):
        width = values.get("decoder_embed_dim", 768)
        model = ModelConfig(
            **TORCHSCALE_2023,
            **common_fields(
                {"decoder_ffn_embed_dim": 1536} | values, tied="share_decoder_input_output_embed"
            ),
            value_dim=2 * width,
            ffn=activation(values, "torchscale"),
            ffn_norm="layer" if sublayer_norm(values) else None,
            norm_epsilon=values.get("layernorm_eps", 1e-5),
        )
    else:
        model = ModelConfig(
            **TORCHSCALE,
            **common_fields(values, tied="share_decoder_input_output_embed"),
            value_dim=values.get("decoder_value_embed_dim", 1280),
            ffn=GATED[activation(values, "torchscale")],
            norm_epsilon=values.get("layernorm_eps", 1e-6),
        )
    return Description(model, context_length=values.get("max_target_positions") or 2048)


def write_config(description: Description) -> dict[str, Any]:
    """Torchscale's options, as keywords of its RetNetConfig.

    Raises:
      ConfigError: if torchscale cannot express the model.
    """
    model = description.model
    before = model.norm == "layer"
    expected = TORCHSCALE_2023 if before else TORCHSCALE
    expected = expected | {"ffn": _ffn(model, gated=not before), "q_width": model.d_model}
    if before:
        expected["v_width"] = 2 * model.d_model
        expected["post_norm"] = overridden_post_norm(model)
        if model.ffn_norm is not None:
            expected |= {"ffn_norm": "layer", "deepnorm": False}
    check_exact("torchscale", model, expected, REASONS)
    own = {} if before else {"decoder_value_embed_dim": model.v_width}
    return own | {
        **options(model),
        "subln": model.ffn_norm is not None or not (before or model.post_norm or model.deepnorm),
        "max_target_positions": description.context_length,
        "share_decoder_input_output_embed": model.tie_embeddings,
    }


def buffers(config: ModelConfig, *, prefix: str) -> dict[str, np.ndarray]:
    """The buffers that torchscale saves: the angle of each column of q, and the log gammas."""
    angle = 10_000.0 ** -np.linspace(0, 1, config.q_width // config.n_heads // 2)
    complement = 2.0 ** (-5 - np.arange(config.n_heads))
    if config.decay == "log_spaced":
        complement = np.geomspace(*config.decay_range, config.n_heads)
    return {
        f"{prefix}retnet_rel_pos.angle": np.repeat(angle, 2).astype(np.float32),
        f"{prefix}retnet_rel_pos.decay": np.log1p(-complement).astype(np.float32),
    }


def common_fields(values: Mapping[str, Any], tied: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that torchscale's and syncdoth's options give alike."""
    return {
        "vocab_size": values.get("vocab_size", 50_257),
        "d_model": values.get("decoder_embed_dim", 768),
        "n_layers": values.get("decoder_layers", 12),
        "n_heads": values.get("decoder_retention_heads", 3),
        "ffn_dim": values.get("decoder_ffn_embed_dim", 1280),
        "tie_embeddings": values.get(tied, False),
        "embedding_scale": not values.get("no_scale_embedding", True),
        "embedding_norm": values.get("layernorm_embedding", False),
        "post_norm": not pre_norm(values),
        "deepnorm": values.get("deepnorm", False),
    }


def options(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `common_fields`, with defaults for the options of training."""
    plain_of = {gated: plain for plain, gated in GATED.items()}
    return {
        "activation_dropout": 0.0,
        "activation_fn": plain_of.get(model.ffn, model.ffn),
        "decoder_embed_dim": model.d_model,
        "decoder_ffn_embed_dim": model.ffn_width,
        "decoder_layers": model.n_layers,
        "decoder_normalize_before": not model.post_norm,
        "decoder_retention_heads": model.n_heads,
        "deepnorm": model.deepnorm,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "layernorm_embedding": model.embedding_norm,
        "layernorm_eps": model.norm_epsilon,
        "no_scale_embedding": not model.embedding_scale,
        "recurrent_chunk_size": 512,
        "vocab_size": model.vocab_size,
    }


def activation(values: Mapping[str, Any], layout: str) -> str:
    """The activation of the feed-forward layer, checked."""
    name = values.get("activation_fn", "gelu")
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"config.json: activation_fn={name!r} of a {layout} model is not one of "
            f"{', '.join(map(repr, _ACTIVATIONS))}"
        )
    return name


def sublayer_norm(values: Mapping[str, Any]) -> bool:
    """Whether sub-LayerNorm is on; deepnorm turns it off."""
    return values.get("subln", True) and not values.get("deepnorm", False)


def pre_norm(values: Mapping[str, Any]) -> bool:
    """Whether the options ask for pre-norm: a norm before each layer."""
    return values.get("decoder_normalize_before", True)


def overridden_pre_norm(values: Mapping[str, Any]) -> bool:
    """Pre-norm as RetNetConfig overrides it: deepnorm turns it off, sub-LayerNorm turns it on."""
    if values.get("deepnorm", False):
        return False
    return sublayer_norm(values) or pre_norm(values)


def overridden_post_norm(model: ModelConfig) -> bool:
    """Whether a model has post-norm after the override of `overridden_pre_norm`."""
    return model.deepnorm or (model.post_norm and model.ffn_norm is None)


def _ffn(model: ModelConfig, *, gated: bool) -> str:
    """The model's feed-forward layer if the layout has it, else the closest one it has."""
    if model.ffn_gated == gated:
        return model.ffn
    return "swiglu" if gated else "gelu"


REASONS = {
    "rotation": "the angles differ, and no permutation of q and k maps one set to the other",
    "row_normalizer": "it divides by a root that depends on the position, which no weight can undo",
    "decay": "torchscale's decays are fixed",
    "head_norm_scale": "fold it into the output projection first (--fold_head_norm)",
}


LAYOUT = Layout(
    name="torchscale",
    rules=rules(prefix="", head="output_projection.weight"),
    read_config=read_config,
    write_config=write_config,
    buffers=partial(buffers, prefix=""),
    writes_tied_head=True,
)
load, save = LAYOUT.load, LAYOUT.save
