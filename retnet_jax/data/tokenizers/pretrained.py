"""Tokenizers of other models: Hugging Face (tokenizer.json), SentencePiece, and tiktoken.

Such a tokenizer may be lossy: changes by its normaliser, mostly of spaces at the ends, are not
undone by decoding.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar

from retnet_jax.data.tokenizers.base import (
    ADDED_NAME,
    CONFIG_NAME,
    FILE_NAME,
    SENTENCEPIECE_NAME,
    TIKTOKEN_NAME,
    Tokenizer,
    hugging_face,
)
from retnet_jax.errors import ConfigError


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library.

    Args:
      serialised: Contents of its tokenizer.json.
      bos_id: Id that opens every document.
      end_ids: Ids that end a generated text; the first is the `end_id`.
    """

    def __init__(self, serialised: str, bos_id: int, end_ids: Sequence[int]):
        self._tokenizer = hugging_face().Tokenizer.from_str(serialised)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_id, self.end_ids = bos_id, tuple(end_ids)
        self.end_id = self.end_ids[0]
        self._special = {bos_id, *end_ids}
        # Otherwise text would be encoded to these tokens if the file does not mark them as special.
        token_of = self._tokenizer.id_to_token
        self._tokenizer.add_special_tokens([token_of(i) for i in (bos_id, *self.end_ids)])
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._byte_of = _byte_tokens(self._tokenizer, serialised)
        self.files = {
            FILE_NAME: serialised.encode(),
            CONFIG_NAME: _special_tokens(token_of, bos_id, self.end_ids),
        }

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [i for i in ids if i not in self._special]
        if not self._byte_of.keys().isdisjoint(ids):
            return self._tokenizer.decoder.decode(self._whole_characters(ids))
        return self._tokenizer.decode(ids)

    def _whole_characters(self, ids: Sequence[int]) -> list[str]:
        """The tokens that `decode` shows, with bytes of incomplete characters as U+FFFD.

        The library itself replaces a whole run of bytes by U+FFFD if one character is incomplete.
        """
        tokens = []
        for is_bytes, run in itertools.groupby(ids, self._byte_of.__contains__):
            if not is_bytes:
                tokens += self._visible(run)
                continue
            contents = bytes(self._byte_of[i] for i in run)
            for character in contents.decode(errors="surrogateescape"):
                if "\udc80" <= character <= "\udcff":
                    tokens.append("\ufffd")
                else:
                    tokens += (f"<0x{byte:02X}>" for byte in character.encode())
        return tokens

    def _visible(self, ids: Iterable[int]) -> list[str]:
        tokens = map(self._tokenizer.id_to_token, ids)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        return [token for token in tokens if token is not None and token not in special]

    @functools.cached_property
    def _special_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {number for number, token in added.items() if token.special}

    @functools.cached_property
    def unknown_id(self) -> int | None:
        model = json.loads(self.files[FILE_NAME])["model"]
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str | None:
        token = self._tokenizer.id_to_token(number)
        if number in (self.bos_id, self.end_id) or number not in self._special_ids:
            return token
        # Special tokens are not searched in texts, but a vocabulary may have them as words too.
        return token if number in self.encode(token) else None


def _byte_tokens(tokenizer, serialised: str) -> dict[int, int]:
    """The byte of each token such as <0xE3>, if the decoder combines them to characters."""
    if "ByteFallback" not in json.dumps(json.loads(serialised).get("decoder")):
        return {}
    ids = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
    return {i: byte for i, byte in ids.items() if i is not None}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and tokens that were added to it.

    Args:
      serialised: Contents of its tokenizer.model.
      bos_id: Id that opens every document.
      end_ids: Ids that end a generated text; the first is the `end_id`.
      added: Ids of added tokens. No text is encoded to them.
    """

    def __init__(
        self,
        serialised: bytes,
        bos_id: int,
        end_ids: Sequence[int],
        added: Mapping[str, int] = MappingProxyType({}),
    ):
        self._model = sentencepiece().SentencePieceProcessor(model_proto=serialised)
        self._added = {i: token for token, i in added.items()}
        self.vocab_size = max([self._model.get_piece_size() - 1, *self._added]) + 1
        self.bos_id, self.end_ids = bos_id, tuple(end_ids)
        self.end_id = self.end_ids[0]
        self._special = {bos_id, *end_ids}
        self.files = {
            SENTENCEPIECE_NAME: serialised,
            CONFIG_NAME: _special_tokens(self._token, bos_id, self.end_ids),
        }
        if added:
            self.files[ADDED_NAME] = (json.dumps(dict(added), indent=2) + "\n").encode()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def decode(self, ids: Iterable[int]) -> str:
        ids = [i for i in ids if i not in self._special]
        if self._added.keys().isdisjoint(ids):
            return self._model.decode(ids)
        return self._model.decode([self._token(i) for i in ids])

    def _token(self, number: int) -> str:
        return self._added.get(number) or self._model.id_to_piece(number)

    @property
    def unknown_id(self) -> int:
        return self._model.unk_id()

    def token(self, number: int) -> str | None:
        special = self._model.is_control(number) or self._model.is_unused(number)
        if special and number not in (self.bos_id, self.end_id):
            return None
        return self._model.id_to_piece(number)


class Cl100kTokenizer(Tokenizer):
    """tiktoken's cl100k_base, the vocabulary of arXiv 2307.08621; `<|endoftext|>` is its BOS.

    Args:
      ranks: Contents of cl100k_base.tiktoken: on each line a token in base64 and its id.

    Raises:
      ValueError: if the contents have another format.
      ConfigError: if the package tiktoken is missing.
    """

    vocab_size = 100_277
    bos_id = end_id = 100_257
    end_ids = (100_257,)
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
            raise ValueError(f"{TIKTOKEN_NAME} does not have tokens and ranks: {error}") from error
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

    def token(self, number: int) -> str | None:
        if number == self.bos_id:
            return "<|endoftext|>"
        if number > self.bos_id:
            return None
        try:
            return self._encoding.decode_single_token_bytes(number).decode(errors="replace")
        except KeyError:
            return None


def _special_tokens(token_of: Callable[[int], str], bos_id: int, end_ids: Sequence[int]) -> bytes:
    """A tokenizer_config.json with the special tokens; several ids that end a text are listed."""
    values: dict[str, Any] = {"bos_token": token_of(bos_id), "eos_token": token_of(end_ids[0])}
    if len(end_ids) > 1:
        values["eos_token_id"] = list(end_ids)
    return (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()


def sentencepiece() -> ModuleType:
    """The package `sentencepiece`."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            f"{SENTENCEPIECE_NAME} needs the package sentencepiece: pip install sentencepiece"
        ) from error
    return sentencepiece
