"""Loading a trained model from a directory."""

from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from retnet_jax.config import MeshConfig, read_config
from retnet_jax.model import LanguageModel, build_model
from retnet_jax.sharding import make_mesh, with_shardings


def load_pretrained(directory: str | Path, mesh: Mesh | None = None) -> LanguageModel:
    """The model of the newest checkpoint in the workdir of a training run.

    Args:
      directory: `--workdir` of train.py.
      mesh: where the parameters go, laid out as in training; None: the first device.

    Raises:
      ConfigError: if the directory is no workdir.
      CheckpointError: if it has no checkpoint, or the newest is damaged.
    """
    from retnet_jax.checkpoint import restore_model

    workdir = Path(directory)
    config = read_config(workdir / "config.json").model
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    shape = jax.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    model, _ = restore_model(workdir / "checkpoints", with_shardings(shape, mesh))
    return model
