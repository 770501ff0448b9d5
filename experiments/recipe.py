"""Which recipe is best for a small RetNet, and which for a Transformer of its size?

Both models are searched with the same number of runs (`SEARCH`), each of 1.2M tokens, on the source
code of Python's standard library. A run is judged by the bits per byte of validation documents,
which are neither trained on nor among the held-out documents of the quickstart. Later runs of the
table are variations of the best runs before them. The best recipe of each model then is the
quickstart's (`retnet_jax/configs/quickstart.py`), which is trained with three seeds and evaluated
on its held-out documents (`python -m experiments.quickstart`).

    python -m experiments.recipe                  all runs: about 2.5 minutes each on two cores
    python -m experiments.recipe --budget=small   two runs of a few steps, to see that it works

The documents of the standard library are those of the Python that runs it; results are of 3.11.7.

The committed records were made while this module was written, by the same configs and measures in a
script of its own, on the commits that they name. Those with `model.head_norm_epsilon` had it set by
hand, because the option is younger than d7e3cad. None has been made again by its command yet.
"""

import copy
import re
import sys
from typing import Any

from experiments.held_out import best_bits_per_byte, chosen_documents, document_bits
from experiments.runs import Records, Run, main
from retnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from retnet_jax.configs.quickstart import GENERATED
from retnet_jax.data import open_store
from retnet_jax.data.split import hash_of_name
from retnet_jax.evaluation.tables import Table
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "2cores")
# Shares of the documents: the quickstart holds out the first, this experiment the second, and
# validates on the difference.
QUICKSTART_HELD_OUT, HELD_OUT = 0.12, 0.16

# The best RetNet of the search's first part, which the second part varies.
_WINDOWS_OF_128 = {
    "model.short_conv": 4,
    "model.key_dim": 256,
    "model.feature_map": "relu",
    "model.head_norm_epsilon": 0.01,
    "data.sequence_length": 128,
    "train.batch_size": 16,
}

# What is changed in `base`, by the name of the run.
SEARCH: dict[str, dict[str, dict[str, Any]]] = {
    "retnet": {
        "base": {},
        "batch4": {"train.steps": 1200, "train.batch_size": 4},
        "h2": {"model.n_heads": 2},
        "conv": {"model.short_conv": 4},
        "v1024": {
            "train.steps": 1020,
            "model.vocab_size": 1024,
            "data.store": "data/stdlib_bpe1024_search",
        },
        "L4": {"train.steps": 435, "model.n_layers": 4},
        "k512": {"train.steps": 520, "model.key_dim": 512},
        "seq1024": {"data.sequence_length": 1024, "train.batch_size": 2},
        "conv_mulr2": {"model.short_conv": 4, "optimizer.muon_learning_rate": 0.02},
        "conv_seq128": {"model.short_conv": 4, "data.sequence_length": 128, "train.batch_size": 16},
        "conv_qkz": {"model.short_conv": 4, "model.qk_norm": True, "model.init": "zero_outputs"},
        "conv_k512qkz": {
            "model.short_conv": 4,
            "model.key_dim": 512,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
        },
        "conv_k512": {"model.short_conv": 4, "model.key_dim": 512},
        "conv_slow": {"model.short_conv": 4, "model.decay_range": (0.0625, 0.001)},
        "conv_none": {"model.short_conv": 4, "model.decay": "none"},
        "conv_nohn": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "model.head_norm": False,
            "model.key_dim": 512,
        },
        "conv_heps1": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "model.key_dim": 512,
            "model.head_norm_epsilon": 1.0,
        },
        "conv_relu": {
            "model.short_conv": 4,
            "model.key_dim": 512,
            "model.feature_map": "relu",
            "model.head_norm_epsilon": 0.01,
        },
        "conv_sigm": {
            "model.short_conv": 4,
            "model.key_dim": 512,
            "model.feature_map": "sigmoid",
            "model.qk_norm": True,
            "model.head_norm_epsilon": 0.01,
        },
        "conv_heps01": {
            "model.short_conv": 4,
            "model.key_dim": 512,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "model.head_norm_epsilon": 0.1,
        },
        "conv_seq128relu": {
            "model.short_conv": 4,
            "data.sequence_length": 128,
            "train.batch_size": 16,
            "model.head_norm_epsilon": 0.01,
            "model.feature_map": "relu",
        },
        "conv_seq128k256relu": {
            "model.short_conv": 4,
            "data.sequence_length": 128,
            "train.batch_size": 16,
            "model.head_norm_epsilon": 0.01,
            "model.feature_map": "relu",
            "model.key_dim": 256,
        },
        "conv_seq64": {
            "model.short_conv": 4,
            "data.sequence_length": 64,
            "train.batch_size": 32,
            "model.head_norm_epsilon": 0.01,
        },
        "relu2": _WINDOWS_OF_128 | {"model.feature_map": "relu2"},
        "relu_fast": _WINDOWS_OF_128 | {"model.decay_range": (0.125, 1 / 512)},
        "relu_qk": _WINDOWS_OF_128 | {"model.qk_norm": True},
        "relu_h2": _WINDOWS_OF_128 | {"model.n_heads": 2, "model.decay_range": (1 / 16, 1 / 512)},
        "relu_k512": _WINDOWS_OF_128 | {"model.key_dim": 512},
        "relu_lr2": _WINDOWS_OF_128 | {"optimizer.learning_rate": 0.02},
        "relu_mulr6": _WINDOWS_OF_128 | {"optimizer.muon_learning_rate": 0.06},
        "relu_none": _WINDOWS_OF_128 | {"model.feature_map": None},
    },
    "transformer": {
        "base": {},
        "qkz": {"model.qk_norm": True, "model.init": "zero_outputs"},
        "L4": {
            "train.steps": 435,
            "model.n_layers": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
        },
        "v1024": {
            "train.steps": 1020,
            "model.vocab_size": 1024,
            "data.store": "data/stdlib_bpe1024_search",
            "model.qk_norm": True,
            "model.init": "zero_outputs",
        },
        "conv": {"model.qk_norm": True, "model.init": "zero_outputs", "model.short_conv": 4},
        "mulr2": {
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "optimizer.muon_learning_rate": 0.02,
        },
        "conv_mulr2": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "optimizer.muon_learning_rate": 0.02,
        },
        "conv_h4": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "model.n_heads": 4,
        },
        "conv_seq128": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "data.sequence_length": 128,
            "train.batch_size": 16,
        },
        "conv_lr2": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "optimizer.learning_rate": 0.02,
        },
        "conv_seq512": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "data.sequence_length": 512,
            "train.batch_size": 4,
        },
        "conv_qk": {"model.short_conv": 4, "model.qk_norm": True},
        "conv_modern": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "model.norm": "rms",
            "model.ffn": "swiglu",
            "model.ffn_dim": 341,
        },
        "conv_zero": {"model.short_conv": 4, "model.init": "zero_outputs"},
        "conv_h1": {
            "model.short_conv": 4,
            "model.qk_norm": True,
            "model.init": "zero_outputs",
            "model.n_heads": 1,
        },
        "conv_v1024": {
            "train.steps": 1020,
            "model.short_conv": 4,
            "model.vocab_size": 1024,
            "data.store": "data/stdlib_bpe1024_search",
            "model.qk_norm": True,
            "model.init": "zero_outputs",
        },
    },
}


