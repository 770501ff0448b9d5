"""Tokenizers of other models: their texts, their special ids, and streamed texts."""

import json
import sys

import pytest
import tokenizers as hf
from pretrained_tokenizers import (
    TEXTS,
    byte_level_with,
    cl100k,
    gpt,
    llama,
    llama_like,
    sentencepiece,
)

from retnet_jax.config import DataConfig
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.tokenizers import BPETokenizer, TextStream, load_tokenizer
from retnet_jax.data.tokenizers.pretrained import HuggingFaceTokenizer, SentencePieceTokenizer
from retnet_jax.errors import ConfigError

KINDS = pytest.mark.parametrize("make", [llama, gpt, sentencepiece, cl100k])


@KINDS
@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_gives_the_text_back(make, text, tmp_path):
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.end_id} & set(ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.end_id]) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@KINDS
@pytest.mark.parametrize("text", ["<s>x</s>", "a <|endoftext|>"])
def test_special_tokens_in_a_text_are_encoded_as_text(make, text, tmp_path):
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.end_id} & set(ids)
    assert tokenizer.decode(ids) == text


@KINDS
def test_a_saved_tokenizer_is_the_same(make, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    tokenizer = make(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    saved = load_tokenizer(tmp_path / "out")
    assert type(saved) is type(tokenizer)
    for name in ("fingerprint", "vocab_size", "bos_id", "end_id"):
        assert getattr(saved, name) == getattr(tokenizer, name)
    assert saved.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


@KINDS
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_streamed_text_equals_decoded_text(make, size, tmp_path):
    tokenizer = make(tmp_path)
    text = " ".join(TEXTS) + "🦑" * 30 + "  x"
    ids = tokenizer.encode(text)
    assert len(ids) > 100
    stream = TextStream(tokenizer)
    pieces = [stream.add(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.rest() == text
    if size == 1:
        assert sum(piece != "" for piece in pieces) > 60


@KINDS
def test_a_continuation_keeps_its_leading_space(make, tmp_path):
    tokenizer = make(tmp_path)
    ids = tokenizer.encode("def state return 1 2 3")
    spaces = 0
    for cut in range(1, len(ids)):
        stream = TextStream(tokenizer, before=[tokenizer.bos_id, *ids[:cut]])
        continuation = stream.add(ids[cut:]) + stream.rest()
        assert tokenizer.decode(ids[:cut]) + continuation == "def state return 1 2 3"
        spaces += continuation.startswith(" ")
    assert spaces


@KINDS
def test_an_incomplete_character_at_the_end_is_shown(make, tmp_path):
    tokenizer = make(tmp_path)
    stream = TextStream(tokenizer)
    assert stream.add(tokenizer.encode("def🦑")[:-1]) == "def"
    assert set(stream.rest()) == {"\ufffd"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}, (1, 2)),
        ({"special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, (2, 2)),
        ({"tokenizer_config.json": {"bos_token": "<s>", "eos_token": None}}, (1, 1)),
        ({"config.json": {"bos_token_id": 1, "eos_token_id": [2, 7]}}, (1, 2)),
        ({"generation_config.json": {"eos_token_id": 2}}, (2, 2)),
        (
            {
                "tokenizer_config.json": {"bos_token": "<s>"},
                "config.json": {"bos_token_id": 0, "eos_token_id": 2},
            },
            (1, 2),
        ),
    ],
)
def test_special_ids_are_read_from_the_files_in_order(files, expected, tmp_path):
    (tmp_path / "tokenizer.json").write_text(llama_like())
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos_id, tokenizer.end_id) == expected


def test_unmarked_special_tokens_are_encoded_as_text(tmp_path):
    values = json.loads(llama_like())
    for token in values["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<s>x</s>")
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<s>x</s>"


def test_sentencepiece_models_have_their_special_ids(tmp_path):
    tokenizer = sentencepiece(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.bos_id, tokenizer.end_id) == (1, 2)


def test_missing_or_damaged_tokenizer_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"has none of tokenizer.json, tokenizer.model, cl100k"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(llama_like())
    with pytest.raises(ValueError, match=r"which token opens or ends a text.*tokenizer_config"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 99999}')
    with pytest.raises(ValueError, match=r"config.json: bos_token_id=99999 is not an id"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    if "sentencepiece" in sys.modules:
        with pytest.raises(ValueError, match=r"tokenizer.model is not a SentencePiece model"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(b"")
        with pytest.raises(ValueError, match=r"tokenizer.model is empty"):
            load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_files_without_ranks_are_refused(tmp_path):
    pytest.importorskip("tiktoken")
    for contents in (b"not base64 at all", b"YQ== 0\n"):
        (tmp_path / "cl100k_base.tiktoken").write_bytes(contents)
        with pytest.raises(
            ValueError, match=r"cl100k_base.tiktoken does not have tokens and ranks"
        ):
            load_tokenizer(tmp_path)


def test_a_store_with_the_tokenizer_of_a_model(tmp_path):
    for name in ("model", "moved"):
        (tmp_path / name).mkdir()
        tokenizer = llama(tmp_path / name)
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number}: {TEXTS[number % 3]}")
    config = DataConfig(
        source="text",
        path=str(tmp_path / "corpus/*.txt"),
        tokenizer=str(tmp_path / "model"),
        store=str(tmp_path / "store"),
        held_out=0.3,
    )
    store = open_or_build(config, vocab_size=400)
    assert store.tokenizer.fingerprint == tokenizer.fingerprint
    first = store.train.document(0).tolist()
    assert first[0] == tokenizer.bos_id == 1
    assert store.tokenizer.decode(first) == (tmp_path / "corpus" / store.train.names[0]).read_text()
    # The same tokenizer in another directory fits the store; another tokenizer does not.
    config.tokenizer = str(tmp_path / "moved")
    assert open_or_build(config, vocab_size=400).manifest == store.manifest
    (tmp_path / "moved/tokenizer_config.json").write_text('{"bos_token": "</s>"}')
    with pytest.raises(ConfigError, match=r"data.tokenizer: 'pretrained "):
        open_or_build(config, vocab_size=400)
    config.tokenizer = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model.vocab_size=260 is less than the 2\d\d tokens"):
        open_or_build(config, vocab_size=260)
    # An existing store does not need the directory of the tokenizer; a new one does.
    config.tokenizer = str(tmp_path / "gone")
    assert open_or_build(config, vocab_size=400).manifest == store.manifest
    config.tokenizer, config.store = "bep", str(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"data.tokenizer='bep' is not one of 'byte', 'bpe', and"):
        open_or_build(config, vocab_size=400)


@KINDS
@pytest.mark.parametrize("size", [1, 3, 40])
def test_prompt_and_continuation_make_up_the_whole_text(make, size, tmp_path):
    """For every end of the prompt: within a character, before and after a U+FFFD in the text."""
    tokenizer = make(tmp_path)
    text = "def \ufffd" + "🦑" * 12 + "\ufffd\ufffd x " + "ደ" * 9 + " self"
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        stream = TextStream(tokenizer, before=ids[:cut])
        parts = [stream.add(ids[start : start + size]) for start in range(cut, len(ids), size)]
        whole = "".join(parts) + stream.rest()
        prompt = tokenizer.decode(ids[:cut])
        assert prompt.endswith("\ufffd") or prompt + whole == text
        assert text.endswith(whole)
        assert text[: len(text) - len(whole)] == prompt[: len(text) - len(whole)]
        last = TextStream(tokenizer, before=ids[:cut][-TextStream.context :])  # as in a saved state
        assert last.add(ids[cut:]) + last.rest() == whole


@pytest.mark.parametrize("make", [llama, sentencepiece, cl100k])  # with bytes as tokens
def test_an_incomplete_character_does_not_affect_others(make, tmp_path):
    tokenizer = make(tmp_path)
    ids = tokenizer.encode("x🦑🦑🦑")
    ids = [*ids[:-5], *ids[-4:]]
    decoded = tokenizer.decode([*ids, *tokenizer.encode("a")]).replace(" ", "")
    assert decoded.startswith("x🦑")
    assert decoded.endswith("🦑a")
    assert set(decoded[2:-2]) == {"\ufffd"}
    stream = TextStream(tokenizer)
    assert "".join(stream.add([i]) for i in ids) + stream.rest() == tokenizer.decode(ids)


def test_endless_incomplete_bytes_are_output_and_freed(tmp_path):
    tokenizer = llama(tmp_path)
    byte = tokenizer.encode("🦑")[-1]
    stream = TextStream(tokenizer)
    given = "".join(stream.add([byte]) for _ in range(300))
    assert 290 <= len(given) < 300
    assert set(given) == {"\ufffd"}
    assert given + stream.rest() == tokenizer.decode([byte] * 300)
    assert len(stream._ids) < 100


def test_bos_and_eos_of_other_tokenizers(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_with(["<bos>", "<eos>"]))
    with pytest.raises(ValueError, match="which token opens or ends a text"):
        load_tokenizer(tmp_path)
    end = hf.Tokenizer.from_str(path.read_text()).token_to_id("<eos>")
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": end}))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos_id, tokenizer.end_id) == (0, end)
    path.write_text(byte_level_with(["<bos>"]))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0}')
    assert isinstance(load_tokenizer(tmp_path), BPETokenizer)  # as this project exports its own
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 5}')
    assert load_tokenizer(tmp_path).end_id == 5


@pytest.mark.parametrize("newer", [False, True])
def test_tokens_added_to_a_sentencepiece_model(newer, tmp_path):
    plain = sentencepiece(tmp_path)
    pieces = plain.vocab_size
    tokens = {"<|im_end|>": pieces, "<|im_start|>": pieces + 1}
    values = {"eos_token": "<|im_end|>"}
    if newer:
        decoder = {str(i): {"content": token} for token, i in tokens.items()}
        values["added_tokens_decoder"] = decoder | {"2": {"content": "</s>"}}
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(tokens))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for found in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert (found.bos_id, found.end_id, found.vocab_size) == (1, pieces, pieces + 2)
        ids = found.encode("def <|im_end|> x")
        assert pieces not in ids
        assert found.decode(ids) == "def <|im_end|> x"
        assert found.decode([*ids, pieces + 1, *ids[:1], pieces]).startswith(
            "def <|im_end|> x<|im_start|>"
        )
        assert found.fingerprint == tokenizer.fingerprint != plain.fingerprint
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<a>": "b"}')
    with pytest.raises(
        ValueError, match=r"added_tokens.json: the id of '<a>' is 'b', not a number"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config.json": {"bos_token_id": 1, "eos_token_id": [2, 7]}}, (2, 7)),
        (
            {
                "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
                "generation_config.json": {"eos_token_id": [9, 2, 7]},
            },
            (2, 9, 7),
        ),
        (
            {
                "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
                "config.json": {"eos_token_id": 7},
            },
            (2,),
        ),
    ],
)
def test_all_end_ids_are_kept(files, ends, tmp_path):
    (tmp_path / "tokenizer.json").write_text(llama_like())
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    (tmp_path / "saved").mkdir()
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert tokenizer.end_ids == saved.end_ids == ends
    assert (tokenizer.bos_id, tokenizer.end_id) == (1, ends[0])
    assert tokenizer.fingerprint == saved.fingerprint
    assert tokenizer.decode([*tokenizer.encode("def x"), *ends]) == "def x"


