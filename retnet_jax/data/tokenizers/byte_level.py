"""Text to token ids and back: bytes, or byte-level BPE, without loss; or another model's."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Protocol

from retnet_jax.errors import ConfigError

BOS = "<bos>"
FILE_NAME = "tokenizer.json"


class Tokenizer(Protocol):
    """What all tokenizers are. The two of this file give every string back exactly."""

    vocab_size: int  # ids are 0 ... vocab_size - 1
    bos_id: int  # opens every document; no text is ever encoded to it
    end_id: int  # ends a text that a model generates
    files: dict[str, bytes]  # what `save` writes, by name

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without BOS and end; a torn character becomes U+FFFD."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without BOS."""
        return self.encode_batch([text])[0]

    def save(self, directory: Path) -> None:
        """Writes the files from which `load_tokenizer` makes the same tokenizer."""
        for name, contents in self.files.items():
            (directory / name).write_bytes(contents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what `save` writes, in hex: equal for equal tokenizers."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()


class TextStream:
    """The text of tokens that come piece by piece.

    A character that is split over tokens comes whole, with the last of them. A token's text can
    depend on the one before it, so some of those are decoded again.

    Args:
      tokenizer: what the ids are of.
      before: ids in front of the first piece, whose text is known.

    Attributes:
      context: how many tokens are decoded again with the ones after them.
    """

    context = 16

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(before)[-self.context :]
        # In characters; one that is torn comes with its last token.
        self._shown = len(tokenizer.decode(self._ids).rstrip("\ufffd"))

    def add(self, ids: list[int]) -> str:
        """The text that is known now and was not before."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        known = len(text.rstrip("\ufffd"))
        new = text[self._shown : known]
        self._shown = max(self._shown, known)
        if known == len(text) and len(self._ids) > 4 * self.context:
            self._ids = self._ids[-self.context :]
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def copy(self) -> "TextStream":
        """One that stands at the same place."""
        other = TextStream(self._tokenizer)
        other._ids, other._shown = list(self._ids), self._shown
        return other

    def rest(self) -> str:
        """What was held back, if no more comes."""
        return self._tokenizer.decode(self._ids)[self._shown :]


def text_parts(text: str, most: int) -> Iterator[str]:
    """A text in parts of at most `most` characters, in order.

    It is cut in front of a space between two words, where byte-level BPE and cl100k_base cut too,
    so the tokens of the parts are those of the whole; but where half of `most` has no such place,
    anywhere. A tokenizer that puts a space in front of each text puts one in front of each part.
    """
    start = 0
    while len(text) - start > most:
        least, cut = start + most // 2, start + most
        while (cut := text.rfind(" ", least, cut)) > 0:
            if text[cut - 1].isalnum() and text[cut + 1].isalnum():
                break
        cut = cut if cut > start else start + most
        yield text[start:cut]
        start = cut
    yield text[start:]


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text's UTF-8; 256 is BOS."""

    vocab_size = 257
    bos_id = end_id = 256
    files: ClassVar = {FILE_NAME: json.dumps({"type": "byte"}).encode()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.bos_id).decode("utf-8", errors="replace")


class BPETokenizer(Tokenizer):
    """A byte-level BPE in the format of Hugging Face's `tokenizers`.

    Args:
      serialised: the contents of a `tokenizer.json` with byte-level pieces and a `<bos>` token.
    """

    def __init__(self, serialised: str):
        self.files = {FILE_NAME: serialised.encode()}
        self._bpe = hugging_face().Tokenizer.from_str(serialised)
        # "<bos>" inside a text is five characters, never the BOS id. The file cannot say this.
        self._bpe.encode_special_tokens = True
        self.vocab_size = self._bpe.get_vocab_size()
        self.bos_id = self.end_id = self._bpe.token_to_id(BOS)
        byte_of = _byte_of_character()
        self._bytes = [
            bytes(byte_of[character] for character in self._bpe.id_to_token(i))
            for i in range(self.vocab_size)
        ]
        self._bytes[self.bos_id] = b""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens: `<bos>` (id 0), the 256 bytes, and merges.

    The same texts in the same order give the same tokenizer.

    Raises:
      ConfigError: if `vocab_size` is less than 257, or more than the texts have merges for.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is less than 257, the 256 bytes and {BOS}, "
            "with which a byte-level BPE begins"
        )
    hf = hugging_face()
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = hf.decoders.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is more than the {bpe.get_vocab_size()} tokens that "
            "the training documents give; lower it to that or less, or set data.tokenizer='byte'"
        )
    return BPETokenizer(bpe.to_str())


def hugging_face() -> ModuleType:
    """The package `tokenizers`."""
    # Left unset, the library warns on stderr at every later fork. Nothing here encodes in a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tokenizers

    return tokenizers


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes bytes as characters: printable Latin-1 as itself, the rest from U+0100.

    So in the order of characters the printable bytes come first, then all others, each in turn.
    """
    characters = sorted(hugging_face().pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(character) for character in characters if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(characters, printable + others, strict=True))
