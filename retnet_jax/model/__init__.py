"""Language models over a sequence mixer: RetNet (retention) and Transformer (attention)."""

from retnet_jax.model.lm import LanguageModel, RetNet, State, Transformer, build_model

__all__ = ["LanguageModel", "RetNet", "State", "Transformer", "build_model"]
