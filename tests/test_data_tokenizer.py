"""Tokenizers: every text is decoded exactly, and no text is encoded to a BOS."""

import functools
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer,
    text_parts,
    train_bpe,
)
from retnet_jax.errors import ConfigError

WORDS = ["def return self retention state chunk", "größer → 😀 naïve", "for i in range(10):\n    x"]


@functools.cache
def bpe() -> BPETokenizer:
    return train_bpe(WORDS * 3, vocab_size=300)


TOKENIZERS = pytest.mark.parametrize("make", [ByteTokenizer, bpe], ids=["byte", "bpe"])
# All characters but surrogates, which are not text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["\r\n", "\r", "\x00", "<bos>", "😀", " ", "def", "́"])
).map("".join)


@TOKENIZERS
@settings(deadline=None)
@given(text=TEXTS)
def test_every_text_comes_back(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(text=TEXTS, most=st.integers(1, 9))
def test_parts_are_the_text(text, most):
    parts = list(text_parts(text, most))
    assert "".join(parts) == text
    assert all(0 < len(part) <= most for part in parts) or parts == [""]


@TOKENIZERS
@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["def", "größer", "10", "x\n\n", "", "'re,", "²½", "漢字"])))
def test_parts_cut_between_words_have_the_tokens_of_the_whole(make, words):
    text = " ".join(words)
    parts = list(text_parts(text, 8))
    cuts = [one[-1] + other[:2] for one, other in itertools.pairwise(parts)]
    if all(cut[0].isalnum() and cut[1] == " " and cut[2:].isalnum() for cut in cuts):
        ids = [i for part in make().encode_batch(parts) for i in part]
        assert ids == make().encode(text)


@TOKENIZERS
def test_the_text_of_bos_is_encoded_as_text(make):
    tokenizer = make()
    ids = tokenizer.encode("a<bos>b")
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.bos_id]) == "a<bos>b"


@TOKENIZERS
def test_incomplete_characters_are_decoded(make):
    tokenizer = make()
    ids = tokenizer.encode("é🦑")
    assert len(ids) > 2
    assert tokenizer.decode(ids[:-1]) == "é�"


@TOKENIZERS
def test_batch_equals_one_by_one(make):
    tokenizer = make()
    assert tokenizer.encode_batch([*WORDS, ""]) == [*map(tokenizer.encode, WORDS), []]


@TOKENIZERS
def test_saved_and_loaded_is_the_same(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
    text = " <bos>".join(WORDS)
    assert loaded.encode(text) == tokenizer.encode(text)


def test_a_vocabulary_and_merges_are_the_tokenizer_they_came_from(tmp_path):
    library = pytest.importorskip("tokenizers")
    contents = bpe().files["tokenizer.json"].decode()
    library.Tokenizer.from_str(contents).model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.bos_id, loaded.end_id) == (300, 0, 0)
    for text in WORDS:
        assert loaded.encode(text) == bpe().encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode(WORDS[0]) == bpe().encode(WORDS[0])
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=r"vocab\.json lacks some of the 256 bytes"):
        load_tokenizer(tmp_path)


def test_byte_ids_are_bytes():
    assert ByteTokenizer().encode("aé") == [97, 0xC3, 0xA9]
    assert (ByteTokenizer().bos_id, ByteTokenizer().vocab_size) == (256, 257)


def test_bpe_has_the_size_asked_for_and_bos_first():
    assert (bpe().bos_id, bpe().vocab_size) == (0, 300)
    assert len(bpe().encode(WORDS[0])) < len(WORDS[0]) / 2


def test_bpe_training_is_deterministic():
    assert train_bpe(iter(WORDS * 3), 300).fingerprint == bpe().fingerprint
    assert train_bpe(WORDS * 3, 299).fingerprint != bpe().fingerprint


@pytest.mark.parametrize("word", ["a", "\x00", "-", "中"])
def test_a_long_word_is_learned_in_parts_and_encoded_whole(word):
    """In parts of 1000 bytes, because the time grows with the square of a word's length."""
    text = word * 20_000
    with pytest.raises(ConfigError, match=r"more than the \d+ tokens that") as refusal:
        train_bpe([text], 300)
    most = int(re.search(r"than the (\d+) tokens", str(refusal.value))[1])
    tokenizer = train_bpe([text], most)
    kept = json.loads(tokenizer.files["tokenizer.json"])["pre_tokenizer"]
    assert kept["type"] == "ByteLevel"
    longest = max(len(tokenizer.token(i)) for i in range(most))  # a character for each byte
    assert 256 <= longest <= 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_impossible_vocabulary_sizes_are_named():
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is less than 257"):
        train_bpe(WORDS, 256)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=5000 is more than the \d+ tokens"):
        train_bpe(WORDS, 5000)


@pytest.mark.parametrize("contents", ["", "{}", '{"type": "unigram"}'])
def test_another_file_is_named(tmp_path, contents):
    (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
