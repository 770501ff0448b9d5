"""Training in bfloat16: no NaN in a deep model, and the loss curve of float32."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from retnet_jax import Config, ModelConfig
from retnet_jax.config import DataConfig, OptimizerConfig, TrainConfig
from retnet_jax.data import BatchStream
from retnet_jax.data.stores import open_or_build
from retnet_jax.training.step import initial_state, train_step

STEPS = 500


@pytest.mark.slow
def test_bfloat16_follows_float32_for_500_steps_of_32_layers(tmp_path):
    # The text is the licence, which does not change with the code.
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    for number, paragraph in enumerate(text.split("\n\n")):
        (tmp_path / f"{number}.txt").write_text(paragraph, encoding="utf-8")
    config = Config(
        model=ModelConfig(vocab_size=257, d_model=32, n_layers=32, n_heads=2),
        data=DataConfig(
            source="text",
            path=str(tmp_path / "*.txt"),
            tokenizer="byte",
            store=str(tmp_path / "store"),
            held_out=0.1,
            sequence_length=64,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
        train=TrainConfig(steps=STEPS, batch_size=4),
    )
    store = open_or_build(config.data, config.model.vocab_size)
    stream = BatchStream([store.train], [1.0], sequence_length=64, batch_size=4, bos_id=256, seed=0)

    def curve(dtype):
        model = dataclasses.replace(config.model, dtype=dtype)
        typed = dataclasses.replace(config, model=model)
        state = jax.jit(partial(initial_state, typed))()
        step = jax.jit(partial(train_step, typed), donate_argnums=0)
        losses = []
        for number in range(STEPS):
            state, metrics = step(state, stream[number])
            losses.append(metrics.loss)
        return np.asarray(losses, np.float64)

    half, full = curve("bfloat16"), curve("float32")
    assert np.isfinite(half).all()
    assert full[-20:].mean() < 0.6 * full[0]
    # Losses of single batches vary more than the models differ, so means of 20 steps are compared.
    smooth = [x.reshape(-1, 20).mean(1) for x in (half, full)]
    assert np.abs(smooth[0] / smooth[1] - 1).max() <= 0.01
