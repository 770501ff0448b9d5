"""Retentive networks (RetNet, arXiv 2307.08621) in JAX and Flax.

What most programs and notebooks need stands here; each name is loaded when it is first used, so
that `import retnet_jax` takes neither jax nor a library for data or checkpoints.
"""

import importlib

_HOME = {
    "Config": "retnet_jax.config",
    "DataConfig": "retnet_jax.config",
    "Evaluator": "retnet_jax.training.loop",
    "ModelConfig": "retnet_jax.config",
    "OptimizerConfig": "retnet_jax.config",
    "RetNet": "retnet_jax.model",
    "Sampler": "retnet_jax.generation",
    "TokenRequest": "retnet_jax.generation.continuous",
    "TrainConfig": "retnet_jax.config",
    "Transformer": "retnet_jax.model",
    "Writer": "retnet_jax.generation",
    "convert": "retnet_jax.interop",
    "evaluate": "retnet_jax.evaluation.run",
    "for_decoding": "retnet_jax.model",
    "generate": "retnet_jax.generation.decode",
    "generate_requests": "retnet_jax.generation.continuous",
    "load_pretrained": "retnet_jax.pretrained",
    "load_reading": "retnet_jax.generation.saved_state",
    "load_tokenizer": "retnet_jax.data",
    "retention": "retnet_jax.ops.retention",
    "save_reading": "retnet_jax.generation.saved_state",
    "train": "retnet_jax.training.loop",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
