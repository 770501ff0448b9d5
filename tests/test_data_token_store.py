"""The token store: documents come back unchanged, split by name; damaged stores are not opened."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_stores import TEXTS, small_store_config, texts_of, tokens_of

from retnet_jax.data import BatchStream, stores
from retnet_jax.data.build import build_store
from retnet_jax.data.split import is_held_out
from retnet_jax.data.store_problems import check_files
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.token_store import open_store
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.programs import command_line


@pytest.fixture
def config(tmp_path):
    return small_store_config(tmp_path)


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("byte", 257), ("bpe", 280)])
def test_every_document_is_in_one_split_and_comes_back(config, tokenizer, vocab_size):
    config.tokenizer = tokenizer
    store = open_or_build(config, vocab_size)
    train, held_out = texts_of(store, store.train), texts_of(store, store.held_out)
    assert train | held_out == TEXTS
    assert not train.keys() & held_out.keys()
    assert store.tokenizer.vocab_size == vocab_size
    for split, texts in ((store.train, train), (store.held_out, held_out)):
        assert len(split) == len(texts)
        assert all(is_held_out(n, 0.2) == (split is store.held_out) for n in split.names)
        assert list(split.byte_counts) == [len(text.encode()) for text in texts.values()]
        assert all(split.document(i)[0] == store.tokenizer.bos_id for i in range(len(split)))
        assert np.count_nonzero(tokens_of(split) == store.tokenizer.bos_id) == len(split)


def test_manifest_says_what_is_there(config):
    store = build_store(config, 0)
    for name, split in (("train", store.train), ("held_out", store.held_out)):
        assert store.manifest["splits"][name] == {
            "documents": len(split),
            "tokens": split.token_count,
            "bytes": split.byte_counts.sum(),
        }
        assert split.token_count == split.byte_counts.sum() + len(split)
    empty = config.path.replace("*", "empty")
    assert store.manifest["skipped"] == {
        "count": 1,
        "reasons": {"empty": 1},
        "first": [f"{empty}: empty"],
    }
    assert store.manifest["duplicates"] == 0
    sources = {Path(x["path"]).name: x for x in store.manifest["sources"]}
    assert sources.keys() == TEXTS.keys() | {"empty.txt"}
    for name, text in TEXTS.items():
        assert sources[name]["bytes"] == len(text.encode())
        assert sources[name]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_large_vocabularies_take_four_bytes(config, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    store = build_store(config, 0)
    assert tokens_of(store.train).dtype == np.uint32
    assert texts_of(store, store.train) | texts_of(store, store.held_out) == TEXTS


@given(name=st.text(st.characters()), share=st.floats(0, 1), more=st.floats(0, 1))
def test_held_out_is_a_function_of_the_name_and_grows_with_the_share(name, share, more):
    assert is_held_out(name, share) <= is_held_out(name, max(share, more))
    assert is_held_out(name, 1)
    assert not is_held_out(name, 0)


def test_held_out_share_is_the_share():
    held_out = sum(is_held_out(f"document {i}", 0.1) for i in range(10_000))
    assert abs(held_out - 1000) < 5 * (10_000 * 0.1 * 0.9) ** 0.5


def test_names_with_line_ends_and_quotes_come_back(config, tmp_path):
    odd = {"new\nline.txt": "one", 'a "quote" é.txt': "two"}
    for name, text in odd.items():
        (tmp_path / "corpus" / name).write_text(text)
    store = build_store(config, 0)
    assert texts_of(store, store.train) | texts_of(store, store.held_out) == TEXTS | odd


def test_second_time_opens_and_does_not_build(config, monkeypatch):
    first = open_or_build(config, 257)
    monkeypatch.setattr(stores, "build_or_wait", None)
    second = open_or_build(config, 257)
    np.testing.assert_array_equal(tokens_of(first.train), tokens_of(second.train))
    assert second.manifest == first.manifest


def test_a_store_with_other_options_is_not_used(config):
    open_or_build(config, 257)
    config.held_out, config.tokenizer = 0.3, "bpe"
    with pytest.raises(ConfigError, match="built with other options") as error:
        open_or_build(config, 300, command_line.prepare_command())
    message = str(error.value)
    assert "data.held_out: 0.2 in the store, 0.3 asked for" in message
    assert "data.tokenizer: 'byte' in the store, 'bpe' asked for" in message
    assert "model.vocab_size: None in the store, 300 asked for" in message
    assert "data.path" not in message
    assert "give another directory in data.store, or delete" in message
    assert "build it again with: python tools/prepare_data.py" in message


@pytest.mark.parametrize(("built", "slip"), [("byte", "bite"), ("bpe", "bep")])
def test_a_misspelt_tokenizer_does_not_open_a_store(config, built, slip):
    config.tokenizer = built
    open_or_build(config, 260)
    config.tokenizer = slip
    with pytest.raises(ConfigError, match=rf"data.tokenizer='{slip}' is not one of 'byte', 'bpe'"):
        open_or_build(config, 260)


def test_options_that_are_not_read_make_no_difference(config):
    open_or_build(config, 257)
    config.windows, config.sequence_length = "contiguous", 7
    assert open_or_build(config, 512).tokenizer.vocab_size == 257


def test_model_vocabulary_must_hold_the_tokenizers(config):
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is less than the 257 tokens"):
        open_or_build(config, 256)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "tokenizer.json",
        "shards/00000/train.tokens.npy",
        "shards/00000/held_out.names.jsonl",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut short", "other"])
def test_a_damaged_store_is_not_opened(config, name, damage):
    command = command_line.prepare_command()
    path = Path(build_store(config, 0, command=command).directory) / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_text("{}")
    with pytest.raises(ConfigError, match="missing or damaged") as error:
        open_or_build(config, 257)
    assert config.store in str(error.value)
    assert "delete this one and build it again" in str(error.value)
    assert name == "manifest.json" or "with: python tools/prepare_data.py" in str(error.value)


@pytest.mark.parametrize("kind", ["tokens.npy", "offsets.npy", "bytes.npy", "names.jsonl"])
def test_a_changed_byte_is_found(config, kind):
    store = build_store(config, 0, command=command_line.prepare_command())
    check_files(store)
    path = Path(store.directory) / "shards" / "00000" / f"train.{kind}"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    store = open_store(store.directory)
    with pytest.raises(ConfigError, match=rf"is damaged: 1 files .*train\.{kind}; .* with: python"):
        check_files(store)
    if kind == "offsets.npy":
        with pytest.raises(ConfigError, match=r"train\.offsets\.npy is damaged"):
            store.train.borders(0, 10)


def test_another_format_is_not_opened(config):
    path = Path(build_store(config, 0).directory) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="its format is 99"):
        open_store(path.parent)


def test_a_store_is_not_built_on_remote_storage(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.store = "memory://nowhere/store"
    with pytest.raises(ConfigError, match="stores are built on local disk"):
        build_store(config, 0)
    with pytest.raises(ConfigError, match="missing or damaged"):
        open_or_build(config, 257)
    assert not list(tmp_path.glob("memory*"))


@pytest.mark.parametrize("windows", ["packed", "contiguous"])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_no_batch_has_a_held_out_document_and_an_epoch_has_all_others(config, windows, deduplicate):
    corpus = Path(config.path).parent
    for number in range(30):
        (corpus / f"copy{number}.txt").write_text(f"<{number % 10}>")
        (corpus / f"alone{number}.txt").write_text(f"<{100 + number}" + number * "x" + ">")
    config.deduplicate = deduplicate
    store = build_store(config, 257)
    train, held_out = (
        {tuple(split.document(i).tolist()) for i in range(len(split))}
        for split in (store.train, store.held_out)
    )
    assert not train & held_out
    stream = BatchStream(
        [store.train],
        [1.0],
        sequence_length=60,
        batch_size=4,
        bos_id=256,
        seed=0,
        policy=windows,
    )
    found, read = set(), [()] * 4  # the part of its current document that each row has read
    for step in range(2 * store.train.token_count // 60):  # enough for one row to read everything
        batch = stream[step]
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(1, segments.max() + 1):
                tokens = tuple(batch.tokens[row][segments == segment].tolist())
                continued = segment == 1 and batch.continues[row]
                read[row] = read[row] + tokens if continued else tokens
                found.add(read[row])
                assert any(document[: len(read[row])] == read[row] for document in train)
    assert found >= train
    assert not found & held_out


def test_a_store_on_remote_storage_is_read_by_ranges(config):
    fsspec = pytest.importorskip("fsspec")
    local = build_store(config, 0)
    fsspec.filesystem("memory").put(local.directory, "/bucket/store", recursive=True)
    remote = open_store("memory://bucket/store")
    for one, other in ((local.train, remote.train), (local.held_out, remote.held_out)):
        np.testing.assert_array_equal(tokens_of(one), tokens_of(other))
        np.testing.assert_array_equal(one.borders(5, 500), other.borders(5, 500))
        np.testing.assert_array_equal(one.read(100, 117), other.read(100, 117))
        assert one.names == other.names
    assert remote.tokenizer.fingerprint == local.tokenizer.fingerprint
    check_files(remote)
    path = "/bucket/store/shards/00000/train.tokens.npy"
    fsspec.filesystem("memory").pipe(path, b"short")
    with pytest.raises(ConfigError, match=r"train\.tokens\.npy has 5 bytes"):
        open_store("memory://bucket/store")
