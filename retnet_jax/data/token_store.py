"""The token store: a directory with all tokens of a corpus, in two splits.

    manifest.json                     its sources and contents; written last
    tokenizer.json                    see `tokenizers`
    shards/00000/{split}.tokens.npy   uint16 or uint32 [tokens]: documents end to end, BOS first
    shards/00000/{split}.offsets.npy  int64 [documents + 1]: where each document begins, and the end
    shards/00000/{split}.bytes.npy    int64 [documents]: bytes of each document's UTF-8
    shards/00000/{split}.names.jsonl  the name of each document, a JSON string on each line
    shards/00000/blocks.npy           uint64: a digest of every 64 KiB of the files above it

The splits are "train" and "held_out"; a split is its shards end to end. The arrays are .npy files,
which numpy maps to memory: opening a store costs no time or memory, whatever its size, and any
position can be read directly. On gs:// and others the same files are read by byte ranges.

All data is verified before it is returned. Tokens are compared with the digests of their blocks
when they are first read (`block_digests.py`); the other files are verified whole when they are
first needed. The manifest has digests of blocks.npy, of the tokenizer's files and of itself. It
also has the SHA-256 of every file, from which the store's fingerprint is computed.

Stores of format 3 have no digests of blocks or of the manifest; only file sizes are checked.

`build.py` writes stores; `store_problems.py` verifies a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_jax.data.block_digests import FILE_NAME, DamagedBlockError, ShardFiles
from retnet_jax.data.tokenizers import Tokenizer, load_tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.files import lock
from retnet_jax.files import paths as files
from retnet_jax.files.digests import sha256_of, xxh3_of

FORMAT = 4  # what is written
FORMATS = (3, FORMAT)  # what is read
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
        """SHA-256 of the store's contents, in hex: equal for equal tokens under equal names."""
        digests = [
            f"{shard['name']}/{name} {about['sha256']}"
            for shard in self.manifest["shards"]
            for name, about in sorted(shard["files"].items())
        ]
        return sha256_of("\n".join([self.tokenizer.fingerprint, *digests]).encode())

    @property
    def has_block_digests(self) -> bool:
        """Whether tokens are verified when they are read, which needs format 4 or later."""
        return self.manifest["format"] > 3


