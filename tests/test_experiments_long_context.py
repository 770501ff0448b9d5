"""Long contexts: which tokens are scored, and what their losses and differences are."""

import math

import numpy as np
import pytest
from flax import nnx
from training_runs import small_config

from experiments import figures, long_context
from experiments.long_context import last_losses, sums_by_position
from experiments.long_context_report import FIRST_POSITIONS, last_loss, position_loss
from retnet_jax import RetNet
from retnet_jax.config.as_json import flatten
from retnet_jax.data.stores import open_or_build
from retnet_jax.evaluation.perplexity import stateful_nll


def record(model, seed, *, nats=100.0, helps=0.0):
    """An invented record: two pieces of document 3, one of document 5."""
    contexts = {str(x): [nats - helps * math.log2(x)] * 3 for x in (128, 256, 512)}
    tokens = [[128, 128, 44, *[0] * 7], [128, 100, *[0] * 8]]
    window = [[128.0, 128.0, 44.0, *[0] * 7], [128.0, 100.0, *[0] * 8]]
    of = {"window": window}
    if model.startswith("retnet"):
        of["stateful"] = [[128.0, 64.0, 11.0, *[0] * 7], [128.0, 50.0, *[0] * 8]]
    return {
        **{"name": f"{model}_{seed}", "model": model, "seed": seed},
        **{"parameters": 1_000_000, "tokens": 2_662_400},
        "last": {"documents": [3, 3, 5], "bytes": [256, 256, 512], "nats": contexts},
        "positions": {"tokens": tokens, "nats": of},
    }


def named(*records):
    return {x["name"]: x for x in records}


def test_carried_and_its_control_differ_by_the_state():
    runs = {run.name: flatten(run.config) for run in long_context.runs("2cores", {})}
    one, other = runs["retnet_256_carried_1"], runs["retnet_256_in_order_1"]
    assert {name for name in one if one[name] != other[name]} == {"train.carry_state"}
    for options in runs.values():
        assert options["train.batch_size"] * options["data.sequence_length"] == 2048


def test_losses_of_the_last_tokens(tmp_path):
    config = small_config(tmp_path)
    config.data.held_out = 0.5
    store = open_or_build(config.data, config.model.vocab_size)
    model = RetNet(config.model, rngs=nnx.Rngs(0))
    lengths = store.held_out.lengths.tolist()
    chosen = [i for i, length in enumerate(lengths) if length > 256]
    found = last_losses(model, store, chosen, (128, 256))
    places = [(i, k) for i in chosen for k in range((lengths[i] - 1) // 256)]
    assert len(places) > len(chosen) > 1  # a document has several pieces
    assert found["documents"] == [i for i, _ in places]
    assert found["bytes"] == [128] * len(places)  # the tokenizer is of bytes
    pieces = [store.held_out.document(i)[256 * k : 256 * k + 257] for i, k in places]
    whole = stateful_nll(model, pieces, batch_size=8)
    ends = stateful_nll(model, [piece[128:] for piece in pieces], batch_size=8)
    assert found["nats"]["256"] == pytest.approx([x[-128:].sum() for x in whole], abs=0.01)
    assert found["nats"]["128"] == pytest.approx([x.sum() for x in ends], abs=0.01)


def test_sums_by_position():
    values = np.arange(300.0)
    found = sums_by_position(values)
    assert found[:3].tolist() == [values[:128].sum(), values[128:256].sum(), values[256:].sum()]
    assert found[3:].tolist() == [0] * (len(FIRST_POSITIONS) - 3)
    long = sums_by_position(np.ones(40_000))
    assert (long[0], long[-2], long[-1]) == (128, 16_384, 40_000 - 32_768)


def test_units_and_differences_of_the_last_tokens():
    records = named(
        record("retnet_256", 0, nats=128.0, helps=1.28),
        record("retnet_256", 1, nats=128.0, helps=3.84),
        record("transformer_256", 0, nats=256.0, helps=1.28),
    )
    assert last_loss(records, "transformer_256", 128).mean == pytest.approx(2 - 0.07)
    # 128 tokens of two, two and four bytes each
    per_byte = last_loss(records, "transformer_256", 128, per="byte").mean
    assert per_byte == pytest.approx(3 * 128 * 1.93 / 1024 / math.log(2))
    change = last_loss(records, "retnet_256", 512, other_context=128)
    assert change.each == pytest.approx((-0.02, -0.06))
    assert change.of_documents == pytest.approx(0)
    pair = last_loss(records, "retnet_256", 128, other="transformer_256")
    assert pair.each == pytest.approx((-1.0,))  # seed 1 of the other is not made yet
    assert last_loss(records, "retnet_1024", 128) is None


def test_losses_by_position_are_of_the_documents_that_reach_it():
    records = named(record("retnet_256", 0), record("transformer_256", 0))
    assert position_loss(records, "retnet_256", 1, "stateful").mean == pytest.approx(0.5)
    assert position_loss(records, "retnet_256", 2, "stateful").mean == pytest.approx(0.25)
    assert position_loss(records, "retnet_256", 2, "gain").mean == pytest.approx(0.75)
    assert math.isnan(position_loss(records, "retnet_256", 2, "gain").of_documents)
    assert position_loss(records, "retnet_256", 3, "stateful") is None
    assert position_loss(records, "transformer_256", 1, "gain") is None
    assert position_loss(records, "transformer_256", 1, "window").mean == 1


def test_tables_and_figures_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "OF_SMALL_RUNS", tmp_path)
    records = named(record("retnet_256", 0, helps=2.0), record("transformer_256", 0))
    page = long_context.report("small", records)
    assert "| 512 | -0.0703 |" not in page  # the context that others are compared with
    assert f"| 128 | {2.0 * 2 / 128:+.4f} ± 0.0000 |" in page
    assert "| 256 to 511 | 1 | +0.7500 |" in page
    for name in ("long_context", "loss_by_position"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
