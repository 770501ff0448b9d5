"""The model that the small hub of the tests has."""

from foreign_checkpoints import FIXTURES

MODEL = "some-owner/retnet-1.3B"
WEIGHTS = (FIXTURES / "fla/default/model.safetensors").read_bytes()
CONFIG = (FIXTURES / "fla/default/config.json").read_bytes()


def files(**others):
    """The files of a model, and others that are never downloaded."""
    return {
        "config.json": CONFIG,
        "model.safetensors": WEIGHTS,
        "README.md": b"A model.",
        "pytorch_model.bin": b"not needed",
        "onnx/model.safetensors": b"in a subdirectory",
        **others,
    }
