"""Damage to a token store: every changed bit is found before its data is used."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from manifests import make_format_3

from retnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from retnet_jax.data import BatchStream, number_of_windows
from retnet_jax.data import build as store_builder
from retnet_jax.data.build import build_store
from retnet_jax.data.store_problems import check_files, store_problems
from retnet_jax.data.token_store import open_store
from retnet_jax.errors import ConfigError
from retnet_jax.training.loop import train

OLD = Path(__file__).parent / "fixtures" / "88e272d" / "store"
FINGERPRINT = "66118a1aa3d48663a3b7141d0901cd11159e81e8b3e2b430f4782c2213bc69e5"  # in format 3
BLOCK = 1 << 16  # bytes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A corpus of two files, each a shard with several blocks of tokens in both splits."""
    directory = tmp_path_factory.mktemp("damage")
    letters = np.random.default_rng(0)
    for number in range(2):
        with (directory / f"{number}.jsonl").open("w") as file:
            for document in range(60):
                text = letters.integers(97, 123, 2500, np.uint8).tobytes().decode()
                file.write(json.dumps({"id": f"{document} é", "text": text}) + "\n")
    return DataConfig(
        source="jsonl",
        path=str(directory / "*.jsonl"),
        tokenizer="byte",
        store=str(directory / "store"),
        held_out=0.3,
        sequence_length=16,
    )


