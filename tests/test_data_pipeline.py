"""Windows and batches: no token is lost or repeated, and a step always has the same batch."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from retnet_jax.config import MeshConfig
from retnet_jax.data import windows
from retnet_jax.data.batches import (
    BatchStream,
    PlacedBatches,
    number_of_windows,
)
from retnet_jax.data.token_store import Split
from retnet_jax.data.windows import packed_starts, run_starts
from retnet_jax.parallel.mesh import make_mesh

BOS = 1_000_000
POLICIES = pytest.mark.parametrize("policy", ["packed", "contiguous"])


def spans_of(stream, step):
    return stream._spans_of(step, stream._rows)


def make_split(lengths, first_token=0, shards=1):
    """Documents of BOS and `length` more tokens, all different."""
    groups = [list(x) for x in np.array_split(np.array(lengths, int), shards)]
    counts, arrays, names = [], {}, {}
    token = first_token
    for shard, group in enumerate(groups):
        documents = []
        for length in group:
            documents.append([BOS, *range(token, token + length)])
            token += length
        tokens = np.concatenate([[], *documents]).astype(np.uint32)
        arrays[shard, "tokens"] = tokens
        arrays[shard, "offsets"] = np.cumsum([0, *map(len, documents)])
        names[shard] = [f"document {shard}.{i}" for i in range(len(group))]
        counts.append(("", {"documents": len(group), "tokens": len(tokens), "bytes": sum(group)}))
    split = Split("train", counts, vocab_size=2**32)
    split._arrays, split._names = arrays, names
    return split


SPLIT = make_split([5, 0, 13, 1, 30, 8], shards=2)
OTHER = make_split([3, 9, 9, 2, 40, 1, 1, 6], first_token=1000, shards=3)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(windows, "_RUN_WINDOWS", 2)
    run_starts.cache_clear()


def make_stream(splits=(SPLIT,), weights=(1.0,), **changes):
    options = {"sequence_length": 7, "batch_size": 4, "bos_id": BOS, "seed": 3}
    return BatchStream(splits, weights, **(options | changes))


def assert_equal(one, other):
    for name in one._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=8)


@settings(deadline=None)
@given(lengths=LENGTHS, t=st.integers(1, 20), shards=st.integers(1, 3))
def test_packed_windows_are_the_stream_and_begin_at_documents_where_they_can(lengths, t, shards):
    split = make_split(lengths, shards=shards)
    starts = packed_starts(split, t).tolist()
    assert starts[0] == 0
    assert starts[-1] == split.token_count
    borders = {*split.borders(0, split.token_count).tolist(), split.token_count}
    for start, stop in itertools.pairwise(starts):
        assert 0 < stop - start <= t
        # It ends inside a document only if that document fills it.
        if stop not in borders:
            assert stop - start == t
            assert not borders & set(range(start + 1, stop))
        else:
            assert not borders & set(range(stop + 1, start + t + 1))


@settings(deadline=None)
@given(lengths=LENGTHS, t=st.integers(1, 20), shards=st.integers(1, 3))
def test_runs_are_whole_documents(lengths, t, shards):
    run_starts.cache_clear()
    split = make_split(lengths, shards=shards)
    starts = run_starts(split, t)
    assert (np.diff(starts) > 0).all()
    assert (starts[0], starts[-1]) == (0, split.token_count)
    assert set(starts[:-1].tolist()) <= set(split.borders(0, split.token_count).tolist())


@POLICIES
@settings(deadline=None, max_examples=25)
@given(lengths=LENGTHS, t=st.integers(1, 20))
def test_batches_are_the_stream(policy, lengths, t):
    run_starts.cache_clear()
    split = make_split(lengths)
    whole = split.read(0, split.token_count)
    document_of = np.repeat(np.arange(len(lengths)), np.diff(split._arrays[0, "offsets"]))
    stream = make_stream([split], sequence_length=t, batch_size=3, policy=policy)
    for step in range(4):
        batch, spans = stream[step], spans_of(stream, step)
        for row, (_, start, stop, continues) in enumerate(spans):
            n = stop - start
            tokens, targets, segment_ids, weights, flag = (x[row] for x in batch)
            np.testing.assert_array_equal(tokens[:n], whole[start:stop])
            np.testing.assert_array_equal(targets[:n], [*whole, BOS][start + 1 : stop + 1])
            np.testing.assert_array_equal(weights, np.arange(t) < n)
            np.testing.assert_array_equal(segment_ids > 0, weights > 0)
            documents = document_of[start:stop]
            np.testing.assert_array_equal(segment_ids[:n], documents - documents[0] + 1)
            assert flag == continues


@POLICIES
@pytest.mark.parametrize("batch_size", [3, 4, 20])
def test_every_token_once_in_an_epoch(policy, batch_size):
    stream = make_stream(batch_size=batch_size, policy=policy, sequence_length=5)
    spans = [span for step in range(300 // batch_size + 1) for span in spans_of(stream, step)]
    epoch = sorted(SPLIT.read(0, SPLIT.token_count).tolist())
    if policy == "contiguous":
        # Epochs overlap by the runs that rows have not finished.
        seen = Counter(spans)
        tokens = [t for span in seen for t in SPLIT.read(span.start, span.stop).tolist()]
        assert sorted(tokens) == epoch
        assert max(seen.values()) - min(seen.values()) <= batch_size
        assert min(seen.values()) > 5
    else:
        n = number_of_windows(SPLIT, 5)
        orders = [spans[e * n : (e + 1) * n] for e in range(4)]
        for order in orders:
            tokens = [t for span in order for t in SPLIT.read(span.start, span.stop).tolist()]
            assert sorted(tokens) == epoch
        assert len(set(map(tuple, orders))) == 4


def test_rows_of_contiguous_windows_continue():
    stream = make_stream((SPLIT, OTHER), (1.0, 2.0), policy="contiguous", batch_size=3)
    before = spans_of(stream, 0)
    assert not any(span.continues for span in before)
    went_on = 0
    for step in range(1, 60):
        spans = spans_of(stream, step)
        for old, new in zip(before, spans, strict=True):
            split = (SPLIT, OTHER)[new.store]
            border = len(split.borders(new.start, new.start + 1)) == 1
            assert new.continues == (not border)
            if new.continues:
                assert (old.store, old.stop) == (new.store, new.start)
                went_on += 1
        before = spans
    assert went_on > 50


@pytest.mark.slow
@POLICIES
def test_shares_of_a_mixture(policy):
    long = [10_000, 50, 9, 20, 4000]  # a row has the first one for 1,429 steps
    splits = [make_split(long, first_token=10_000), OTHER, make_split([20] * 30, first_token=5000)]
    stream = make_stream(splits, (0.6, 0.3, 0.1), policy=policy, batch_size=20)
    stores = [stream._spans[i].store for i in range(500 * 20)]
    shares = np.bincount(stores) / len(stores)
    assert np.abs(shares - [0.6, 0.3, 0.1]).max() < 0.01


MIXED = {"splits": (SPLIT, OTHER), "weights": (0.7, 0.3), "batch_size": 8}


@POLICIES
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_out_the_global_batch(policy, hosts):
    shares = np.arange(8).reshape(hosts, -1)
    parts = [make_stream(**MIXED, policy=policy, rows=rows.tolist()) for rows in shares]
    whole = make_stream(**MIXED, policy=policy)
    for step in (*range(6), 50, 7):  # in any order: earlier steps make no difference
        expected = whole[step]
        for rows, part in zip(shares, parts, strict=True):
            assert_equal(type(expected)(*(x[rows] for x in expected)), part[step])


@POLICIES
@pytest.mark.parametrize("sizes", [{"data": -1}, {"data": 2, "fsdp": 2, "seq": 2}, {"tensor": -1}])
def test_placed_batches_are_those_of_the_stream(policy, sizes):
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
    options = {"sequence_length": 8, "bos_id": BOS, "seed": 3, "policy": policy}
    placed = PlacedBatches(mesh, (SPLIT, OTHER), (0.7, 0.3), batch_size=16, **options)
    stream = make_stream((SPLIT, OTHER), (0.7, 0.3), batch_size=16, **options)
    with placed.iterate(1, skip={2}) as batches:
        for expected in (1, 3, 4):
            number, batch = next(batches)
            assert number == expected
            assert_equal(stream[number], batch)
            assert_equal(batch, placed[number])
            for array in batch:
                spec = PartitionSpec(*(("data", "fsdp"), "seq")[: array.ndim])
                assert array.sharding == NamedSharding(mesh, spec)
    assert placed.document_names(3) == stream.document_names(3)


@POLICIES
@pytest.mark.parametrize("start", [0, 1, 5, 23])
def test_resumed_equals_uninterrupted(policy, start):
    with make_stream(**MIXED, policy=policy).iterate() as batches:
        uninterrupted = list(itertools.islice(batches, 30))
    with make_stream(**MIXED, policy=policy).iterate(start) as batches:
        for expected in uninterrupted[start:]:
            number, batch = next(batches)
            assert number == expected[0]
            assert_equal(batch, expected[1])


@POLICIES
def test_a_step_has_the_same_batch_in_every_stream(policy):
    stream = make_stream(**MIXED, policy=policy)
    with stream.iterate() as batches:
        for step, batch in itertools.islice(batches, 12):
            assert_equal(stream[step], batch)
            assert_equal(make_stream(**MIXED, policy=policy)[step], batch)


@POLICIES
def test_seeds_give_other_orders(policy):
    one, other = (make_stream(seed=seed, policy=policy)[0].tokens for seed in (3, 4))
    assert (one != other).any()


def test_skipped_batches_are_left_out():
    stream = make_stream()
    with stream.iterate(1, skip={2, 3, 5}) as batches:
        for expected in (1, 4, 6, 7):
            number, batch = next(batches)
            assert number == expected
            assert_equal(batch, stream[number])


def test_document_names_are_those_in_the_batch():
    starts = {token: SPLIT.name(i) for i in range(6) for token in SPLIT.document(i)[1:].tolist()}
    stream = make_stream(batch_size=1)
    for step in range(9):
        batch = stream[step]
        names = stream.document_names(step)
        assert {starts[x] for x in batch.tokens.ravel().tolist() if x in starts} <= set(names)
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
