"""The token store: what goes in comes out, split by name; nothing half-written is ever opened."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_jax.config import ConfigError, DataConfig
from retnet_jax.data import token_store
from retnet_jax.data.token_store import build_store, is_held_out, open_or_build, open_store
from retnet_jax.data.tokenizer import train_bpe

TEXTS = {f"{i}.txt": f"document {i} says {'na ' * (i % 7)}é\r\n" for i in range(40)}


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in TEXTS.items():
        (corpus / name).write_bytes(text.encode())
    (corpus / "empty.txt").touch()
    return DataConfig(
        source="text",
        path=str(corpus / "*.txt"),
        tokenizer="byte",
        store=str(tmp_path / "deep" / "store"),
        held_out=0.2,
    )


def texts_of(store, split):
    return {
        name.rpartition("/")[2]: store.tokenizer.decode(split.document(i))
        for i, name in enumerate(split.names)
    }


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
        assert np.count_nonzero(split.tokens == store.tokenizer.bos_id) == len(split)


def test_manifest_says_what_is_there(config):
    store = build_store(config, 0)
    for name, split in (("train", store.train), ("held_out", store.held_out)):
        assert store.manifest["splits"][name] == {
            "documents": len(split),
            "tokens": len(split.tokens),
            "bytes": split.byte_counts.sum(),
        }
        assert len(split.tokens) == split.byte_counts.sum() + len(split)
    empty = config.path.replace("*", "empty")
    assert store.manifest["skipped"] == {"count": 1, "first": [f"{empty}: empty"]}


def test_bpe_sees_training_documents_alone(config, monkeypatch):
    seen = []

    def record(texts, vocab_size):
        seen.extend(texts)
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(token_store, "train_bpe", record)
    config.tokenizer = "bpe"
    store = build_store(config, 280)
    assert sorted(seen) == sorted(texts_of(store, store.train).values())


def test_bpe_sample_is_bounded_and_does_not_depend_on_order(config, monkeypatch):
    monkeypatch.setattr(token_store, "_SAMPLE_CHARACTERS", 200)
    _, sample = token_store._survey(config)
    in_order = token_store._read
    monkeypatch.setattr(token_store, "_read", lambda *args: reversed(list(in_order(*args))))
    assert token_store._survey(config)[1] == sample
    assert 200 <= sum(map(len, sample)) < 200 + len(max(TEXTS.values(), key=len))


def test_batching_changes_nothing(config, monkeypatch):
    whole = build_store(config, 0)
    config.store += "_again"
    monkeypatch.setattr(token_store, "_BATCH_CHARACTERS", 50)
    pieces = build_store(config, 0)
    for one, other in ((whole.train, pieces.train), (whole.held_out, pieces.held_out)):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.offsets, other.offsets)
        assert one.names == other.names
    assert whole.manifest == pieces.manifest


def test_large_vocabularies_take_four_bytes(config, monkeypatch):
    monkeypatch.setattr(token_store.ByteTokenizer, "vocab_size", 2**16 + 1)
    store = build_store(config, 0)
    assert store.train.tokens.dtype == np.uint32
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
    monkeypatch.setattr(token_store, "build_store", None)
    second = open_or_build(config, 257)
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert second.manifest == first.manifest


def test_a_store_with_other_options_is_not_used(config):
    open_or_build(config, 257)
    config.held_out, config.tokenizer = 0.3, "bpe"
    with pytest.raises(ConfigError, match="built with other options") as error:
        open_or_build(config, 300)
    message = str(error.value)
    assert "data.held_out: 0.2 in the store, 0.3 asked for" in message
    assert "data.tokenizer: 'byte' in the store, 'bpe' asked for" in message
    assert "model.vocab_size: None in the store, 300 asked for" in message
    assert "data.path" not in message
    assert "name another directory in data.store, or delete" in message


def test_options_that_are_not_read_make_no_difference(config):
    open_or_build(config, 257)
    config.text_field, config.sequence_length = "body", 7
    assert open_or_build(config, 512).tokenizer.vocab_size == 257


def test_model_vocabulary_must_hold_the_tokenizers(config):
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is less than the 257 tokens"):
        open_or_build(config, 256)


def test_building_over_a_store_is_refused(config):
    build_store(config, 0)
    with pytest.raises(ConfigError, match=r"data\.store=.* exists already"):
        build_store(config, 0)


def test_another_process_that_was_faster_wins(config, monkeypatch):
    def faster(_, directory):
        monkeypatch.undo()
        build_store(config, 0)
        raise OSError("the directory is not empty")

    monkeypatch.setattr(token_store.Path, "rename", faster)
    store = build_store(config, 0)
    assert texts_of(store, store.train) | texts_of(store, store.held_out) == TEXTS


def test_a_build_that_fails_leaves_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(token_store.ByteTokenizer, "encode_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_store(config, 0)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train.tokens.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "other"])
def test_a_damaged_store_is_not_opened(config, name, damage):
    path = build_store(config, 0).directory / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-3])
    elif path.suffix == ".npy":
        np.save(path, np.zeros(5, np.uint16))
    else:
        path.write_text("{}")
    with pytest.raises(ConfigError, match="missing, unfinished or damaged") as error:
        open_or_build(config, 257)
    assert config.store in str(error.value)
    assert "delete this one" in str(error.value)


def test_another_format_is_not_opened(config):
    path = build_store(config, 0).directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="its format is 99"):
        open_store(path.parent)


def test_no_documents_at_all(config):
    config.path = config.path.replace("*", "empty")
    with pytest.raises(
        ConfigError, match=r"data\.path='.*' gives no documents; 1 skipped: .*empty"
    ):
        build_store(config, 0)


@pytest.mark.parametrize(
    ("share", "message"), [(1e-9, "holds out none of 40"), (1 - 1e-9, "leaves none of 40")]
)
def test_a_split_without_documents(config, share, message):
    config.held_out = share
    with pytest.raises(ConfigError, match=rf"data\.held_out=.* {message} documents"):
        build_store(config, 0)


def test_progress_in_plain_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(token_store, "_BATCH_CHARACTERS", 1)
    store = build_store(config, 0)
    out, err = capsys.readouterr()
    total = sum(len(text.encode()) for text in TEXTS.values()) / 1e6
    lines = err.splitlines()
    assert out == ""
    assert "\r" not in err
    assert len(lines) == 11
    assert lines[9] == f"building {store.directory}: {total:.1f} of {total:.1f} MB"
    assert lines[10].startswith("skipped 1, the first: ")