@pytest.fixture(scope="module")
def store(config):
    """The directory of the store. A test that changes a byte restores it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_builder, "_SHARD_BYTES", 1)
        return Path(build_store(config, 257, processes=1).directory)


@contextlib.contextmanager
def flipped(path, position, bit=0):
    """Flips one bit of a file until the `with` ends."""
    flip(path, position, bit)
    try:
        yield
    finally:
        flip(path, position, bit)


def flip(path, position, bit=0):
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def stream_of(split, length, seed=0):
    return BatchStream([split], [1.0], sequence_length=length, batch_size=8, bos_id=256, seed=seed)


def read_everything(directory):
    """The batches of an epoch, and all properties of the documents."""
    store = open_store(directory)
    found = [store.fingerprint]
    for split in (store.train, store.held_out):
        length = 16_384
        stream, steps = stream_of(split, length), -(-number_of_windows(split, length) // 8)
        found += [stream[step].tokens for step in range(steps)]
        found += [split.names, split.byte_counts, split.lengths, split.read(0, split.token_count)]
    return found


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_a_flipped_bit_in_any_file_is_found(store):
    paths = files_in(store)
    assert {path.name for path in paths} == {
        "manifest.json",
        "tokenizer.json",
        "blocks.npy",
        *(
            f"{split}.{kind}"
            for split in ("train", "held_out")
            for kind in ("tokens.npy", "offsets.npy", "bytes.npy", "names.jsonl")
        ),
    }
    for shard in (0, 1):
        for split in ("train", "held_out"):
            assert (store / f"shards/{shard:05}/{split}.tokens.npy").stat().st_size > BLOCK
    assert store_problems(store) == []
    check_files(open_store(store))
    read_everything(store)
    places = np.random.default_rng(1)
    for number in range(2 * len(paths)):
        path = paths[number // 2]
        position, bit = int(places.integers(path.stat().st_size)), int(places.integers(8))
        with flipped(path, position, bit):
            (problem,) = store_problems(store)
            assert problem.startswith(f"{path} "), (position, bit)
            with pytest.raises(ConfigError, match=r"damaged") as error:
                read_everything(store)
        message = str(error.value)
        assert path.name in message or "its format is" in message or path.name == "manifest.json"
        assert "again with: build_store" in message or path.name == "manifest.json"
    read_everything(store)


def test_every_changed_byte_of_the_manifest_is_found(store):
    """Even a byte that does not change the JSON, such as an escape in capitals."""
    path = store / "manifest.json"
    for position in range(0, path.stat().st_size, 3):
        with flipped(path, position, position % 8):
            (problem,) = store_problems(store)
            assert problem.startswith(f"{path} is missing or damaged"), position
    intact = path.read_text()
    path.write_text(intact.replace("\n}", "\n }"))
    with pytest.raises(ConfigError, match=r"manifest\.json is not what was written"):
        open_store(store)
    path.write_text(intact)
    open_store(store)


def test_only_the_windows_of_a_damaged_block_are_refused(store):
    path = store / "shards/00001/train.tokens.npy"
    with flipped(path, 2 * BLOCK + 776):
        train = open_store(store).train
        shard_start = open_store(store).manifest["shards"][0]["splits"]["train"]["tokens"]
        first = shard_start + (2 * BLOCK - 128) // 2  # of the tokens in the block
        last = first + BLOCK // 2
        train.read(0, first)
        train.read(last, train.token_count)
        with pytest.raises(ConfigError) as error:
            train.read(first - 10, first + 1)
        with pytest.raises(ConfigError) as other:
            train.read(last - 1, last + 10)
        assert str(other.value) == str(error.value)
    documents = range(train.document_at(first), train.document_at(last - 1) + 1)
    named = ", ".join(repr(train.name(x)) for x in documents[:5])
    assert len(documents) > 5
    assert str(error.value) == (
        f"{path} is damaged: its bytes 131,072 to 196,607 are not what was written; they hold "
        f"tokens of {named} and {len(documents) - 5} more of train; tools/verify.py finds "
        f"all damaged files; copy the token store '{store}' again, or delete it and build it again "
        "with: build_store(config.data, vocab_size)"
    )
    whole = train.read(0, train.token_count)  # which was not taken for verified
    with flipped(path, 2 * BLOCK + 776):  # after that a block is not hashed again
        assert (train.read(0, train.token_count) != whole).sum() == 1


def test_documents_are_not_named_by_damaged_names(store):
    with (
        flipped(store / "shards/00000/train.tokens.npy", 10),
        flipped(store / "shards/00000/train.names.jsonl", 10),
    ):
        with pytest.raises(ConfigError, match=r"bytes 0 to 65,535 .* written, nor are the names"):
            open_store(store).train.document(0)
        damaged = [f"{store}/shards/00000/train.{name}" for name in ("names.jsonl", "tokens.npy")]
        with pytest.raises(ConfigError, match=rf"2 files .* written: {', '.join(damaged)}; copy"):
            check_files(open_store(store))


def test_a_damaged_header_and_a_damaged_table_of_digests_are_named(store):
    for kind in ("tokens", "offsets"):
        path = store / f"shards/00000/train.{kind}.npy"
        last = min(path.stat().st_size, BLOCK) - 1
        with flipped(path, 20), pytest.raises(ConfigError) as error:
            open_store(store).train.document(0)
        assert f"{path} is damaged: its bytes 0 to {last:,} are not" in str(error.value)
    path = store / "shards/00001/blocks.npy"
    with flipped(path, 200):
        train = open_store(store).train
        train.read(0, 10)
        with pytest.raises(ConfigError, match=r"00001/blocks\.npy is damaged: its bytes 0 to "):
            train.read(train.token_count - 1, train.token_count)


def test_remote_storage_is_verified_block_by_block_in_one_request(store, monkeypatch):
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.put(str(store), "/damage/store", recursive=True)
    assert store_problems("memory://damage/store") == []
    local, remote = open_store(store).train, open_store("memory://damage/store").train
    remote.read(0, remote.token_count)
    requests, cat_file = [], type(system).cat_file

    def counted(self, path, start=None, end=None, **options):
        requests.append((start, end))
        return cat_file(self, path, start, end, **options)

    monkeypatch.setattr(type(system), "cat_file", counted)
    shard_end = open_store(store).manifest["shards"][0]["splits"]["train"]["tokens"]
    border = (BLOCK - 128) // 2
    for start, stop in ((0, 1), (5, 5), (border - 1, border + 1), (40_000, 70_000)):
        requests.clear()
        np.testing.assert_array_equal(remote.read(start, stop), local.read(start, stop))
        assert len(requests) == (stop > start)
        assert all(first % BLOCK == 0 == last % BLOCK for first, last in requests)
    requests.clear()
    around = shard_end - 9, shard_end + 9
    np.testing.assert_array_equal(remote.read(*around), local.read(*around))
    assert len(requests) == 2
    name = "shards/00000/train.tokens.npy"
    contents = bytearray((store / name).read_bytes())
    contents[BLOCK + 5] ^= 1
    system.pipe(f"/damage/store/{name}", bytes(contents))
    remote.read(0, border)
    with pytest.raises(ConfigError) as error:  # although it was intact when it was read before
        remote.read(0, border + 1)
    with flipped(store / name, BLOCK + 5), pytest.raises(ConfigError) as expected:
        open_store(store).train.read(0, border + 1)
    assert str(error.value) == str(expected.value).replace(str(store), "memory://damage/store")


def test_all_problems_of_a_store_are_listed(store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    shards = copy / "shards"
    (shards / "00000/held_out.bytes.npy").unlink()
    with (shards / "00000/train.offsets.npy").open("ab") as file:
        file.write(b"more")
    (copy / "tokenizer.json").write_text("{}")
    for position in (0, BLOCK + 1, BLOCK + 2):
        flip(shards / "00001/train.tokens.npy", position)
    size = (shards / "00000/train.offsets.npy").stat().st_size
    blocks = -(-(shards / "00001/train.tokens.npy").stat().st_size // BLOCK)
    assert store_problems(copy) == [
        f"{copy}/tokenizer.json is not what was written",
        f"{shards}/00000/held_out.bytes.npy is missing",
        f"{shards}/00000/train.offsets.npy has {size} bytes, not {size - 4}",
        f"{shards}/00001/train.tokens.npy is not what was written in 2 of its {blocks} blocks of "
        "64 KiB, the first at byte 0",
    ]
    (copy / "manifest.json").rename(copy / "plan.json")
    (problem,) = store_problems(copy)
    assert "manifest.json does not exist yet: the token store" in problem
    (copy / "plan.json").unlink()
    (problem,) = store_problems(copy)
    assert f"{copy}/manifest.json is missing or damaged (FileNotFoundError: " in problem
    assert problem.endswith("; without it no other file can be verified")


def test_a_store_of_format_3_opens_and_is_verified_as_a_whole(store, tmp_path):
    old = open_store(OLD)
    assert not old.has_block_digests
    assert old.fingerprint == FINGERPRINT
    assert store_problems(OLD) == []
    shutil.copytree(OLD, tmp_path / "old")
    path = tmp_path / "old/shards/00000/train.tokens.npy"
    with flipped(path, 5000):
        assert store_problems(tmp_path / "old") == [f"{path} is not what was written"]
        open_store(tmp_path / "old").train.read(0, 5000)
    expected = open_store(tmp_path / "old").train.read(0, 100)
    for position, bit in itertools.product(range(70), range(8)):  # the header and its text
        with flipped(path, position, bit), contextlib.suppress(ConfigError):
            # A header that numpy still accepts must mean the same.
            found = open_store(tmp_path / "old").train.read(0, 100)
            np.testing.assert_array_equal(found, expected)
    with flipped(path, 20), pytest.raises(ConfigError, match=r"train\.tokens\.npy is damaged"):
        open_store(tmp_path / "old").train.read(0, 1)
    # The fingerprint does not depend on the format.
    shutil.copytree(store, tmp_path / "store")
    make_format_3(tmp_path / "store")
    expected = read_everything(store)
    for one, other in zip(expected, read_everything(tmp_path / "store"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert open_store(store).has_block_digests


def test_a_build_begun_in_format_3_is_finished_in_this_one(config, store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 1)
    said = []
    monkeypatch.setattr(store_builder, "say", said.append)
    config = DataConfig(**vars(config) | {"store": str(tmp_path / "store")})
    with monkeypatch.context() as patch:
        patch.setattr(store_builder, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_store(config, 257, processes=1)
    begun = tmp_path / "store"
    plan = json.loads((begun / "plan.json").read_text()) | {"format": 3}
    for shard in ("00000", "00001"):
        work = begun / "work" / f"{shard}.record.json"
        found = json.loads(work.read_text())
        record = {name: found[name] for name in ("name", "splits", "files", "content")}
        (begun / "shards" / shard / "shard.json").write_text(json.dumps(record))
        (begun / "shards" / shard / "blocks.npy").unlink()
        work.unlink()
    with flipped(begun / "shards/00001/held_out.tokens.npy", 300):
        (begun / "plan.json").write_text(json.dumps(plan))
        build_store(config, 257, processes=1)
        assert said == [f"{begun}/shards/00001 is damaged and is written again"]
        for path in files_in(store):
            assert (begun / path.relative_to(store)).read_bytes() == path.read_bytes()
        assert len(files_in(begun)) == len(files_in(store))


def test_a_build_of_another_format_names_the_version_that_can_finish_it(config, tmp_path):
    config = DataConfig(**vars(config) | {"store": str(tmp_path)})
    plan = store_builder._plan(config, 257, "") | {"format": 2}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "shards/00000").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"in format 2; this one writes format 4: finish it with"):
        build_store(config, 257)


@pytest.mark.compiles(80, reason="a whole run on eight devices")
def test_a_run_ends_before_the_step_that_would_see_a_damaged_block(config, store, tmp_path):
    path = store / "shards/00000/train.tokens.npy"
    split = open_store(store).train
    low, high = (BLOCK - 128) // 2, (2 * BLOCK - 128) // 2  # the tokens of its second block

    def first_step(seed):
        stream = stream_of(split, config.sequence_length, seed)
        for step in itertools.count():
            spans = stream._spans_of(step, stream._rows)
            if any(low <= span.stop and span.start < high for span in spans):
                return step

    seed = next(seed for seed in range(1000) if first_step(seed) == 3)
    run = Config(
        model=ModelConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2),
        data=config,
        # Those of conftest.py, whose programs are in the cache.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, epsilon=1e-3),
        train=TrainConfig(steps=10, batch_size=8, seed=seed, log_every=1),
    )
    expected = rf"{path} is damaged: its bytes 65,536 to 131,071 are not what was written"
    with flipped(path, BLOCK + 200), pytest.raises(ConfigError, match=expected):
        train(run, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == [1, 2, 3]  # step 1 takes batch 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
