"""Scores of continuations equal those of plain loops, and shared prefixes are read once."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from retnet_jax import ModelConfig, RetNet, Transformer
from retnet_jax.config import MeshConfig
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation import rows_of_branches
from retnet_jax.evaluation.prefix_trie import LONGEST_NODE, PrefixTrie, Request, nodes_from
from retnet_jax.evaluation.reading_order import LENGTH_STEP, MOST_LENGTHS, Lengths
from retnet_jax.evaluation.rows_of_branches import with_branches
from retnet_jax.evaluation.scoring import score, score_trie
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import with_shardings

VOCABULARY = 24
CONFIG = ModelConfig(vocab_size=VOCABULARY, d_model=16, n_layers=2, n_heads=2, chunk_size=8)
KINDS = (RetNet, Transformer)
# For tests that take long.
MOST = [RetNet, pytest.param(Transformer, marks=pytest.mark.slow)]


def build(kind, **options):
    config = dataclasses.replace(CONFIG, **options)

    @jax.jit
    def made():
        model = kind(config, rngs=nnx.Rngs(0))
        # Larger parameters; otherwise the predictions of an untrained model are close to uniform.
        model.embedding = nnx.Param(model.embedding[...] * 50)
        model.head = nnx.Param(model.head[...] * 50)
        return model

    return made()


MODELS = {kind: build(kind) for kind in KINDS}


def requests_of_a_task(rng, questions=7, choices=3, prompt=40):
    """A shared prompt, questions of random lengths, and choices with a common beginning."""
    draw = lambda n: rng.integers(1, VOCABULARY, n).tolist()  # noqa: E731
    shared = [0, *draw(prompt)]
    requests = []
    for _ in range(questions):
        context = shared + draw(rng.integers(1, 30))
        begin = draw(2)
        requests += [Request(context, begin + draw(rng.integers(1, 6))) for _ in range(choices)]
    return requests


@jax.jit
def parallel_log_p(model, tokens):
    return jax.nn.log_softmax(model(tokens, form="parallel")[0])


def by_definition(model, requests):
    """Each request in its own parallel pass; sums in float64."""
    longest = max(len(context) + len(continuation) for context, continuation in requests)
    expected = []
    for context, continuation in requests:
        tokens = np.zeros(longest, np.int32)
        tokens[: len(context) + len(continuation)] = [*context, *continuation]
        log_p = np.asarray(parallel_log_p(model, tokens[None])[0], np.float64)
        places = len(context) - 1 + np.arange(len(continuation))
        greedy = (log_p[places].argmax(-1) == continuation).all()
        expected.append((log_p[places, continuation].sum(), bool(greedy)))
    return expected


def assert_same(found, expected):
    likelihoods = np.array([score[0] for score in expected])
    assert [score.log_likelihood for score in found] == pytest.approx(likelihoods, rel=1e-5)
    assert [score.is_greedy for score in found] == [score[1] for score in expected]


@pytest.mark.parametrize("kind", MOST)
def test_scores_equal_those_of_separate_requests_in_the_given_order(kind):
    rng = np.random.default_rng(0)
    model, requests = MODELS[kind], requests_of_a_task(rng)
    # Greedy continuations, a repeated request, a continuation of one token, and a context that is
    # the continuation of another request.
    context = requests[0].context
    greedy = []
    for _ in range(3):
        row = np.array([*context, *greedy])
        greedy.append(int(np.asarray(parallel_log_p(model, row[None]))[0, -1].argmax()))
    requests += [Request(context, greedy), requests[4], Request([0], context[1:9])]
    requests += [Request(context, greedy[:1]), Request(context[:5], [*context[5:], 3])]
    requests = [requests[i] for i in rng.permutation(len(requests))]
    expected = by_definition(model, requests)
    assert sum(greedy for _, greedy in expected) >= 2
    assert_same(score(model, requests, batch_size=4), expected)


@pytest.mark.parametrize("kind", [pytest.param(RetNet, marks=pytest.mark.slow), Transformer])
def test_sharing_prefixes_changes_no_score(kind):
    model, requests = MODELS[kind], requests_of_a_task(np.random.default_rng(1))
    shared, separate = (PrefixTrie(requests, reuse=reuse) for reuse in (True, False))
    assert shared.tokens < separate.tokens / 2
    assert separate.tokens == separate.tokens_unshared == shared.tokens_unshared
    found, expected = (score_trie(model, trie, batch_size=8) for trie in (shared, separate))
    assert_same(found, expected)


def test_prompt_and_questions_are_read_once():
    rng = np.random.default_rng(2)
    requests = requests_of_a_task(rng, questions=5, choices=4, prompt=100)
    read = []
    found = score(MODELS[RetNet], requests, batch_size=4, progress=read.append)
    assert len(found) == 20
    prompts, questions = 101, sum(len(x.context) - 101 for x in requests[::4])
    continuations = sum(len(x.continuation) for x in requests)
    assert sum(read) == PrefixTrie(requests).tokens <= prompts + questions + continuations


def least_cost(lengths, cost):
    """The smallest sum of padded lengths and of the costs of sizes, by trying all sizes."""
    sizes = sorted({-(-x // LENGTH_STEP) * LENGTH_STEP for x in lengths})
    choices = itertools.chain.from_iterable(
        itertools.combinations(sizes[:-1], number) for number in range(len(sizes))
    )
    return min(
        sum(min(x for x in (*chosen, sizes[-1]) if x >= length) for length in lengths)
        + cost * (len(chosen) + 1)
        for chosen in choices
    )


@given(st.lists(st.integers(1, 32), min_size=1, max_size=30), st.integers(0, 40))
def test_lengths_have_the_least_cost(lengths, cost):
    found = Lengths(lengths, cost)
    padded = [found.padded(x) for x in lengths]
    assert all(x >= length for x, length in zip(padded, lengths, strict=True))
    assert sum(padded) + cost * len(set(padded)) <= least_cost(lengths, cost)


def test_lengths_are_few():
    found = Lengths(range(1, 500), 0)
    assert len({found.padded(x) for x in range(1, 500)}) == MOST_LENGTHS


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=20))
def test_a_trie_has_each_prefix_once_and_queries_every_token(rows):
    requests = [Request(row[:1], row[1:]) for row in rows]
    trie = PrefixTrie(requests)
    inputs = [tuple(row[:-1]) for row in rows]
    assert trie.tokens == len({row[:n] for row in inputs for n in range(1, len(row) + 1)})
    asked = [{} for _ in rows]
    for node in trie.nodes():
        path, above = list(node.tokens), node.parent
        while above is not None:
            path, above = [*above.tokens, *path], above.parent
        start = len(path) - len(node.tokens)
        for request, first, stop, last in node.asked:
            for query in [*range(first, stop), last]:
                offset, target = node.queries[query]
                assert path[: start + offset + 1] == rows[request][: start + offset + 1]
                asked[request][start + offset + 1] = target
    # Each token of a continuation is queried once, after the tokens before it.
    assert asked == [dict(enumerate(row[1:], start=1)) for row in rows]


OPTIONS = [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"short_conv": 3}, marks=pytest.mark.slow),
    pytest.param({"window": 7}, marks=pytest.mark.slow),
    {"short_conv": 4, "window": 9, "n_kv_heads": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_of_branches_give_the_scores_of_separate_requests(options, monkeypatch):
    """Of a Transformer; with rows so short that some continue a state and some do not."""
    monkeypatch.setattr(rows_of_branches, "LONGEST_ROW", 40)
    monkeypatch.setattr(rows_of_branches, "FULL_ROW", 16)
    monkeypatch.setattr(rows_of_branches, "SHORT_PATH", 4)
    model, rng = build(Transformer, **options), np.random.default_rng(8)
    requests = requests_of_a_task(rng, questions=5, prompt=50)
    requests += requests_of_a_task(rng, questions=4, prompt=1)
    requests += [Request([3, 1], [2]), Request([3, 1, 2], [9, 9]), Request([0], [5])]
    trie = PrefixTrie(requests)
    rows = [node for node in nodes_from(with_branches(trie)) if node.branches is not None]
    assert {node.parent is None for node in rows} == {True, False}
    assert max(node.repeated for node in rows) > 0
    read = []
    found = score_trie(model, trie, batch_size=4, progress=read.append)
    assert_same(found, by_definition(model, requests))
    assert sum(read) == trie.tokens


@pytest.mark.parametrize("kind", MOST)
def test_prompts_longer_than_a_node(kind):
    rng = np.random.default_rng(3)
    requests = requests_of_a_task(rng, questions=3, choices=2, prompt=2 * LONGEST_NODE + 100)
    assert max(len(node.tokens) for node in PrefixTrie(requests).nodes()) == LONGEST_NODE
    found = score(MODELS[kind], requests, batch_size=2)
    assert_same(found, by_definition(MODELS[kind], requests))


def test_too_long_requests_lose_their_beginning_and_are_counted():
    requests = requests_of_a_task(np.random.default_rng(4), questions=3)
    trie = PrefixTrie(requests, max_length=30)
    assert trie.truncated == len(requests)
    cut = [
        Request(([*context, *continuation[:-1]])[-30:][: 31 - len(continuation)], continuation)
        for context, continuation in requests
    ]
    assert {len(x.context) + len(x.continuation) for x in cut} == {31}
    found = score_trie(MODELS[RetNet], trie, batch_size=4)
    assert_same(found, by_definition(MODELS[RetNet], cut))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RetNet, Transformer])
def test_scores_on_a_mesh_are_the_same(kind):
    model, requests = MODELS[kind], requests_of_a_task(np.random.default_rng(5))
    expected = score(model, requests, batch_size=8)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(lambda x: x.sharding, with_shardings(model, mesh))
    with jax.set_mesh(mesh):
        found = score(jax.device_put(model, shardings), requests, batch_size=8)
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.compiles(60, reason="batches of 12 lengths, with several numbers of rows and queries")
def test_the_number_of_states_does_not_grow_with_the_requests():
    """Only the states of a few batches are kept, not those of all questions."""
    from retnet_jax.evaluation import scoring

    sizes = []

    class Pool(scoring._Pool):
        def read(self, batch):
            answers = super().read(batch)
            sizes.append(len(self.slots))
            return answers

    requests = requests_of_a_task(np.random.default_rng(6), questions=150, choices=4, prompt=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_Pool", Pool)
        found = score(MODELS[RetNet], requests, batch_size=8)
    assert len(found) == 600
    assert max(sizes) < MOST_LENGTHS * 8


def constant_model(log_p):
    """A model that always predicts one distribution: its last norm's output is constant."""
    model = RetNet(CONFIG, rngs=nnx.Rngs(0))
    unit = np.zeros(CONFIG.d_model, np.float32)
    unit[0] = 1.0
    model.final_norm.scale = nnx.Param(jnp.zeros(CONFIG.d_model))
    model.final_norm.bias = nnx.Param(jnp.asarray(unit))
    model.head = nnx.Param(jnp.asarray(np.outer(log_p, unit), jnp.float32))
    return model


