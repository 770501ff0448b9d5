"""Encodes documents and writes them as the files of one shard.

A document is encoded in parts, and tokens are appended to the files as they come, so even a very
long document needs little memory.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet_jax.data.block_digests import write_block_digests
from retnet_jax.data.sources import Document
from retnet_jax.data.token_store import SPLITS, token_dtype
from retnet_jax.data.tokenizers import Tokenizer, text_parts
from retnet_jax.data.workers import advance

OLD_RECORD = "shard.json"  # in a shard of format 3: its entry for the manifest

_BATCH_CHARACTERS = 2_000_000  # encoded at once: enough for all threads, with little memory
_PART_CHARACTERS = 1_000_000  # of a document; `tokenizers` needs 90 times the memory of the text


def write_shard(
    directory: Path, documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer
) -> dict[str, dict[str, int]]:
    """Writes the arrays and names of a shard, in the format of `token_store.py`.

    Args:
      directory: An empty directory.
      documents: The split of each document, and the document.
      tokenizer: Tokenizer that encodes them.

    Returns:
      The numbers of documents, tokens and bytes of each split.
    """
    writers = {split: _SplitWriter(directory, split, tokenizer) for split in SPLITS}
    for batch in _batches(_parts(documents)):
        ids = tokenizer.encode_batch([part.text for part in batch])
        encoded = list(zip(batch, ids, strict=True))
        for split, writer in writers.items():
            writer.append([x for x in encoded if x[0].split == split])
        advance(sum(len(part.text) for part in batch))
    return {split: writer.finish() for split, writer in writers.items()}


def completed_shard(directory: Path) -> dict[str, Any] | None:
    """Adds digests of blocks to a shard of format 3.

    Returns:
      Its entry for the manifest; None if its files are not what was written.
    """
    try:
        record = json.loads((directory / OLD_RECORD).read_text())
        found = write_block_digests(directory, record["files"])
        intact = found["files"] == record["files"]
        record = shard_record(record["name"], record["splits"], found, record["content"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return record if intact else None


def shard_record(
    name: str, splits: dict[str, dict[str, int]], digests: dict[str, Any], content: str
) -> dict[str, Any]:
    """The entry of a shard in the manifest.

    Args:
      name: Name of its directory.
      splits: Counts from `write_shard`.
      digests: Digests from `write_block_digests`.
      content: Digest of its documents.
    """
    return {"name": name, "splits": splits, **digests, "content": content}


class _Part(NamedTuple):
    """A part of a document that is encoded at once."""

    document: Document
    split: str
    text: str
    opens: bool  # whether it is the first part of the document


def _parts(documents: Iterable[tuple[str, Document]]) -> Iterator[_Part]:
    for split, document in documents:
        for number, text in enumerate(text_parts(document.text, _PART_CHARACTERS)):
            yield _Part(document, split, text, opens=number == 0)


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the files of one split, which need not fit in memory."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer):
        self._directory = directory
        self._split = split
        self._bos_id = tokenizer.bos_id
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._offsets = array("q", [0])
        self._byte_counts = array("q")
        self._write_header("wb")
        self._path("names.jsonl").touch()

    def append(self, encoded: list[tuple[_Part, list[int]]]) -> None:
        tokens: list[int] = []
        for part, ids in encoded:
            if part.opens:
                tokens.append(self._bos_id)
                self._offsets.append(self._offsets[-1] + 1)
                self._byte_counts.append(part.document.byte_count)
            tokens += ids
            self._offsets[-1] += len(ids)
        names = (part.document.name for part, _ in encoded if part.opens)
        with self._path("tokens.npy").open("ab") as file:
            np.array(tokens, self._dtype).tofile(file)
        with self._path("names.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(name) + "\n" for name in names)

    def finish(self) -> dict[str, int]:
        """Completes the files; returns the split's counts for the manifest."""
        self._write_header("r+b")
        np.save(self._path("offsets.npy"), np.array(self._offsets, np.int64))
        np.save(self._path("bytes.npy"), np.array(self._byte_counts, np.int64))
        return {
            "documents": len(self._byte_counts),
            "tokens": self._offsets[-1],
            "bytes": sum(self._byte_counts),
        }

    def _path(self, name: str) -> Path:
        return self._directory / f"{self._split}.{name}"

    def _write_header(self, mode: str) -> None:
        # numpy pads this header so that it has the same size for any length. So it can be
        # overwritten when the length is known.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._offsets[-1],)}
        with self._path("tokens.npy").open(mode) as file:
            np.lib.format.write_array_header_1_0(file, header)