def base(architecture: str) -> Config:
    """The quickstart's config before the search, with a third of its steps."""
    model = ModelConfig(
        vocab_size=4096,
        d_model=128,
        n_layers=2,
        n_heads=4,
        decay_range=(1 / 2, 1 / 512),
        tie_embeddings=True,
    )
    return Config(
        model=model.built_as(architecture, n_heads=2),
        data=DataConfig(store="data/stdlib_bpe4096_search", held_out=HELD_OUT, sequence_length=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            muon_learning_rate=0.04,
            beta2=0.95,
            weight_decay=0.0,
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=20,
            decay_share=0.5,
        ),
        train=TrainConfig(
            steps=600, batch_size=8, log_every=50, eval_every=10_000, checkpoint_every=200
        ),
    )


def runs(budget: str, records: Records) -> list[Run]:
    """All runs of a budget; the small one has the first of each model, with 30 steps."""
    found = []
    for architecture, search in SEARCH.items():
        for name, options in search.items():
            config = with_options(base(architecture), options)
            about = {"architecture": architecture, "changed": options}
            if budget == "small":
                config.train.steps = 30
            if budget != "small" or not options:
                found.append(Run(f"{architecture}_{name}", config, about, _measure(config)))
    return found


def with_options(config: Config, options: dict[str, Any]) -> Config:
    """A copy of a config with some options set, by names such as "model.n_heads"."""
    config = copy.deepcopy(config)
    for name, value in options.items():
        section, _, field = name.rpartition(".")
        part = getattr(config, section) if section else config
        if not hasattr(part, field):
            raise KeyError(f"there is no option {name}")
        setattr(part, field, value)
    config.check()
    return config


def _measure(config: Config):
    """Measures a trained model on the validation documents."""

    def is_validation(name: str) -> bool:
        return hash_of_name(name) >= QUICKSTART_HELD_OUT and not re.search(GENERATED, name)

    def measure(result: TrainResult) -> dict[str, Any]:
        store = open_store(config.data.store)
        chosen = chosen_documents(store, is_validation)
        found = document_bits(result.model, store, chosen, config.data.sequence_length)
        for of_protocol in found.values():
            del of_protocol["bits"]
        return {"validation": found}

    return measure


def report(budget: str, records: Records) -> str:
    """The runs of each model, the best first, as Markdown."""
    tables = []
    for architecture in SEARCH:
        found = [x for x in records.values() if x["architecture"] == architecture]
        table = Table(architecture, COLUMNS)
        for record in sorted(found, key=lambda x: best_bits_per_byte(x["validation"])):
            table.add(*_cells(record))
        tables.append(table)
    return "\n\n".join(table.markdown for table in tables)


COLUMNS = ("run", "bits/byte", "window", "tokens", "parameters", "skipped", "changed")


def _cells(record: dict[str, Any]) -> list[str]:
    window = record["validation"]["window"]
    changed = ", ".join(f"{name}={value}" for name, value in record["changed"].items())
    return [
        record["name"].partition("_")[2],
        f"{best_bits_per_byte(record['validation']):.4f}",
        f"{window['bits_per_byte']:.4f}",
        f"{record['tokens']:,}",
        f"{record['parameters']:,}",
        str(record["skipped_steps"]),
        changed,
    ]


if __name__ == "__main__":
    main(sys.modules[__name__])
