"""Retentive networks (RetNet, arXiv 2307.08621) in JAX and Flax."""

from retnet_jax.config import Config, ModelConfig
from retnet_jax.generate import generate
from retnet_jax.model import RetNet, Transformer, for_decoding
from retnet_jax.pretrained import load_pretrained
from retnet_jax.retention import retention

__all__ = [
    "Config",
    "ModelConfig",
    "RetNet",
    "Transformer",
    "for_decoding",
    "generate",
    "load_pretrained",
    "retention",
]
