"""Which recipe is best for a small RetNet, and which for a Transformer of its size?

Both models have the same number of runs (`SEARCH`), each of 1.2M tokens, on the source code of
Python's standard library. A run is judged by the bits per byte of validation documents, which are
neither trained on nor among the held-out documents of the quickstart. Later runs of the table are
variations of the best runs before them. The best recipe of each model then is the quickstart's
(`retnet_jax/configs/quickstart.py`), which is trained with three seeds and evaluated on its
held-out documents (`python -m experiments.quickstart`). Eight RetNets more were tried with a patch
before `model.rotation=none` existed; docs/results_tables.md has them.

    python -m experiments.recipe                  all runs: 2 to 4 minutes each on one core
    python -m experiments.recipe --budget=small   two runs of a few steps, to see that it works

The documents of the standard library are those of the Python that runs it; results are of 3.11.7.

The committed records name their commits. The first 39, and relu_lr4 and relu_lr8, were made by the
same configs and measures in a script, while this module was written. Of those 39 the ones with
`model.head_norm_epsilon` had it set by hand, because the option is younger than d7e3cad.
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
from retnet_jax.evaluation.tables import Table, as_markdown
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "2cores")
# Shares of the documents: the quickstart holds out the first, this experiment the second, and
# validates on the difference.
QUICKSTART_HELD_OUT, HELD_OUT = 0.12, 0.16

_CONV = {"model.short_conv": 4}
_QKZ = {"model.qk_norm": True, "model.init": "zero_outputs"}
_LONG_KEYS = _CONV | {"model.key_dim": 512}
_EPSILON = {"model.head_norm_epsilon": 0.01}
_SEQ64 = {"data.sequence_length": 64, "train.batch_size": 32}
_SEQ128 = {"data.sequence_length": 128, "train.batch_size": 16}
_SEQ512 = {"data.sequence_length": 512, "train.batch_size": 4}
_SEQ1024 = {"data.sequence_length": 1024, "train.batch_size": 2}
_WORDS1024 = {
    "train.steps": 1020,
    "model.vocab_size": 1024,
    "data.store": "data/stdlib_bpe1024_search",
}
_RELU = _CONV | _SEQ128 | _EPSILON | {"model.feature_map": "relu", "model.key_dim": 256}
_RECALLING = _QKZ | _CONV | _SEQ512  # the best Transformer of the first sixteen
_NO_ROTATION = {"model.rotation": "none"}


def _rate(learning_rate: float) -> dict[str, Any]:
    """Learning rate of the parameters that muon leaves to Adam, the embedding above all."""
    return {"optimizer.learning_rate": learning_rate}


def _muon_rate(learning_rate: float) -> dict[str, Any]:
    return {"optimizer.muon_learning_rate": learning_rate}


# What is changed in `base`, by the name of the run.
SEARCH: dict[str, dict[str, dict[str, Any]]] = {
    "retnet": {
        "base": {},
        "batch4": {"train.steps": 1200, "train.batch_size": 4},
        "h2": {"model.n_heads": 2},
        "conv": _CONV,
        "v1024": _WORDS1024,
        "L4": {"train.steps": 435, "model.n_layers": 4},
        "k512": {"train.steps": 520, "model.key_dim": 512},
        "seq1024": _SEQ1024,
        "conv_mulr2": _CONV | _muon_rate(0.02),
        "conv_seq128": _CONV | _SEQ128,
        "conv_qkz": _CONV | _QKZ,
        "conv_k512qkz": _LONG_KEYS | _QKZ,
        "conv_k512": _LONG_KEYS,
        "conv_slow": _CONV | {"model.decay_range": (0.0625, 0.001)},
        "conv_none": _CONV | {"model.decay": "none"},
        "conv_nohn": _LONG_KEYS | _QKZ | {"model.head_norm": False},
        "conv_heps1": _LONG_KEYS | _QKZ | {"model.head_norm_epsilon": 1.0},
        "conv_relu": _LONG_KEYS | _EPSILON | {"model.feature_map": "relu"},
        "conv_sigm": _LONG_KEYS
        | _EPSILON
        | {"model.feature_map": "sigmoid", "model.qk_norm": True},
        "conv_heps01": _LONG_KEYS | _QKZ | {"model.head_norm_epsilon": 0.1},
        "conv_seq128relu": _CONV | _SEQ128 | _EPSILON | {"model.feature_map": "relu"},
        "conv_seq128k256relu": _RELU,
        "conv_seq64": _CONV | _SEQ64 | _EPSILON,
        "relu2": _RELU | {"model.feature_map": "relu2"},
        "relu_fast": _RELU | {"model.decay_range": (0.125, 1 / 512)},
        "relu_qk": _RELU | {"model.qk_norm": True},
        "relu_h2": _RELU | {"model.n_heads": 2, "model.decay_range": (1 / 16, 1 / 512)},
        "relu_k512": _RELU | {"model.key_dim": 512},
        "relu_lr2": _RELU | _rate(0.02),
        "relu_mulr6": _RELU | _muon_rate(0.06),
        "relu_none": _RELU | {"model.feature_map": None},
        "relu_lr4": _RELU | _rate(0.04),
        "relu_lr8": _RELU | _rate(0.08),
        "nope_lr6": _RELU | _NO_ROTATION | _rate(0.06),
        "nope_k512_lr4": _RELU | _NO_ROTATION | _rate(0.04) | {"model.key_dim": 512},
        "nope_k512_heps0001_lr4": _RELU
        | _NO_ROTATION
        | _rate(0.04)
        | {"model.key_dim": 512, "model.head_norm_epsilon": 1e-4},
        "nope_k512_carry": _RELU
        | _NO_ROTATION
        | _rate(0.04)
        | {"model.key_dim": 512, "model.head_norm_epsilon": 1e-4}
        | {"data.windows": "contiguous", "train.carry_state": True},
        "nope_k512_seq256": _RELU
        | _NO_ROTATION
        | _rate(0.04)
        | {"model.key_dim": 512, "model.head_norm_epsilon": 1e-4}
        | {"data.sequence_length": 256, "train.batch_size": 8},
        "nope_k512_seq64": _RELU
        | _NO_ROTATION
        | _rate(0.04)
        | {"model.key_dim": 512, "model.head_norm_epsilon": 1e-4}
        | _SEQ64,
        "nope_k512_decay8": _RELU
        | _NO_ROTATION
        | _rate(0.04)
        | {"model.key_dim": 512, "model.head_norm_epsilon": 1e-4, "optimizer.decay_share": 0.8},
        "nope_k512_v128_lr4": _RELU
        | _NO_ROTATION
        | _rate(0.04)
        | {"model.key_dim": 512, "model.value_dim": 128},
    },
    "transformer": {
        "base": {},
        "qkz": _QKZ,
        "L4": _QKZ | {"train.steps": 435, "model.n_layers": 4},
        "v1024": _QKZ | _WORDS1024,
        "conv": _QKZ | _CONV,
        "mulr2": _QKZ | _muon_rate(0.02),
        "conv_mulr2": _QKZ | _CONV | _muon_rate(0.02),
        "conv_h4": _QKZ | _CONV | {"model.n_heads": 4},
        "conv_seq128": _QKZ | _CONV | _SEQ128,
        "conv_lr2": _QKZ | _CONV | _rate(0.02),
        "conv_seq512": _QKZ | _CONV | _SEQ512,
        "conv_qk": _CONV | {"model.qk_norm": True},
        "conv_modern": _QKZ
        | _CONV
        | {"model.norm": "rms", "model.ffn": "swiglu", "model.ffn_dim": 341},
        "conv_zero": _CONV | {"model.init": "zero_outputs"},
        "conv_h1": _QKZ | _CONV | {"model.n_heads": 1},
        "conv_v1024": _QKZ | _CONV | _WORDS1024,
        "seq512_lr2": _RECALLING | _rate(0.02),
        "seq512_lr3": _RECALLING | _rate(0.03),
        "seq512_lr4": _RECALLING | _rate(0.04),
        "seq512_lr6": _RECALLING | _rate(0.06),
        "nope": _RECALLING | _NO_ROTATION,
        "nope_lr2": _RECALLING | _NO_ROTATION | _rate(0.02),
        "nope_lr4": _RECALLING | _NO_ROTATION | _rate(0.04),
        "seq512_h1": _RECALLING | {"model.n_heads": 1},
        "seq512_h1_lr3": _RECALLING | {"model.n_heads": 1} | _rate(0.03),
        "seq512_h1_lr2": _RECALLING | {"model.n_heads": 1} | _rate(0.02),
        "seq512_decay8_lr3": _RECALLING | _rate(0.03) | {"optimizer.decay_share": 0.8},
        "nope_h1_lr2": _RECALLING | _NO_ROTATION | {"model.n_heads": 1} | _rate(0.02),
        "nope_seq1024_lr2": _RECALLING | _NO_ROTATION | _SEQ1024 | _rate(0.02),
        "seq512_mulr6": _RECALLING | _muon_rate(0.06),
        "seq1024": _RECALLING | _SEQ1024,
        "seq1024_lr2": _RECALLING | _SEQ1024 | _rate(0.02),
        "seq1024_lr4": _RECALLING | _SEQ1024 | _rate(0.04),
        "seq512_mulr6_lr2": _RECALLING | _muon_rate(0.06) | _rate(0.02),
        "seq512_mulr2_lr2": _RECALLING | _muon_rate(0.02) | _rate(0.02),
        "seq512_k256": _RECALLING | {"model.key_dim": 256, "model.value_dim": 256},
        "seq512_k256_lr2": _RECALLING
        | {"model.key_dim": 256, "model.value_dim": 256}
        | _rate(0.02),
        "seq512_qk_lr2": _RECALLING | {"model.init": "scaled"} | _rate(0.02),
        "seq512_rms_lr2": _RECALLING | {"model.norm": "rms"} | _rate(0.02),
        "seq512_batch2_lr2": _RECALLING
        | {"train.steps": 1200, "train.batch_size": 2}
        | _rate(0.02),
        "seq512_ffn768_lr2": _RECALLING | {"model.ffn_dim": 768} | _rate(0.02),
    },
}


def base(architecture: str) -> Config:
    """The quickstart's config before the search, with 600 steps."""
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
                found.append(Run(f"{architecture}_{name}", config, about, _measure(config, budget)))
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


def _measure(config: Config, budget: str):
    """Measures a trained model on the validation documents."""

    def is_validation(name: str) -> bool:
        return hash_of_name(name) >= QUICKSTART_HELD_OUT and not re.search(GENERATED, name)

    def measure(result: TrainResult) -> dict[str, Any]:
        store = open_store(config.data.store)
        chosen = chosen_documents(store, is_validation, budget)
        found = document_bits(result.model, store, chosen, config.data.sequence_length)
        for of_protocol in found.values():
            del of_protocol["bits"]
        return {"validation": found}

    return measure


def report(budget: str, records: Records) -> str:
    """The tables as Markdown; there is no figure."""
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """The runs of each model, the best first."""
    found = []
    for architecture in SEARCH:
        of_model = [x for x in records.values() if x["architecture"] == architecture]
        table = Table(architecture, COLUMNS)
        for record in sorted(of_model, key=lambda x: best_bits_per_byte(x["validation"])):
            table.add(*_cells(record))
        found.append(table)
    return found


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