def test_a_unigram_model_scores_its_entropy():
    rng = np.random.default_rng(7)
    counts = rng.integers(1, 50, VOCABULARY)
    text = rng.permutation(np.repeat(np.arange(VOCABULARY), counts)).tolist()
    p = counts / counts.sum()
    (found,) = score(constant_model(np.log(p)), [([0], text)])
    entropy = -(p * np.log(p)).sum()
    assert -found.log_likelihood / len(text) == pytest.approx(entropy, rel=1e-5)
    (likeliest,) = score(constant_model(np.log(p)), [([0], [int(p.argmax())] * 5)])
    assert likeliest.is_greedy
    assert not found.is_greedy


BAD = [
    ([([], [1])], "request 0 has an empty context"),
    ([([0], [1]), ([0], [])], "request 1 has an empty continuation"),
    ([([0, 24], [1])], "token id 24, but the model knows ids from 0 to 23"),
    ([([0], [1, -1])], "token id -1"),
    ([([0], [1, 99])], "token id 99"),
]


@pytest.mark.parametrize(("requests", "message"), BAD)
def test_invalid_requests_are_refused(requests, message):
    with pytest.raises(ConfigError, match=message):
        score(MODELS[RetNet], requests)


def test_a_continuation_longer_than_max_length_is_refused():
    with pytest.raises(ConfigError, match=r"request 0 has .* of 9 tokens.*max_length=8"):
        score(MODELS[RetNet], [([0], [1] * 9)], max_length=8)


