"""Packed documents equal separate ones, with a real store, real batches and real models."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close

from retnet_jax import ModelConfig, RetNet, Transformer
from retnet_jax.config import DataConfig
from retnet_jax.data import BatchStream, build_store, open_store

MODELS = {
    **{form: (RetNet, form) for form in ("parallel", "chunkwise", "recurrent")},
    "attention": (Transformer, "parallel"),
}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """A window of several documents, and one that begins inside a document."""
    directory = tmp_path_factory.mktemp("packing")
    texts = [{"text": f"{number} " * (1 + number * 7 % 11)} for number in range(30)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # the split depends on file names, so the path must be fixed
        Path("corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        config = DataConfig(
            source="jsonl", path="corpus.jsonl", tokenizer="byte", store="store", held_out=0.2
        )
        build_store(config, 257)
    store = open_store(directory / "store")
    stream = BatchStream([store.train], [1.0], sequence_length=24, batch_size=3, bos_id=256, seed=0)
    chosen = next(
        found
        for found in map(stream.__getitem__, range(100))
        if found.segment_ids.max() > 2 and (found.tokens[:, 0] != 256).any()
    )
    return chosen


@pytest.mark.parametrize(
    "name",
    ["chunkwise", *(pytest.param(x, marks=pytest.mark.slow) for x in MODELS if x != "chunkwise")],
)
def test_logits_and_gradients_of_a_batch_are_those_of_its_documents(name, batch):
    kind, form = MODELS[name]
    # In float64, so that differences are not rounding errors.
    config = ModelConfig(
        vocab_size=257, d_model=16, n_layers=2, n_heads=2, chunk_size=8, dtype="float64"
    )
    with jax.enable_x64(True):
        model = jax.jit(lambda: kind(config, rngs=nnx.Rngs(0)))()
        check_packing(model, form, batch)


def check_packing(model, form, batch):
    model.embedding = nnx.Param(25 * model.embedding[...])
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids)
    parts = [
        (row, np.flatnonzero(batch.segment_ids[row] == segment))
        for row in range(len(tokens))
        for segment in range(1, batch.segment_ids[row].max() + 1)
    ]
    assert len(parts) > 4

    def packed(model):
        logits, _ = model(tokens, segment_ids=segments, form=form)
        return logits * (segments > 0)[..., None]

    def separate(model):
        logits = jnp.zeros((*tokens.shape, 257))
        for row, places in parts:
            found, _ = model(tokens[row, places][None], form=form)
            logits = logits.at[row, places].set(found[0])
        return logits

    def gradient_and_logits(function):
        def loss(model):
            logits = function(model)
            return (logits**2).sum(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(model)

    gradient, logits = gradient_and_logits(packed)
    expected_gradient, expected_logits = gradient_and_logits(separate)
    assert_close(logits, expected_logits, "float64")
    assert_close(gradient, expected_gradient)  # float32, as the parameters
