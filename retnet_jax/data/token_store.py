"""The token store: a directory with all tokens of a corpus, in two splits.

    manifest.json                     what it was built from and holds; written last
    tokenizer.json                    see `tokenizers`
    shards/00000/{split}.tokens.npy   uint16 or uint32 [tokens]: documents end to end, BOS first
    shards/00000/{split}.offsets.npy  int64 [documents + 1]: where each document begins, and the end
    shards/00000/{split}.bytes.npy    int64 [documents]: bytes of each document's UTF-8
    shards/00000/{split}.names.jsonl  a JSON string a line: the name of each document

The splits are "train" and "held_out"; a split is its shards end to end. The arrays are .npy because
numpy alone reads them by memory map: opening a store costs no time or memory, whatever its size,
and any position is read at once. On gs:// and the like the same files are read by byte ranges.

`build.py` writes stores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_jax.data.tokenizers import Tokenizer, load_tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.files import lock
from retnet_jax.files import paths as files
from retnet_jax.files.digests import sha256_of, sha256_of_file

FORMAT = 3
SPLITS = ("train", "held_out")
KINDS = ("tokens", "offsets", "bytes")


@dataclass(frozen=True)
class TokenStore:
    """An open store."""

    directory: str
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    held_out: Split

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what the store holds: equal for equal tokens under equal names."""
        digests = [
            f"{shard['name']}/{name} {about['sha256']}"
            for shard in self.manifest["shards"]
            for name, about in sorted(shard["files"].items())
        ]
        return sha256_of("\n".join([self.tokenizer.fingerprint, *digests]).encode())


