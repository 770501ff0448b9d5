"""syncdoth/RetNet: torchscale since October 2023, ported to Hugging Face's format."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from retnet_jax.config import ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.interop.parameter_source import Description
from retnet_jax.interop.presets import SYNCDOTH
from retnet_jax.interop.tables import Layout, check_exact, check_types, refuse_features
from retnet_jax.interop.tensor_files import TensorInfo
from retnet_jax.interop.torchscale import (
    ABSENT,
    GATED,
    REASONS,
    TYPES,
    activation,
    buffers,
    common_fields,
    options,
    overridden_post_norm,
    overridden_pre_norm,
    rules,
    sublayer_norm,
)


def read_config(values: dict[str, Any], infos: Mapping[str, TensorInfo]) -> Description:
    """The description in a `config.json`; missing fields have syncdoth's defaults."""
    check_types("syncdoth", values, TYPES)
    refuse_features("syncdoth", values, ABSENT)
    gated = values.get("use_glu", True)
    plain = activation(values, "syncdoth")
    ffn_norm = None
    if sublayer_norm(values) and not gated:
        ffn_norm = "rms" if values.get("use_ffn_rms_norm", False) else "layer"
        width = values.get("decoder_embed_dim", 768)
        if values.get("decoder_ffn_embed_dim", 1280) != width:
            raise ConfigError(
                "config.json: with use_glu=False and subln=True syncdoth norms the inner "
                f"activations as if they were decoder_embed_dim={width} wide, so "
                f"decoder_ffn_embed_dim={values.get('decoder_ffn_embed_dim', 1280)} cannot run"
            )
    values = values | {"decoder_normalize_before": overridden_pre_norm(values)}
    model = ModelConfig(
        **SYNCDOTH,
        **common_fields(values, tied="tie_word_embeddings"),
        value_dim=values.get("decoder_value_embed_dim", 1280),
        decay="log_spaced" if values.get("use_lm_decay", False) else "powers_of_two",
        ffn=GATED[plain] if gated else plain,
        ffn_bias=not gated,
        ffn_norm=ffn_norm,
        norm_epsilon=values.get("layernorm_eps", 1e-6),
    )
    return Description(
        model,
        context_length=2048,  # syncdoth has no field for it
        bos_id=values.get("bos_token_id"),
        eos_id=values.get("eos_token_id", 0),
    )


def write_config(description: Description) -> dict[str, Any]:
    """The `config.json` of a model.

    Raises:
      ConfigError: if syncdoth cannot express the model.
    """
    model = description.model
    gated = model.ffn_gated
    expected = SYNCDOTH | {
        "ffn_bias": not gated,
        "q_width": model.d_model,
        "post_norm": overridden_post_norm(model),
    }
    if model.decay == "none":
        expected["decay"] = "powers_of_two"
    if model.decay == "log_spaced":
        expected["decay_range"] = (1 / 32, 1 / 512)
    if gated:
        expected["ffn_norm"] = None
    elif model.ffn_norm is not None:
        expected["deepnorm"] = False
        expected["ffn_width"] = model.d_model
    check_exact("syncdoth", model, expected, REASONS)
    return {
        "architectures": ["RetNetForCausalLM"],
        "bos_token_id": description.bos_id,
        "decoder_value_embed_dim": model.v_width,
        "eos_token_id": description.eos_id,
        "forward_impl": "parallel",
        "is_decoder": True,
        "model_type": "retnet",
        **options(model),
        "subln": model.ffn_norm is not None or (gated and not model.post_norm),
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "use_ffn_rms_norm": model.ffn_norm == "rms",
        "use_glu": gated,
        "use_lm_decay": model.decay == "log_spaced",
    }


LAYOUT = Layout(
    name="syncdoth",
    rules=rules(prefix="model.", head="lm_head.weight"),
    read_config=read_config,
    write_config=write_config,
    buffers=partial(buffers, prefix="model."),
)
load, save = LAYOUT.load, LAYOUT.save
