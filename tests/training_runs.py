"""Helpers for tests of whole training runs; their fixtures are in conftest.py."""

import json
from pathlib import Path

from retnet_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from retnet_jax.config.as_json import to_json
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.log import MetricsLog
from retnet_jax.training.step import StepMetrics

ROOT = Path(__file__).parent.parent
STEPS = 10


def small_config(directory):
    """A model of one layer, on the bytes of the licence's paragraphs, which are written first."""
    for number, paragraph in enumerate((ROOT / "LICENSE").read_text().split("\n\n")):
        (directory / f"paragraph_{number:03}.txt").write_text(paragraph)
    return Config(
        model=ModelConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2),
        data=DataConfig(
            source="text",
            path=str(directory / "*.txt"),
            tokenizer="byte",
            store=str(directory / "store"),
            held_out=0.2,
            sequence_length=16,
        ),
        # With this epsilon Adam makes no large steps from rounding errors of gradients near 0.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, epsilon=1e-3),
        train=TrainConfig(
            steps=STEPS,
            batch_size=8,
            log_every=1,
            eval_every=5,
            eval_batches=2,
            checkpoint_every=4,
        ),
    )


def metrics(workdir):
    """The records of metrics.jsonl with a loss, by step; each step must occur once."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len({line["step"] for line in losses}) == len(losses)
    return {line["step"]: line for line in losses}


def assert_same_losses(workdir, expected):
    actual, expected = metrics(workdir), metrics(expected)
    assert list(actual) == list(range(1, STEPS + 1))
    for step in actual:
        for name in ("loss", "gradient_norm", "learning_rate"):
            assert actual[step][name] == expected[step][name], (step, name)


def without_times(workdir):
    """The records of metrics.jsonl, in order, without the values that the clock measured."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    computed = {"step", *StepMetrics._fields}
    return [
        line if "evaluator" in line else {name: line[name] for name in line if name in computed}
        for line in lines
    ]


def evaluations(workdir):
    """Step and evaluator of each record of an evaluation."""
    return [(x["step"], x["evaluator"]) for x in without_times(workdir) if "evaluator" in x]


def at_step(monkeypatch, step, action):
    """Calls `action` when the metrics of a step are written."""
    write = MetricsLog.write

    def patched(self, now, values):
        write(self, now, values)
        if now == step and "loss" in values:
            action()

    monkeypatch.setattr(MetricsLog, "write", patched)


def latest_step(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", keep=3)
    step = checkpoints.latest_step()
    checkpoints.close()
    return step


def write_config(config, directory):
    """Writes a config file for the command line."""
    path = directory / "experiment.py"
    path.write_text(
        "from retnet_jax.config.as_json import config_from_json\n"
        f"def get_config(): return config_from_json({to_json(config)!r})\n"
    )
    return path