@pytest.mark.parametrize("special", [True, False])
def test_surplus_tokens_are_refused_unless_they_are_special(special, tmp_path):
    tokenizer = hf.Tokenizer.from_str(llama_like())
    size = tokenizer.get_vocab_size()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["<pad>"])
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    loaded = load_tokenizer(tmp_path / "model")
    assert loaded.vocab_size == size + 1
    assert loaded.surplus(size) == ({} if special else {size: "▁<pad>"})
    assert loaded.surplus(size - 1).keys() >= {size - 1}
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"{number} <pad>")
    config = DataConfig(
        source="text",
        path=str(tmp_path / "*.txt"),
        tokenizer=str(tmp_path / "model"),
        store=str(tmp_path / "store"),
        held_out=0.3,
    )
    if special:
        store = open_or_build(config, vocab_size=size)
        assert store.train.read(0, store.train.token_count).max() < size
    else:
        message = rf"vocab_size={size} is less than the {size + 1} tokens .* {size} '▁<pad>'"
        with pytest.raises(ConfigError, match=message):
            open_or_build(config, vocab_size=size)
        assert not (tmp_path / "store").exists()


@KINDS
def test_every_token_has_a_text_to_show(make, tmp_path):
    tokenizer = make(tmp_path)
    shown = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    assert all(shown[i] for i in (tokenizer.bos_id, tokenizer.end_id))
    assert sum(token is not None for token in shown) > 256
    assert tokenizer.surplus(tokenizer.vocab_size) == {}
    assert tokenizer.unknown_id in (None, 0)
    assert all(shown[i] is not None for i in tokenizer.encode(TEXTS[1]))
