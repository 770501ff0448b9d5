"""A sample of the documents, to train a byte-level BPE or to test a tokenizer."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from retnet_jax.config import DataConfig
from retnet_jax.data.sources import Document, Skipped, read_documents
from retnet_jax.data.split import hash_of_name, parts_of, split_of
from retnet_jax.data.tokenizers import BPETokenizer, train_bpe
from retnet_jax.errors import ConfigError

_CHARACTERS = 8_000_000  # in a sample for a BPE; more hardly changes the merges


def train_tokenizer(
    configs: Sequence[DataConfig], vocab_size: int, skipped: Skipped
) -> BPETokenizer:
    """Trains a byte-level BPE on equally large samples of several corpora.

    Args:
      configs: Configs of the corpora; what their stores hold out is not used.
      vocab_size: Number of tokens.
      skipped: Documents that cannot be used are added to it.

    Raises:
      ConfigError: if a corpus has no documents to train on, or all together give fewer tokens.
    """
    texts: list[str] = []
    for config in configs:
        sample = _training_sample(config, skipped)
        if not sample.texts():
            raise ConfigError(
                f"data.path={config.path!r} has no documents to train a tokenizer on; "
                f"{skipped.count} skipped{f': {skipped}' if skipped.count else ''}"
            )
        texts += sample.texts()
    return train_bpe(texts, vocab_size)


def _training_sample(config: DataConfig, skipped: Skipped) -> Sample:
    """A sample of the text that a store of the corpus would train on."""
    auto = config.held_out_by == "auto"
    samples = {by: Sample() for by in (("document", "tail") if auto else (config.held_out_by,))}
    splits = set()  # those that have a document
    for document in read_documents(config, skipped):
        splits.add(split_of(document, config.held_out))
        for held_out_by, sample in samples.items():
            for split, part in parts_of([document], config.held_out, held_out_by):
                if split == "train":
                    sample.add(part)
    return samples["tail" if auto and len(splits) < 2 else next(iter(samples))]


class Sample:
    """The documents whose names have the smallest hashes.

    It depends only on the documents, not on their order or on how they are divided into shards.

    Args:
      characters: Approximate number of characters in the sample; None: enough for a BPE.
      of_document: Largest number of characters from one document; None: `characters`.
    """

    def __init__(self, characters: int | None = None, of_document: int | None = None):
        self._most = characters or _CHARACTERS
        self._of_document = of_document or self._most
        # The hashes are negated, so that the largest is removed first.
        self._heap: list[tuple[float, str, str]] = []
        self._characters = 0

    def add(self, document: Document) -> None:
        self.push(hash_of_name(document.name), document.name, document.text[: self._of_document])

    def push(self, name_hash: float, name: str, text: str) -> None:
        """Adds an item of another sample."""
        heapq.heappush(self._heap, (-name_hash, name, text))
        self._characters += len(text)
        while self._characters - len(self._heap[0][2]) >= self._most:
            self._characters -= len(heapq.heappop(self._heap)[2])

    def items(self) -> list[tuple[float, str, str]]:
        """(hash, name, text), the smallest hash first."""
        return sorted((-negated, name, text) for negated, name, text in self._heap)

    def texts(self) -> list[str]:
        """The texts, in the order for training a BPE."""
        return [text for _, _, text in reversed(self.items())]