class Split:
    """The documents of one split. The tokens of its shards, end to end, are one stream.

    Args:
      name: "train" or "held_out".
      shards: Files of each shard, and its numbers of documents, tokens and bytes.
      vocab_size: Number of token ids; ids that are read must be less.
      command: Command that builds the store again, for error messages.

    All methods that read raise `ConfigError` for damaged data. It names the file, the bytes and the
    documents whose tokens they are.
    """

    def __init__(
        self,
        name: str,
        shards: list[tuple[ShardFiles, dict[str, int]]],
        vocab_size: int,
        command: str = "",
    ):
        self._name = name
        self._shards = shards
        self._vocab_size = vocab_size
        self._command = command
        self._arrays: dict[tuple[int, str], Any] = {}
        self._names: dict[int, list[str]] = {}
        self._token_starts = _starts([counts["tokens"] for _, counts in shards])
        self._document_starts = _starts([counts["documents"] for _, counts in shards])

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._document_starts[-1])

    @property
    def token_count(self) -> int:
        """Number of tokens, including the BOS of each document."""
        return int(self._token_starts[-1])

    @property
    def tokens_per_byte(self) -> float:
        """Predicted tokens (all except the BOS) per byte of text."""
        byte_count = sum(counts["bytes"] for _, counts in self._shards)
        return (self.token_count - len(self)) / byte_count

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens of the stream at the positions [start, stop), at most up to its end.

        Raises:
          ConfigError: for damaged data, and for ids that the tokenizer does not have; it names the
            documents.
        """
        parts = [
            self._tokens(shard, first, last) for shard, first, last in self._pieces(start, stop)
        ]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if tokens.max(initial=0) >= self._vocab_size:
            raise ConfigError(self._foreign_ids(tokens, start))
        return tokens

    def borders(self, start: int, stop: int) -> np.ndarray:
        """The positions in [start, stop) at which a document begins, int64, ascending."""
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
        """The number of the document that contains a position of the stream."""
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
        """Number of tokens of each document, int64."""
        offsets = (self._array(i, "offsets") for i in range(len(self._shards)))
        return np.concatenate([np.diff(x) for x in offsets])

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a document, and its number in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shard = int(np.searchsorted(self._document_starts, index, "right")) - 1
        return shard, index - int(self._document_starts[shard])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that overlap [start, stop), at least one, and the range in each."""
        shard = int(np.searchsorted(self._token_starts, start, "right")) - 1
        shard = min(max(shard, 0), len(self._shards) - 1)
        begin, end = self._token_starts[shard : shard + 2]
        yield shard, int(max(start, begin) - begin), int(min(stop, end) - begin)
        while end < stop and shard + 1 < len(self._shards):
            shard += 1
            begin, end = self._token_starts[shard : shard + 2]
            yield shard, 0, int(min(stop, end) - begin)

    def _tokens(self, shard: int, first: int, last: int) -> np.ndarray:
        """Tokens of one shard."""
        array = self._array(shard, "tokens")
        try:
            return array[first:last]
        except DamagedBlockError as error:
            raise ConfigError(self._damaged_block(shard, error)) from None

    def _array(self, shard: int, kind: str) -> Any:
        """An array of one shard, for slicing. All arrays but the tokens are verified whole."""
        if (shard, kind) not in self._arrays:
            files_of_shard, counts = self._shards[shard]
            name = f"{self._name}.{kind}.npy"
            try:
                array: Any = files_of_shard.array(name)
                if kind != "tokens":
                    array = array[:]
            except DamagedBlockError as error:
                raise ConfigError(self._damaged_block(shard, error)) from None
            if kind == "offsets" and (array[-1] != counts["tokens"] or (np.diff(array) < 1).any()):
                path = f"{files_of_shard.directory}/{name}"
                raise ConfigError(f"{path} is damaged; tools/verify.py finds all damaged files")
            self._arrays[shard, kind] = array
        return self._arrays[shard, kind]

    def _names_of(self, shard: int) -> list[str]:
        if shard not in self._names:
            try:
                data = self._shards[shard][0].read(f"{self._name}.names.jsonl")
            except DamagedBlockError as error:
                raise ConfigError(self._damaged_block(shard, error)) from None
            # Not splitlines, which ends lines at more characters than "\n".
            self._names[shard] = [json.loads(line) for line in data.decode().split("\n")[:-1]]
        return self._names[shard]

    def _damaged_block(self, shard: int, error: DamagedBlockError) -> str:
        """The error message for a damaged block of a shard."""
        directory = self._shards[shard][0].directory
        documents = ""
        if error.name == f"{self._name}.tokens.npy":
            documents = self._documents_in(shard, error.first, error.last)
        command = f" with: {self._command}" if self._command else ""
        return (
            f"{directory}/{error.name} is damaged: its bytes {error.first:,} to {error.last - 1:,} "
            f"are not what was written{documents}; tools/verify.py finds all damaged files; copy "
            f"the token store {directory.rsplit('/', 2)[0]!r} again, or delete it and build it "
            f"again{command}"
        )

    def _documents_in(self, shard: int, first: int, last: int) -> str:
        """The documents whose tokens are in the bytes [first, last) of a shard's tokens."""
        files_of_shard, counts = self._shards[shard]
        width = token_dtype(self._vocab_size).itemsize
        header = files_of_shard.size(f"{self._name}.tokens.npy") - width * counts["tokens"]
        begin, end = (max(0, x - header) // width for x in (first, last - 1))
        if begin >= counts["tokens"]:
            return ""
        try:
            place = int(self._token_starts[shard])
            documents = range(self.document_at(place + begin), self.document_at(place + end) + 1)
            names = [repr(self.name(x)) for x in documents[:5]]
        except ConfigError:
            return ", nor are the names of the documents in these bytes"
        more = f" and {len(documents) - 5:,} more" if len(documents) > 5 else ""
        return f"; they hold tokens of {', '.join(names)}{more} of {self._name}"

    def _foreign_ids(self, tokens: np.ndarray, start: int) -> str:
        """The error message for ids that the tokenizer does not have, in tokens from `start` on."""
        places = np.flatnonzero(tokens >= self._vocab_size)
        names = dict.fromkeys(self.name(self.document_at(start + int(x))) for x in places)
        store = self._shards[0][0].directory.rsplit("/", 2)[0]
        return (
            f"the token store {store!r} is damaged: {len(places)} "
            f"token ids, the first {tokens[places[0]]}, are not ids of its tokenizer, which are "
            f"less than {self._vocab_size}; they are in {', '.join(map(repr, list(names)[:5]))} of "
            f"{self._name}; tools/verify.py finds all damaged files"
        )


def open_store(directory: str | Path) -> TokenStore:
    """Opens a complete store.

    The manifest and the tokenizer are verified. The other files must exist and have the right
    sizes, and are verified when they are read.

    Raises:
      ConfigError: if the store is unfinished, with the command that finishes it; if a file is
        missing or damaged; if a split has no documents; if it has another format.
    """
    directory = files.expanded(directory).rstrip("/")
    command = ""
    if is_unfinished(directory):
        raise ConfigError(unfinished_message(directory))
    try:
        manifest = read_manifest(directory)
        command = f" with: {manifest['command']}"
        tokenizer = verified_tokenizer(directory, manifest)
        found = files.sizes(f"{directory}/shards")
        for shard in manifest["shards"]:
            for name, about in files_of(shard).items():
                path = f"{shard['name']}/{name}"
                if found[path] != about["bytes"]:
                    raise ValueError(f"{path} has {found[path]} bytes, not {about['bytes']}")
        shard_files = [ShardFiles(f"{directory}/shards/{x['name']}", x) for x in manifest["shards"]]
        train, held_out = (
            Split(
                split,
                [
                    (of_shard, shard["splits"][split])
                    for of_shard, shard in zip(shard_files, manifest["shards"], strict=True)
                ],
                tokenizer.vocab_size,
                manifest["command"],
            )
            for split in SPLITS
        )
    except ConfigError:  # a library that its tokenizer needs is missing
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the token store {directory!r} is missing or damaged "
            f"({type(error).__name__}: {error}); give another directory in data.store, "
            f"or delete this one and build it again{command}"
        ) from error
    for split, documents in zip(SPLITS, (train, held_out), strict=True):
        if not len(documents):
            raise ConfigError(
                f"the token store {directory!r} has no documents in its split {split!r}; delete it "
                f"and build it again with more documents or another data.held_out{command}"
            )
    return TokenStore(directory, manifest, tokenizer, train, held_out)


