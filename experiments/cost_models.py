"""The models whose decoding is measured: a RetNet, a hybrid and a Transformer of equal sizes.

Each has what did best in the search of the quickstart's recipe and can be had at any size: short
convolutions in all; relu of queries and keys and no rotation in the RetNet, and a norm of queries
and keys in the Transformer. Heads have the paper's widths. Parameters are random: costs do not
depend on them.
"""

import dataclasses
import importlib

from retnet_jax.config import ModelConfig
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.configs.paper_settings import paper_model

ARCHITECTURES = ("retnet", "hybrid", "transformer")
SIZES = ("tiny", "200M", "1.3B", "6.7B")
WINDOW, EVERY = 1024, 4  # of the hybrid: every fourth layer is attention to 1024 tokens


def decoding_config(size: str, architecture: str) -> ModelConfig:
    """The model of a size and an architecture; all of a size have about equal parameters."""
    retnet = dataclasses.replace(
        _paper_sizes(size),
        short_conv=4,
        feature_map="relu",
        rotation="none",
        head_norm_epsilon=1e-4,
    )
    if architecture == "retnet":
        return retnet
    if architecture == "hybrid":
        return _hybrid(retnet)
    twin = retnet.transformer_twin(n_heads=2 * retnet.n_heads)
    return dataclasses.replace(twin, short_conv=4, qk_norm=True, rotation="rope")


def state_dtype(config: ModelConfig, precision: str) -> str | None:
    """The dtype in which `for_decoding` stores a RetNet's state; None: the default."""
    return "bfloat16" if config.mixer == "retention" and precision == "bfloat16" else None


def _paper_sizes(size: str) -> ModelConfig:
    if size == "tiny":
        return ModelConfig(vocab_size=256, d_model=64, n_layers=4, n_heads=2, tie_embeddings=True)
    if size == "200M":  # without the 200M parameters of a vocabulary of 100,352 and its head
        model = paper_model(n_layers=16, d_model=1024)
        return dataclasses.replace(model, vocab_size=16_384, tie_embeddings=True)
    name = size.lower().replace(".", "p")
    return importlib.import_module(f"retnet_jax.configs.retnet_{name}").get_config().model


def _hybrid(retnet: ModelConfig) -> ModelConfig:
    """The RetNet with attention in every fourth layer, and wider feed-forward layers for it."""
    heads = 2 * retnet.n_heads
    attention = AttentionLayers(
        layers=tuple(range(EVERY - 1, retnet.n_layers, EVERY)),
        n_heads=heads,
        n_kv_heads=max(1, heads // 4),
        window=WINDOW,
    )
    hybrid = dataclasses.replace(retnet, attention_layers=(attention,))
    missing = retnet.parameter_count() - hybrid.parameter_count()
    wider = missing // (2 * retnet.d_model * retnet.n_layers)
    return dataclasses.replace(hybrid, ffn_dim=hybrid.ffn_width + wider // 16 * 16)
