"""Windows and batches: no token is lost or doubled, and a step names its batch for good."""

import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet_jax.config import ConfigError
from retnet_jax.data.pipeline import BatchStream, number_of_windows, window
from retnet_jax.data.token_store import Split

BOS = 100_000


def make_split(lengths, names_file=None):
    """Documents of BOS and `length` further tokens; each of these tokens exists once."""
    documents, token = [], 0
    for length in lengths:
        documents.append([BOS, *range(token, token + length)])
        token += length
    offsets = np.cumsum([0, *map(len, documents)])
    return Split(np.concatenate(documents), offsets, np.array(lengths), names_file)


SPLIT = make_split([5, 0, 13, 1, 30, 8])


def make_stream(split=SPLIT, **changes):
    options = {"sequence_length": 7, "batch_size": 4, "bos_id": BOS, "seed": 3}
    return BatchStream(split, **(options | changes))


def assert_equal(one, other):
    for name in one._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def rows(batches):
    """The windows of batches, as comparable tuples."""
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8), t=st.integers(1, 20))
def test_windows_are_the_stream(lengths, t):
    split = make_split(lengths)
    windows = [window(split, i, t, BOS) for i in range(number_of_windows(split, t))]
    tokens, targets, segment_ids, weights = (np.concatenate(x) for x in zip(*windows, strict=True))
    n = len(split.tokens)
    assert 0 <= len(tokens) - n < t
    np.testing.assert_array_equal(tokens[:n], split.tokens)
    np.testing.assert_array_equal(targets[:n], [*split.tokens[1:], BOS])
    np.testing.assert_array_equal(weights, np.arange(len(tokens)) < n)
    np.testing.assert_array_equal(segment_ids > 0, weights > 0)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8), t=st.integers(1, 20))
def test_segments_change_exactly_where_documents_do(lengths, t):
    split = make_split(lengths)
    document_of = np.repeat(np.arange(len(lengths)), np.diff(split.offsets))
    for i in range(number_of_windows(split, t)):
        documents = document_of[i * t : (i + 1) * t]
        segment_ids = window(split, i, t, BOS).segment_ids[: len(documents)]
        np.testing.assert_array_equal(segment_ids, documents - documents[0] + 1)


def test_window_that_is_not_there():
    with pytest.raises(IndexError, match=r"window 9 of 9 \(sequence_length=7\)"):
        window(SPLIT, 9, 7, BOS)


@pytest.mark.parametrize("batch_size", [3, 4, 20])  # 9 windows: in whole batches, not, in less
def test_every_token_once_in_an_epoch(batch_size):
    stream = make_stream(batch_size=batch_size)
    epochs = 4
    n = number_of_windows(SPLIT, 7)
    steps = -(-epochs * n // batch_size)
    seen = rows(stream[step] for step in range(steps))
    expected = sorted(tuple(window(SPLIT, i, 7, BOS).tokens) for i in range(n))
    orders = [seen[epoch * n : (epoch + 1) * n] for epoch in range(epochs)]
    assert all(sorted(order) == expected for order in orders)
    assert len(set(map(tuple, orders))) == epochs


@pytest.mark.parametrize("start", [0, 1, 5, 23])
def test_resumed_equals_uninterrupted(start):
    with make_stream().iterate() as batches:
        uninterrupted = list(itertools.islice(batches, 30))
    with make_stream().iterate(start) as batches:
        for expected in uninterrupted[start:]:
            assert_equal(next(batches), expected)


def test_a_step_is_a_batch_whoever_asks():
    stream = make_stream()
    with stream.iterate() as batches:
        for step, batch in enumerate(itertools.islice(batches, 12)):
            assert_equal(stream[step], batch)
            assert_equal(make_stream()[step], batch)


def test_seeds_give_other_orders():
    assert rows([make_stream(seed=4)[0]]) != rows([make_stream(seed=3)[0]])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_global_batch(hosts):
    parts = [make_stream(host_index=h, host_count=hosts) for h in range(hosts)]
    for step in range(12):
        whole = make_stream()[step]
        for host, part in enumerate(parts):
            assert_equal(type(whole)(*(x[host::hosts] for x in whole)), part[step])


def test_batch_that_hosts_cannot_share():
    with pytest.raises(ConfigError, match=r"train\.batch_size=4 is not divisible .* hosts, 3"):
        make_stream(host_count=3)


def test_document_names_are_those_in_the_batch(tmp_path):
    path = tmp_path / "names.jsonl"
    path.write_text("".join(json.dumps(f"document {i}") + "\n" for i in range(6)))
    split = make_split([5, 0, 13, 1, 30, 8], path)
    starts = {token: i for i in range(6) for token in split.document(i)[1:].tolist()}
    stream = make_stream(split, batch_size=1)
    for step in range(9):
        batch = stream[step]
        names = stream.document_names(step)
        in_batch = {f"document {starts[x]}" for x in batch.tokens.ravel().tolist() if x in starts}
        assert in_batch <= set(names)
        assert len(names) == batch.segment_ids.max()


def test_leaving_the_scope_ends_the_threads():
    def threads():
        return [x for x in threading.enumerate() if x.name.startswith("grain-prefetch")]

    with make_stream().iterate() as batches:
        next(batches)
        assert threads()
    for thread in threads():
        thread.join(timeout=10)
    assert not threads()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
