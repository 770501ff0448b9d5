"""Every option of the project: its type, default, one line of help, and its checks.

A file in `configs/` returns a `Config`; the command line overrides single options
(`--config.train.steps=100`); a workdir records the result as `config.json`.

    run.py        Config, and the options of a run: data, optimizer, training, mesh, profile
    model.py      the options of a model
    attention.py  layers of attention in a model of retention
    sizes.py      numbers that follow from a model's options: parameters, FLOPs
    fields.py     what makes a field an option, and the checks that they share
    as_json.py    to and from JSON, old names of options, differences between configs
    as_text.py    a config in lines for the terminal

Nothing here imports jax, so that a config can be read anywhere.
"""

from retnet_jax.config.attention import AttentionLayers
from retnet_jax.config.model import DTYPES, ModelConfig
from retnet_jax.config.run import (
    OPTIMIZERS,
    SCHEDULES,
    SOURCES,
    TOKENIZERS,
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
)

__all__ = [
    "DTYPES",
    "OPTIMIZERS",
    "SCHEDULES",
    "SOURCES",
    "TOKENIZERS",
    "AttentionLayers",
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "TrainConfig",
]
