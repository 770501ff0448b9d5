"""Lossless tokenizers: the bytes of a text, and byte-level BPE trained by this project."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import ClassVar

from retnet_jax.data.tokenizers.base import FILE_NAME, Tokenizer, hugging_face
from retnet_jax.errors import ConfigError

BOS = "<bos>"

_LONGEST_WORD = 1000  # bytes


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the UTF-8 bytes of the text; 256 is BOS."""

    vocab_size = 257
    bos_id = end_id = 256
    end_ids = (256,)
    files: ClassVar = {FILE_NAME: json.dumps({"type": "byte"}).encode()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.bos_id).decode("utf-8", errors="replace")

    def token(self, number: int) -> str:
        return BOS if number == self.bos_id else f"<0x{number:02X}>"


class BPETokenizer(Tokenizer):
    """A byte-level BPE in the format of Hugging Face's `tokenizers`.

    Args:
      serialised: Contents of a `tokenizer.json` with byte-level pieces and a `<bos>` token.
    """

    def __init__(self, serialised: str):
        self.files = {FILE_NAME: serialised.encode()}
        self._bpe = hugging_face().Tokenizer.from_str(serialised)
        # "<bos>" inside a text is five characters, never the BOS id. The file cannot store this.
        self._bpe.encode_special_tokens = True
        self.vocab_size = self._bpe.get_vocab_size()
        self.bos_id = self.end_id = self._bpe.token_to_id(BOS)
        self.end_ids = (self.end_id,)
        byte_of = byte_of_character()
        self._bytes = [
            bytes(byte_of[character] for character in self._bpe.id_to_token(i))
            for i in range(self.vocab_size)
        ]
        self._bytes[self.bos_id] = b""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def token(self, number: int) -> str | None:
        return self._bpe.id_to_token(number)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens: `<bos>` (id 0), the 256 bytes, and merges.

    The same texts in the same order give the same tokenizer. Merges are learned within words, as
    the regular expression of GPT-2 finds them. The time to learn grows with the square of a word's
    length, and a text without spaces may be one word of millions of bytes. So words are learned in
    parts of at most 1000 bytes; the tokenizer encodes them whole.

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
    words = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = hf.pre_tokenizers.Split(hf.Regex(f".{{1,{_LONGEST_WORD}}}"), "isolated")
    bpe.pre_tokenizer = hf.pre_tokenizers.Sequence([words, parts])
    bpe.decoder = hf.decoders.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = words
    if bpe.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is more than the {bpe.get_vocab_size()} tokens that "
            "the training documents give; lower it to that or less, or set data.tokenizer='byte'"
        )
    return BPETokenizer(bpe.to_str())


def byte_of_character() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for.

    Printable Latin-1 bytes are written as themselves, the others as characters from U+0100 on. So
    in the order of characters the printable bytes come first, then the others, both ascending.
    """
    characters = sorted(hugging_face().pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(character) for character in characters if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(characters, printable + others, strict=True))
