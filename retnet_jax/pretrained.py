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
    return newest_checkpoint(Path(directory), first_device() if mesh is None else mesh)[0]


def newest_checkpoint(workdir: Path, mesh: Mesh) -> tuple[LanguageModel, int]:
    """The model of the newest checkpoint in a workdir, and its step; as `load_pretrained`."""
    from retnet_jax.checkpoint import restore_model

    config = read_config(workdir / "config.json").model
    shape = jax.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    return restore_model(workdir / "checkpoints", with_shardings(shape, mesh))


def first_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(), jax.devices()[:1])
