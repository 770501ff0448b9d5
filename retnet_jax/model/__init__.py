"""Language models over a sequence mixer: RetNet (retention) and Transformer (attention)."""

from retnet_jax.model.decoding import DecodingModel, for_decoding
from retnet_jax.model.lm import LanguageModel, RetNet, State, Transformer, build_model

__all__ = [
    "DecodingModel",
    "LanguageModel",
    "RetNet",
    "State",
    "Transformer",
    "build_model",
    "for_decoding",
]