def manifest_text(manifest: dict[str, Any]) -> str:
    """The JSON of a manifest, with its digest at the end."""
    digest = xxh3_of(json.dumps(manifest).encode())
    return json.dumps(manifest | {"digest": digest}, indent=1) + "\n"


def read_manifest(directory: str) -> dict[str, Any]:
    """The manifest of a store, without its digest.

    Raises:
      OSError: if there is no manifest.
      ValueError, LookupError, TypeError, AttributeError: if it is damaged or has another format.
    """
    text = files.read_bytes(f"{directory}/manifest.json").decode()
    manifest = json.loads(text)
    if manifest["format"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise ValueError(f"its format is {manifest['format']}, this program reads {known}")
    digest = manifest.pop("digest", None)
    # Every byte is compared, even white space.
    if (digest is not None or manifest["format"] > 3) and manifest_text(manifest) != text:
        raise ValueError("manifest.json is not what was written")
    return manifest


def files_of(shard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All files of a shard by name, as the manifest describes it."""
    return shard["files"] | ({FILE_NAME: shard["blocks"]} if "blocks" in shard else {})


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of a store's tokens."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def is_unfinished(directory: str) -> bool:
    """Whether a store has been begun but is not complete."""
    manifest, plan = (f"{directory}/{name}.json" for name in ("manifest", "plan"))
    return not files.exists(manifest) and files.exists(plan)


def unfinished_message(directory: str) -> str:
    """The error message for an unfinished store, with the command that finishes it."""
    try:
        plan = json.loads(files.read_bytes(f"{directory}/plan.json"))
        command, shards = plan["command"], len(plan["shards"])
    except (ValueError, LookupError, TypeError):
        command, shards = "tools/prepare_data.py with its config", "some"
    builder, done = None, 0
    if not files.is_remote(directory):
        builder = lock.holder(Path(directory))
        done = len(list(Path(directory).glob("shards/[0-9]*")))
    advice = f"finish it with: {command}" if builder is None else f"{builder} is building it"
    return (
        f"the token store {directory!r} is unfinished: {done} of {shards} shards are built; "
        f"{advice}"
    )


def verified_tokenizer(directory: str, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a store; raises ValueError if it is not what was written."""
    for name, digest in manifest.get("tokenizer", {}).items():
        if xxh3_of(files.read_bytes(f"{directory}/{name}")) != digest:
            raise ValueError(f"{name} is not what was written")
    tokenizer = load_tokenizer(directory)
    if tokenizer.fingerprint != manifest["fingerprint"]:
        raise ValueError("tokenizer.json is not the tokenizer that the store was built with")
    return tokenizer


def _starts(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
