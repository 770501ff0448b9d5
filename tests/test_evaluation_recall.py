"""The recall probes ask for earlier tokens, and a uniform model answers them by chance."""

import numpy as np
import pytest
from flax import nnx
from test_evaluation_tasks import build

from retnet_jax import RetNet
from retnet_jax.evaluation.recall_probes import recall


@pytest.mark.slow
def test_recall_of_a_uniform_model_is_chance():
    uniform = nnx.clone(build(RetNet))
    uniform.head = nnx.Param(0 * uniform.head[...])
    found = recall(uniform, range(50), bos_id=256, distances=(8, 40), trials=20, vocab_size=256)
    assert [(x.probe, x.distance) for x in found] == [
        (probe, distance) for distance in (8, 40) for probe in ("associative", "copying")
    ]
    for result in found:
        assert result.nll_per_token == pytest.approx(np.log(257), rel=1e-5)
        assert result.accuracy == 0  # of equal values none is the most likely
        assert result.random == (1 / 8 if result.probe == "associative" else 0)


def test_recall_probes_ask_for_earlier_tokens():
    from retnet_jax.evaluation.recall_probes import PAIRS, SPAN, _associative, _copying

    rng, between = np.random.default_rng(0), np.full(30, 7)
    ids = rng.permutation(np.arange(10, 200))
    requests = _associative(256, ids, between, rng)
    context = requests[0].context
    key = context[-1]
    assert len(context) == 1 + 2 * PAIRS + 30 + 1
    assert requests[0].continuation == [context[context.index(key) + 1]]
    assert {x.continuation[0] for x in requests} == set(context[2 : 1 + 2 * PAIRS : 2])
    (request,) = _copying(256, ids, between, rng)
    span = [*request.context[-SPAN // 2 :], *request.continuation]
    assert request.context[1 : 1 + SPAN] == span
    assert request.context[1 + SPAN : -SPAN // 2] == [7] * 30
