"""Tokenizers that others made: of Hugging Face (tokenizer.json), SentencePiece, and tiktoken.

Which ids open and end a text stands beside the tokenizer's file, in any of several places. Special
tokens are put in by this project's programs alone: none is added to a text that is encoded, and
"<s>" inside a text is three characters.

Such a tokenizer may be lossy: what its normaliser changes, spaces at the ends above all, does not
come back.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from retnet_jax.data.tokenizers.byte_level import (
    BOS,
    FILE_NAME,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    hugging_face,
)
from retnet_jax.errors import ConfigError

SENTENCEPIECE_NAME = "tokenizer.model"
TIKTOKEN_NAME = "cl100k_base.tiktoken"
CONFIG_NAME = "tokenizer_config.json"
NAMES = (FILE_NAME, SENTENCEPIECE_NAME, TIKTOKEN_NAME)
_OLD_NAMES = ("vocab.json", "merges.txt")  # of GPT-2 and its like, before tokenizer.json


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a directory: one that `save` wrote, or that came with a model.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if its file is damaged, or nothing says which ids open and end a text.
    """
    if (directory / FILE_NAME).is_file():
        return _load_json(directory)
    if (directory / SENTENCEPIECE_NAME).is_file():
        return _load_sentencepiece(directory)
    if (directory / TIKTOKEN_NAME).is_file():
        return Cl100kTokenizer((directory / TIKTOKEN_NAME).read_bytes())
    if has_tokenizer(directory):
        return _load_vocabulary(directory)
    raise FileNotFoundError(
        f"{directory} has none of {', '.join(NAMES)}, nor {' and '.join(_OLD_NAMES)}"
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether `load_tokenizer` would find a file."""
    old = all((directory / name).is_file() for name in _OLD_NAMES)
    return old or any((directory / name).is_file() for name in NAMES)


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library.

    Args:
      serialised: the contents of its tokenizer.json.
      bos_id: opens every document.
      end_id: ends a generated text.
    """

    def __init__(self, serialised: str, bos_id: int, end_id: int):
        self._tokenizer = hugging_face().Tokenizer.from_str(serialised)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A token that the file has not marked as special would be found in texts.
        self._tokenizer.add_special_tokens(
            [self._tokenizer.id_to_token(i) for i in (bos_id, end_id)]
        )
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.end_id = bos_id, end_id
        self.files = {
            FILE_NAME: serialised.encode(),
            CONFIG_NAME: _special_tokens(self._tokenizer.id_to_token, bos_id, end_id),
        }

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.bos_id, self.end_id}
        return self._tokenizer.decode([i for i in ids if i not in special])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Args:
      serialised: the contents of its tokenizer.model.
      bos_id: opens every document.
      end_id: ends a generated text.
    """

    def __init__(self, serialised: bytes, bos_id: int, end_id: int):
        self._model = _sentencepiece().SentencePieceProcessor(model_proto=serialised)
        self.vocab_size = self._model.get_piece_size()
        self.bos_id, self.end_id = bos_id, end_id
        self.files = {
            SENTENCEPIECE_NAME: serialised,
            CONFIG_NAME: _special_tokens(self._model.id_to_piece, bos_id, end_id),
        }

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.bos_id, self.end_id}
        return self._model.decode([i for i in ids if i not in special])


class Cl100kTokenizer(Tokenizer):
    """tiktoken's cl100k_base, the vocabulary of arXiv 2307.08621; `<|endoftext|>` is its BOS.

    Args:
      ranks: the contents of cl100k_base.tiktoken: a token in base64 and its id a line.

    Raises:
      ValueError: if they are something else.
      ConfigError: if the package tiktoken is not there.
    """

    vocab_size = 100_277
    bos_id = end_id = 100_257
    _special: ClassVar = {
        "<|endoftext|>": 100_257,
        "<|fim_prefix|>": 100_258,
        "<|fim_middle|>": 100_259,
        "<|fim_suffix|>": 100_260,
        "<|endofprompt|>": 100_276,
    }
    # Contractions, words, numbers of up to three digits, punctuation, line ends, spaces.
    _pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )

    def __init__(self, ranks: bytes):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(
                f"{TIKTOKEN_NAME} needs the package tiktoken: pip install tiktoken"
            ) from error
        try:
            pairs = (line.split() for line in ranks.splitlines() if line)
            merges = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            if not {bytes([byte]) for byte in range(256)} <= merges.keys():
                raise ValueError("it lacks some of the 256 bytes")
        except ValueError as error:
            raise ValueError(f"{TIKTOKEN_NAME} holds no tokens and ranks: {error}") from error
        self.files = {TIKTOKEN_NAME: ranks}
        self._encoding = tiktoken.Encoding(
            "cl100k_base",
            pat_str=self._pattern,
            mergeable_ranks=merges,
            special_tokens=self._special,
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        plain = [i for i in ids if i < self.bos_id]
        return self._encoding.decode_bytes(plain).decode("utf-8", errors="replace")


def _load_json(directory: Path) -> Tokenizer:
    path = directory / FILE_NAME
    contents = path.read_bytes()
    if contents == ByteTokenizer.files[FILE_NAME]:
        return ByteTokenizer()
    try:
        serialised = contents.decode()
        found = hugging_face().Tokenizer.from_str(serialised)
        decoder = json.loads(serialised).get("decoder") or {}
        ours = decoder.get("type") == "ByteLevel" and found.token_to_id(BOS) is not None
        if ours and not (directory / CONFIG_NAME).exists():
            return BPETokenizer(serialised)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    special = _special_ids(directory, found.token_to_id, found.id_to_token)
    return HuggingFaceTokenizer(serialised, *special)


def _load_vocabulary(directory: Path) -> Tokenizer:
    """A byte-level BPE of a vocabulary and merges; what is saved is its tokenizer.json."""
    library = hugging_face()
    try:
        model = library.models.BPE.from_file(*(str(directory / name) for name in _OLD_NAMES))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"{directory / _OLD_NAMES[0]} is no vocabulary: {error}") from error
    bpe = library.Tokenizer(model)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    if any(bpe.token_to_id(character) is None for character in alphabet):
        raise ValueError(f"{directory / _OLD_NAMES[0]} lacks some of the 256 bytes")
    in_front = bool(_values(directory / CONFIG_NAME).get("add_prefix_space", False))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=in_front)
    bpe.decoder = library.decoders.ByteLevel()
    added = _values(directory / "added_tokens.json")
    bpe.add_special_tokens(sorted(added, key=added.__getitem__))
    special = _special_ids(directory, bpe.token_to_id, bpe.id_to_token)
    return HuggingFaceTokenizer(bpe.to_str(), *special)


def _load_sentencepiece(directory: Path) -> Tokenizer:
    path = directory / SENTENCEPIECE_NAME
    contents = path.read_bytes()
    package = _sentencepiece()
    try:
        model = package.SentencePieceProcessor(model_proto=contents)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model: {error}") from error
    if not contents:  # which the library takes for no argument
        raise ValueError(f"{path} is empty")

    def id_of(piece: str) -> int | None:
        found = model.piece_to_id(piece)
        return found if model.id_to_piece(found) == piece else None

    def token_of(number: int) -> str | None:
        return model.id_to_piece(number) if 0 <= number < model.get_piece_size() else None

    own = {"bos": model.bos_id(), "eos": model.eos_id()}
    return SentencePieceTokenizer(contents, *_special_ids(directory, id_of, token_of, own))


def _special_ids(
    directory: Path,
    id_of: Callable[[str], int | None],
    token_of: Callable[[int], str | None],
    own: dict[str, int] | None = None,
) -> tuple[int, int]:
    """The ids that open and end a text; where only one is known, it does both.

    They are looked for as tokens in tokenizer_config.json and special_tokens_map.json, in the
    tokenizer itself, and as ids in config.json and generation_config.json; the first counts.
    """

    def found(kind: str) -> int | None:
        for name in (CONFIG_NAME, "special_tokens_map.json"):
            token = _values(directory / name).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and id_of(token) is not None:
                return id_of(token)
        if own is not None and own[kind] >= 0:
            return own[kind]
        for name in ("config.json", "generation_config.json"):
            number = _values(directory / name).get(f"{kind}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int):
                if token_of(number) is None:
                    raise ValueError(
                        f"{directory / name}: {kind}_token_id={number} is no id of the tokenizer"
                    )
                return number
        return None

    bos, end = found("bos"), found("eos")
    if bos is None and end is None:
        raise ValueError(
            f"nothing in {directory} says which token opens or ends a text; write it to "
            f'{directory / CONFIG_NAME}, such as {{"bos_token": "<s>", "eos_token": "</s>"}}'
        )
    return (end if bos is None else bos), (bos if end is None else end)


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _special_tokens(token_of: Callable[[int], str], bos_id: int, end_id: int) -> bytes:
    """The tokenizer_config.json that names the two tokens."""
    tokens = {"bos_token": token_of(bos_id), "eos_token": token_of(end_id)}
    return (json.dumps(tokens, ensure_ascii=False, indent=2) + "\n").encode()


def _sentencepiece():
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            f"{SENTENCEPIECE_NAME} needs the package sentencepiece: pip install sentencepiece"
        ) from error
    return sentencepiece
