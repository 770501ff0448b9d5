"""The interface of all tokenizers, and the names of their files."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from retnet_jax.errors import ConfigError
from retnet_jax.files.digests import sha256_of

if TYPE_CHECKING:
    from etils import epath

FILE_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
TIKTOKEN_NAME = "cl100k_base.tiktoken"
CONFIG_NAME = "tokenizer_config.json"  # beside the others; it names the special tokens
ADDED_NAME = "added_tokens.json"  # beside tokenizer.model; more tokens and their ids
TOKENIZER_FILES = (FILE_NAME, SENTENCEPIECE_NAME, TIKTOKEN_NAME)
SAVED_FILES = (*TOKENIZER_FILES, CONFIG_NAME, ADDED_NAME)  # all files that `save` may write


class Tokenizer(Protocol):
    """Text to token ids and back.

    Only this project's programs add special tokens. Text is never encoded to one: "<s>" inside a
    text is three characters.
    """

    vocab_size: int  # ids are 0 ... vocab_size - 1
    bos_id: int  # opens every document
    end_id: int  # ends a text that a model generates
    unknown_id: int | None = None  # for text without a token; None: all text has tokens
    end_ids: tuple[int, ...]  # all ids that end a text, `end_id` among them
    files: dict[str, bytes]  # contents of the files that `save` writes, by name

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without BOS and end. Bytes of an incomplete character become U+FFFD."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without BOS."""
        return self.encode_batch([text])[0]

    def token(self, number: int) -> str | None:
        """The token of an id, for messages; None for an id that no document can have."""
        ...

    def surplus(self, vocab_size: int) -> dict[int, str]:
        """The tokens, by id, that documents can have but a model with `vocab_size` ids has not."""
        tokens = {i: self.token(i) for i in range(vocab_size, self.vocab_size)}
        return {i: token for i, token in tokens.items() if token is not None}

    def check_fits(self, name: str, vocab_size: int) -> None:
        """Raises `ConfigError` if documents can have ids that a model does not have.

        Args:
          name: Name of the tokenizer, for the message.
          vocab_size: `model.vocab_size`.
        """
        surplus = self.surplus(vocab_size)
        if surplus:
            shown = ", ".join(f"{i} {token!r}" for i, token in list(surplus.items())[:5])
            raise ConfigError(
                f"model.vocab_size={vocab_size} is less than the {self.vocab_size} tokens of "
                f"{name}: documents can have {len(surplus)} that the model does not have, such as "
                f"{shown}"
            )

    def save(self, directory: Path | epath.Path) -> None:
        """Writes the files from which `load_tokenizer` loads the same tokenizer."""
        for name, contents in self.files.items():
            (directory / name).write_bytes(contents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files that `save` writes, in hex: equal for equal tokenizers."""
        return sha256_of(b"".join(self.files.values()))


@functools.cache
def hugging_face() -> ModuleType:
    """The package `tokenizers`, imported when it is first used.

    After encoding in several threads, the library warns on stderr at every fork, unless the
    environment variable is set. It is set here unless the user has set it; no process of this
    project encodes after a fork.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tokenizers

    return tokenizers