def test_no_requests_give_no_scores():
    assert score(MODELS[RetNet], []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_infinity_raises_instead_of_scoring(kind):
    model = jax.tree.map(lambda x: x, MODELS[kind])
    model.embedding = nnx.Param(model.embedding[...].at[7].set(jnp.inf))
    # Branches of one row share it, so both of them fail.
    few = r"2 of 2 requests \(first: request 0\)"
    if kind is RetNet:
        few = r"1 of 2 requests \(first: request 1\)"
    message = rf"{few}: 16 of the 384 .* embedding"
    with pytest.raises(CheckpointError, match=message):
        score(model, [([0, 3], [4, 5]), ([0, 7], [4, 5])])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([0, 1.5], [2]), r"the context of request 0 has .*0.0.* \(float64\); token ids are"),
        (([0, 1], [-2]), "the continuation of request 0 has the token id -2"),
        (([0, 1], [2**31]), "the continuation of request 0 has the token id 2147483648"),
        (([0, 24], [2]), "has the token id 24, but the model knows ids from 0 to 23"),
        ((0, 1), "the context of request 0 is '0', no list of token ids"),
        ([0, 1, 2], r"request 0 is '\[0, 1, 2\]', not a pair of context and continuation"),
    ],
)
def test_requests_without_token_ids_are_refused(request_, message):
    with pytest.raises(ConfigError, match=message):
        score(MODELS[RetNet], [request_])
