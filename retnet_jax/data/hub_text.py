"""Streams the beginning of a data set on the Hugging Face hub into files of JSON lines.

    corpus.json         the data set, its commit, and what each file has
    00017.jsonl.zst     the first documents of shard 17, or all of them

A data set is stored in shards, and often each has another kind of text. So the text is taken from
the beginnings of many shards, in a fixed random order. A file appears when it is complete, so a
download that was stopped is resumed with the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retnet_jax.data.formats import package
from retnet_jax.data.public_corpora import PublicCorpus
from retnet_jax.data.sources import Document, Piece, Skipped, list_pieces, read_piece
from retnet_jax.data.workers import Progress, say
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import atomic, hub, lock

FILES = "*.jsonl.zst"
RECORD = "corpus.json"

_SPREAD = 64  # shards from which the text is taken at least, if there are so many
_UNUSABLE = 1000  # documents at the beginning of a data set, without text, after which to stop


def stream_text(
    corpus: PublicCorpus, directory: Path, most_bytes: int, text_field: str | None = None
) -> int:
    """Downloads text until there is enough, or no more.

    Args:
      corpus: The data set.
      directory: Directory for the files. What an earlier call has left there is kept.
      most_bytes: Bytes of UTF-8 after which to stop; the last document may exceed it.
      text_field: Field with the text; None: the corpus's.

    Returns:
      The bytes of text in the directory.

    Raises:
      ConfigError: if the directory holds text of another data set; if the data set does not exist,
        needs a login, or has no such field.
      CheckpointError: if the connection breaks and does not come back.
    """
    if text_field is not None:
        corpus = corpus._replace(fields={**corpus.fields, "text_field": text_field})
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with lock.held(directory), _without_traces(directory):
            return _Download(corpus, directory).run(most_bytes)
    except lock.HeldError as who:
        raise ConfigError(f"{directory} is being written by {who}: wait for it") from None


@contextlib.contextmanager
def _without_traces(directory: Path) -> Iterator[None]:
    """Deletes the unfinished files of killed processes, and at the end the lock, which is held."""
    for path in filter(atomic.is_unfinished, directory.iterdir()):
        path.unlink()
    try:
        yield
    finally:
        (directory / lock.FILE_NAME).unlink(missing_ok=True)


def sample_text(corpus: PublicCorpus, characters: int, text_field: str | None = None) -> list[str]:
    """The texts of a data set's first documents; raises as `stream_text`."""
    if text_field is not None:
        corpus = corpus._replace(fields={**corpus.fields, "text_field": text_field})
    config = corpus.config(hub.dataset_commit(corpus.hub))
    texts: list[str] = []
    left, skipped = characters, _SkippedAtFirst(corpus.path, texts)
    for piece in list_pieces(config):
        for document in read_piece(config, piece, skipped):
            texts.append(document.text[:left])
            left -= len(texts[-1])
            if left <= 0:
                return texts
    if not texts:
        raise skipped.error()
    return texts


class _SkippedAtFirst(Skipped):
    """The skipped documents of a sample; many before the first text are an error.

    A wrong --text_field would otherwise stream the whole data set before it is refused.
    """

    def __init__(self, path: str, texts: list[str]):
        super().__init__()
        self._path, self._texts = path, texts

    def add(self, name: str, reason: str, detail: str = "") -> None:
        super().add(name, reason, detail)
        if not self._texts and self.count >= _UNUSABLE:
            raise self.error()

    def error(self) -> ConfigError:
        return ConfigError(
            f"{self._path} has no text: {self}; the field with the text is given by --text_field"
        )


class _Download:
    """The files of a directory, and the data set that they are from."""

    def __init__(self, corpus: PublicCorpus, directory: Path):
        self._directory, self._path = directory, directory / RECORD
        origin = {"data set": corpus.path, **corpus.fields, **corpus.filters}
        origin = json.loads(json.dumps(origin))
        if self._path.exists():
            self._record: dict[str, Any] = json.loads(self._path.read_text())
            found = self._record["origin"]
            if found != origin:
                raise ConfigError(
                    f"{directory} holds text of {_shown(found)}, not of {_shown(origin)}: give "
                    "another directory with --text, or delete it"
                )
        elif any(directory.glob(FILES)):
            raise ConfigError(
                f"{directory} has text, but no {RECORD}: give another directory with --text"
            )
        else:
            commit = hub.dataset_commit(corpus.hub)
            shards = len(list_pieces(corpus.config(commit)))
            facts = {"commit": commit, "license": corpus.license, "shards": shards}
            self._record = {"origin": origin, **facts, "files": {}}
        self._corpus = corpus
        self._config = corpus.config(self._record["commit"])
        name = self._config.path
        shards = range(self._record["shards"])
        self._pieces = [Piece(name, name, shard, shard + 1) for shard in shards]
        random.Random(0).shuffle(self._pieces)

    def run(self, most_bytes: int) -> int:
        """Downloads the missing text; returns the bytes that there are."""
        limit = -(-most_bytes // min(len(self._pieces), _SPREAD))
        with Progress(most_bytes, f"downloading {self._corpus.path}") as shown:
            while True:
                total = 0
                for piece in self._pieces:
                    total += self._file(piece, limit)["bytes"]
                    shown.move_to(min(total, most_bytes))
                    if total >= most_bytes:
                        return total
                if all(about["whole"] for about in self._record["files"].values()):
                    return total
                limit *= 2

    def _file(self, piece: Piece, limit: int) -> dict[str, Any]:
        """The record of a shard's file, which is written if it has less text than `limit`."""
        name = f"{piece.start:05}.jsonl.zst"
        about = self._record["files"].get(name)
        if about and (about["whole"] or about["bytes"] >= limit) and self._has(name):
            return about
        skipped = Skipped()
        documents = read_piece(self._config, piece, skipped)
        try:
            counts = self._write(name, documents, limit)
        except OSError as error:
            raise CheckpointError(
                f"{self._directory / name} cannot be written ({error}): make room there, or give "
                "another directory with --text; complete files are kept"
            ) from error
        if not counts["documents"] and counts["whole"] and skipped.count:
            problem = f"shard {piece.start} of {self._corpus.path} has no text that can be used"
            if not self._record["files"]:
                raise ConfigError(f"{problem}: {skipped}")
            say(f"{problem}: {skipped}")
        self._record["files"][name] = counts | {"skipped": skipped.as_dict()["reasons"]}
        atomic.write_text(self._path, json.dumps(self._record, indent=1) + "\n")
        return counts

    def _has(self, name: str) -> bool:
        return (self._directory / name).exists()

    def _write(self, name: str, documents: Iterator[Document], limit: int) -> dict[str, Any]:
        counts: dict[str, Any] = {"bytes": 0, "documents": 0, "whole": False}
        unfinished = self._directory / f".{name}.{os.getpid()}{atomic.ENDING}"
        compressor = package("zstandard", "zstandard").ZstdCompressor()
        try:
            with unfinished.open("wb") as raw, compressor.stream_writer(raw) as file:
                for document in documents:
                    line = json.dumps({"id": document.name, "text": document.text})
                    file.write(line.encode() + b"\n")
                    counts["bytes"] += document.byte_count
                    counts["documents"] += 1
                    if counts["bytes"] >= limit:
                        break
                else:
                    counts["whole"] = True
            unfinished.replace(self._directory / name)
        finally:
            unfinished.unlink(missing_ok=True)
        return counts


def _shown(origin: dict[str, Any]) -> str:
    name, *others = origin.values()
    return f"{name} ({', '.join(map(str, others))})" if others else str(name)