class Split:
    """The documents of one split; the tokens of its shards are one stream, end to end.

    Args:
      name: "train" or "held_out".
      shards: the directory of each shard, and its counts of documents, tokens and bytes.
      vocab_size: the ids are less; what is read is compared with it.
    """

    def __init__(self, name: str, shards: list[tuple[str, dict[str, int]]], vocab_size: int):
        self._name = name
        self._shards = shards
        self._vocab_size = vocab_size
        self._arrays: dict[tuple[int, str], Any] = {}
        self._names: dict[int, list[str]] = {}
        self._token_starts = _starts([counts["tokens"] for _, counts in shards])
        self._document_starts = _starts([counts["documents"] for _, counts in shards])

    def __len__(self) -> int:
        """Documents."""
        return int(self._document_starts[-1])

    @property
    def token_count(self) -> int:
        """Tokens, the BOS of each document included."""
        return int(self._token_starts[-1])

    @property
    def tokens_per_byte(self) -> float:
        """Predicted tokens, all but the BOS, for each byte of text."""
        byte_count = sum(counts["bytes"] for _, counts in self._shards)
        return (self.token_count - len(self)) / byte_count

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens of the stream at the positions [start, stop), up to its end.

        Raises:
          ConfigError: for ids that the tokenizer does not have, naming the documents.
        """
        parts = [
            self._array(shard, "tokens")[first:last]
            for shard, first, last in self._pieces(start, stop)
        ]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if tokens.max(initial=0) >= self._vocab_size:
            raise ConfigError(self._damage(tokens, start))
        return tokens

    def borders(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a document begins, int64, in order."""
        parts = []
        for shard, first, last in self._pieces(start, stop):
            offsets = self._array(shard, "offsets")
            low, high = np.searchsorted(offsets[:-1], (first, last))
            parts.append(offsets[low:high] + self._token_starts[shard])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, BOS first.

        Raises:
          ConfigError: as `read`.
        """
        shard, place = self._place(index)
        start, stop = self._array(shard, "offsets")[place : place + 2] + self._token_starts[shard]
        return self.read(int(start), int(stop))

    def document_at(self, position: int) -> int:
        """The number of the document that has the token at a position of the stream."""
        shard = int(np.searchsorted(self._token_starts, position, "right")) - 1
        offsets = self._array(shard, "offsets")
        place = int(np.searchsorted(offsets, position - self._token_starts[shard], "right")) - 1
        return int(self._document_starts[shard]) + place

    def name(self, index: int) -> str:
        """The name of one document."""
        shard, place = self._place(index)
        return self._names_of(shard)[place]

    @property
    def names(self) -> list[str]:
        """The names of all documents."""
        return [name for shard in range(len(self._shards)) for name in self._names_of(shard)]

    @property
    def byte_counts(self) -> np.ndarray:
        """Bytes of each document's UTF-8, int64."""
        return np.concatenate([self._array(i, "bytes")[:] for i in range(len(self._shards))])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        offsets = (self._array(i, "offsets") for i in range(len(self._shards)))
        return np.concatenate([np.diff(x) for x in offsets])

    def _damage(self, tokens: np.ndarray, start: int) -> str:
        """What is wrong with tokens that begin at a position of the stream."""
        places = np.flatnonzero(tokens >= self._vocab_size)
        names = dict.fromkeys(self.name(self.document_at(start + int(x))) for x in places)
        return (
            f"the token store {self._shards[0][0].rsplit('/', 2)[0]!r} is damaged: {len(places)} "
            f"token ids, the first {tokens[places[0]]}, are none of its tokenizer, whose ids are "
            f"less than {self._vocab_size}; they are in {', '.join(map(repr, list(names)[:5]))} of "
            f"{self._name}; tools/prepare_data.py finds all files that are damaged"
        )

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a document, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._document_starts, index, "right")) - 1
        return shard, index - int(self._document_starts[shard])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that [start, stop) lies in, at least one, and where inside each."""
        shard = int(np.searchsorted(self._token_starts, start, "right")) - 1
        shard = min(max(shard, 0), len(self._shards) - 1)
        begin, end = self._token_starts[shard : shard + 2]
        yield shard, int(max(start, begin) - begin), int(min(stop, end) - begin)
        while end < stop and shard + 1 < len(self._shards):
            shard += 1
            begin, end = self._token_starts[shard : shard + 2]
            yield shard, 0, int(min(stop, end) - begin)

    def _array(self, shard: int, kind: str):
        if (shard, kind) not in self._arrays:
            path = f"{self._shards[shard][0]}/{self._name}.{kind}.npy"
            array = files.open_array(path)
            if kind == "offsets":
                if files.is_remote(path):  # searched in, so it has to be here
                    array = array[:]
                if array[-1] != self._shards[shard][1]["tokens"] or (np.diff(array) < 1).any():
                    raise ConfigError(f"{path} is damaged; tools/prepare_data.py finds all that is")
            self._arrays[shard, kind] = array
        return self._arrays[shard, kind]

    def _names_of(self, shard: int) -> list[str]:
        if shard not in self._names:
            data = files.read_bytes(f"{self._shards[shard][0]}/{self._name}.names.jsonl")
            # Not splitlines, to which more than "\n" ends a line.
            self._names[shard] = [json.loads(line) for line in data.decode().split("\n")[:-1]]
        return self._names[shard]


def open_store(directory: str | Path) -> TokenStore:
    """Opens a complete store. Its files are checked to be there and to have their sizes.

    Raises:
      ConfigError: if it is unfinished, with the command that finishes it; if a file is missing or
        damaged; if a split has no documents; or if the format is another one.
    """
    directory = files.expanded(directory).rstrip("/")
    command = ""
    manifest_path, plan_path = f"{directory}/manifest.json", f"{directory}/plan.json"
    if not files.exists(manifest_path) and files.exists(plan_path):
        raise ConfigError(unfinished_message(directory))
    try:
        manifest = json.loads(files.read_bytes(manifest_path))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this program reads {FORMAT}")
        command = f" with: {manifest['command']}"
        tokenizer = load_tokenizer(directory)
        if tokenizer.fingerprint != manifest["fingerprint"]:
            raise ValueError("tokenizer.json is not the one that it was built with")
        found = files.sizes(f"{directory}/shards")
        for shard in manifest["shards"]:
            for name, about in shard["files"].items():
                path = f"{shard['name']}/{name}"
                if found[path] != about["bytes"]:
                    raise ValueError(f"{path} has {found[path]} bytes, not {about['bytes']}")
        train, held_out = (
            Split(
                split,
                [
                    (f"{directory}/shards/{x['name']}", x["splits"][split])
                    for x in manifest["shards"]
                ],
                tokenizer.vocab_size,
            )
            for split in SPLITS
        )
    except ConfigError:  # a library that its tokenizer needs
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the token store {directory!r} is missing or damaged "
            f"({type(error).__name__}: {error}); name another directory in data.store, "
            f"or delete this one and build it again{command}"
        ) from error
    for split, documents in zip(SPLITS, (train, held_out), strict=True):
        if not len(documents):
            raise ConfigError(
                f"the token store {directory!r} has no documents in its split {split!r}; delete it "
                f"and build it again with more documents or another data.held_out{command}"
            )
    return TokenStore(directory, manifest, tokenizer, train, held_out)


def check_files(store: TokenStore) -> None:
    """Verifies the hash of every file of a store.

    Raises:
      ConfigError: naming the files that are not what was written.
    """
    damaged = [
        path
        for shard in store.manifest["shards"]
        for name, about in shard["files"].items()
        if sha256_of_file(path := f"{store.directory}/shards/{shard['name']}/{name}")
        != about["sha256"]
    ]
    if damaged:
        raise ConfigError(
            f"the token store {store.directory!r} is damaged: {len(damaged)} files are not what "
            f"was written, the first {damaged[0]}; delete it and build it again with: "
            f"{store.manifest['command']}"
        )


def unfinished_message(directory: str) -> str:
    """The error message for a store whose build was cut off, with the command that finishes it."""
    try:
        plan = json.loads(files.read_bytes(f"{directory}/plan.json"))
        command, shards = plan["command"], len(plan["shards"])
    except (ValueError, LookupError, TypeError):
        command, shards = "tools/prepare_data.py with its config", "some"
    builder, done = None, 0
    if not files.is_remote(directory):
        builder = lock.holder(Path(directory))
        done = len(list(Path(directory).glob("shards/[0-9]*")))
    advice = f"finish it with: {command}" if builder is None else f"{builder} builds it"
    return (
        f"the token store {directory!r} is unfinished: {done} of {shards} shards are there; "
        f"{advice}"
    )


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
