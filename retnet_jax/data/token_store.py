"""The token store: a directory with all tokens of a corpus, in two splits.

    manifest.json               options it was built with, counts, what was skipped; written last
    tokenizer.json              see `tokenizer.py`
    {split}.tokens.npy          uint16 or uint32 [tokens]: documents end to end, each opened by BOS
    {split}.offsets.npy         int64 [documents + 1]: where each document begins, and the end
    {split}.bytes.npy           int64 [documents]: bytes of each document's UTF-8, for bits per byte
    {split}.names.jsonl         a JSON string a line: the name of each document

The splits are "train" and "held_out". The arrays are .npy because numpy alone reads them by memory
map: opening a store costs no time or memory, whatever its size, and any position is read at once.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import platform
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retnet_jax.config import TOKENIZERS, ConfigError, DataConfig
from retnet_jax.data.pretrained_tokenizer import has_tokenizer, load_tokenizer
from retnet_jax.data.sources import Document, read_documents
from retnet_jax.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe

FORMAT = 1
SPLITS = ("train", "held_out")
_SAMPLE_CHARACTERS = 8_000_000  # that a BPE is trained on; more hardly changes the merges
_BATCH_CHARACTERS = 2_000_000  # encoded at once: enough for all threads, little in memory
_SKIPPED_NAMES = 100  # kept in the manifest


@dataclass(frozen=True)
class Split:
    """The documents of one split; its `tokens` are the stream that windows are cut from."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]
    offsets: np.ndarray  # int64 [documents + 1]
    byte_counts: np.ndarray  # int64 [documents]
    names_file: Path

    def __len__(self) -> int:
        return len(self.byte_counts)

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, BOS first."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @functools.cached_property
    def names(self) -> list[str]:
        """The name of each document, read when first asked for."""
        with self.names_file.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


@dataclass(frozen=True)
class TokenStore:
    """An open store; its arrays are memory maps."""

    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Split
    held_out: Split


def open_or_build(config: DataConfig, vocab_size: int) -> TokenStore:
    """The store in `config.store`, built first if the directory does not exist.

    Args:
      config: the data options, checked.
      vocab_size: `model.vocab_size`. A BPE has exactly as many tokens, the byte tokenizer 257,
        which have to fit in.

    Raises:
      ConfigError: if the store was built with other options, or as `build_store`, `open_store` do.
    """
    directory = Path(config.store)
    store = open_store(directory) if directory.exists() else build_store(config, vocab_size)
    built, asked = store.manifest["options"], _options(config, vocab_size)
    if asked["data.tokenizer"] is None:  # its directory is gone; what it was is in the store
        asked["data.tokenizer"] = built.get("data.tokenizer")
    differences = [
        f"\n  {name}: {built.get(name)!r} in the store, {asked[name]!r} asked for"
        for name in asked
        if built.get(name) != asked[name]
    ]
    if differences:
        raise ConfigError(
            f"data.store={config.store!r} was built with other options:{''.join(differences)}\n"
            "name another directory in data.store, or delete this one to have it built again"
        )
    if vocab_size < store.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is less than the {store.tokenizer.vocab_size} tokens "
            f"of the {config.tokenizer} tokenizer"
        )
    return store


def open_store(directory: Path) -> TokenStore:
    """Opens a finished store, after a look at whether its files fit together.

    Raises:
      ConfigError: if a file is missing or damaged, or the format is another one.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']}, this program reads {FORMAT}")
        tokenizer = load_tokenizer(directory)
        if tokenizer.fingerprint != manifest["fingerprint"]:
            raise ValueError("tokenizer.json is not the one that it was built with")
        train, held_out = (_open_split(directory, s, manifest["splits"][s]) for s in SPLITS)
    except ConfigError:  # a library that its tokenizer needs
        raise
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        raise ConfigError(
            f"the token store {str(directory)!r} is missing, unfinished or damaged "
            f"({type(error).__name__}: {error}); name another directory in data.store, "
            "or delete this one to have it built again"
        ) from error
    return TokenStore(directory, manifest, tokenizer, train, held_out)


def build_store(config: DataConfig, vocab_size: int) -> TokenStore:
    """Reads, splits and encodes the documents, and writes them as a store to `config.store`.

    The documents are read twice: once to count them and to sample the text for the BPE, once to
    encode them. The sample is about 8 million characters: those training documents whose names have
    the smallest hashes, whatever order they come in. Everything is written to a temporary directory
    beside `config.store`, which gets its name when it is complete.

    Args:
      config: the data options, checked.
      vocab_size: tokens of the BPE; the byte tokenizer ignores it.

    Raises:
      ConfigError: if `config.store` exists, there are no documents, none or all are held out, or
        no BPE of that size can be trained.
    """
    directory = Path(config.store)
    if directory.exists():
        raise ConfigError(f"data.store={config.store!r} exists already; delete it to build it anew")
    total_bytes, sample = _survey(config)
    if config.tokenizer == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif config.tokenizer != "bpe":
        tokenizer = _pretrained_tokenizer(config)
    else:
        _say(f"training a BPE of {vocab_size} tokens on {len(sample)} documents")
        tokenizer = train_bpe(sample, vocab_size)

    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}.unfinished-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as scratch:
        # A directory inside, because a temporary directory itself can be read by its owner alone.
        unfinished = Path(scratch) / directory.name
        unfinished.mkdir()
        tokenizer.save(unfinished)
        skipped: list[str] = []
        writers = {split: _SplitWriter(unfinished, split, tokenizer) for split in SPLITS}
        batches = _batches(_read(config, skipped))
        for documents in _with_progress(batches, total_bytes, label=f"building {directory}"):
            ids = tokenizer.encode_batch([document.text for document in documents])
            encoded = list(zip(documents, ids, strict=True))
            for split, writer in writers.items():
                writer.append([x for x in encoded if _split_of(x[0], config.held_out) == split])
        manifest = {
            "format": FORMAT,
            "options": _options(config, vocab_size),
            "fingerprint": tokenizer.fingerprint,
            "python": platform.python_version(),
            "splits": {split: writer.finish() for split, writer in writers.items()},
            "skipped": {"count": len(skipped), "first": skipped[:_SKIPPED_NAMES]},
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (unfinished / "manifest.json").write_text(text, encoding="utf-8")
        try:
            unfinished.rename(directory)
        except OSError:
            # Another process may have built the same store meanwhile; then that one is opened.
            if not (directory / "manifest.json").exists():
                raise
    if skipped:
        _say(f"skipped {len(skipped)}, the first: {skipped[0]}")
    return open_store(directory)


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is kept from training: a function of its name and nothing else.

    With a larger share, what was held out stays held out.
    """
    return _fraction(name) < share


def _fraction(name: str) -> float:
    """A hash of a name, uniform in [0, 1)."""
    # A file name that is not UTF-8 reaches Python as surrogates.
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _split_of(document: Document, share: float) -> str:
    return "held_out" if is_held_out(document.name, share) else "train"


def _options(config: DataConfig, vocab_size: int) -> dict[str, Any]:
    """All that the contents of a store depend on, by the names of the fields."""
    options = {
        "data.source": config.source,
        "data.tokenizer": _tokenizer_option(config),
        "data.held_out": config.held_out,
    }
    if config.source != "stdlib":
        options["data.path"] = config.path
    if config.source == "jsonl":
        options["data.text_field"] = config.text_field
    if config.tokenizer == "bpe":
        options["model.vocab_size"] = vocab_size
    return options


def _tokenizer_option(config: DataConfig) -> str | None:
    """A pretrained tokenizer is the same wherever its directory is; None if that is gone."""
    if config.tokenizer in TOKENIZERS:
        return config.tokenizer
    if not Path(config.tokenizer).exists():
        return None
    return f"pretrained {_pretrained_tokenizer(config).fingerprint[:16]}"


def _pretrained_tokenizer(config: DataConfig) -> Tokenizer:
    directory = Path(config.tokenizer)
    if not has_tokenizer(directory):
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r} is not one of "
            f"{', '.join(map(repr, TOKENIZERS))}, and no directory with a tokenizer.json or "
            "tokenizer.model"
        )
    try:
        return load_tokenizer(directory)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer={config.tokenizer!r}: {error}") from error


def _read(config: DataConfig, skipped: list[str]) -> Iterator[Document]:
    return read_documents(config.source, config.path, config.text_field, skipped)


def _survey(config: DataConfig) -> tuple[int, list[str]]:
    """Bytes of all documents, and the training texts to sample for a BPE."""
    skipped: list[str] = []
    counts = dict.fromkeys(SPLITS, 0)
    total_bytes = sample_size = 0
    sample: list[tuple[float, str, str]] = []  # a heap; the largest hash comes off first
    for document in _read(config, skipped):
        split = _split_of(document, config.held_out)
        counts[split] += 1
        total_bytes += document.byte_count
        if split == "train":
            text = document.text[:_SAMPLE_CHARACTERS]
            heapq.heappush(sample, (-_fraction(document.name), document.name, text))
            sample_size += len(text)
            while sample_size - len(sample[0][2]) >= _SAMPLE_CHARACTERS:
                sample_size -= len(heapq.heappop(sample)[2])
    documents = sum(counts.values())
    if not documents:
        raise ConfigError(
            f"data.source={config.source!r} with data.path={config.path!r} gives no documents; "
            f"{len(skipped)} skipped{': ' if skipped else ''}{'; '.join(skipped[:3])}"
        )
    if not counts["held_out"]:
        raise ConfigError(
            f"data.held_out={config.held_out} holds out none of {documents} documents; raise it, "
            "or give more documents"
        )
    if not counts["train"]:
        raise ConfigError(
            f"data.held_out={config.held_out} leaves none of {documents} documents to train on; "
            "lower it, or give more documents"
        )
    return total_bytes, [text for _, _, text in sorted(sample)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the files of one split, so that they need not fit in memory."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer):
        self._directory = directory
        self._split = split
        self._bos_id = tokenizer.bos_id
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._offsets = array("q", [0])
        self._byte_counts = array("q")
        self._write_header("wb")

    def append(self, encoded: list[tuple[Document, list[int]]]) -> None:
        with self._path("tokens.npy").open("ab") as file:
            for document, ids in encoded:
                np.array([self._bos_id, *ids], self._dtype).tofile(file)
                self._offsets.append(self._offsets[-1] + 1 + len(ids))
                self._byte_counts.append(document.byte_count)
        with self._path("names.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(document.name) + "\n" for document, _ in encoded)

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
        # numpy pads this header for a first axis of any length, so that it can be written again
        # over the old one when the length is known.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._offsets[-1],)}
        with self._path("tokens.npy").open(mode) as file:
            np.lib.format.write_array_header_1_0(file, header)


def _open_split(directory: Path, split: str, counts: dict[str, int]) -> Split:
    def array_of(name: str, length: int) -> np.ndarray:
        values = np.load(directory / f"{split}.{name}.npy", mmap_mode="r")
        if values.shape != (length,):
            raise ValueError(f"{split}.{name}.npy has shape {values.shape}, not ({length},)")
        return values

    tokens = array_of("tokens", counts["tokens"])
    offsets = array_of("offsets", counts["documents"] + 1)
    byte_counts = array_of("bytes", counts["documents"])
    if offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(f"{split}.offsets.npy does not cover the {len(tokens)} tokens")
    return Split(tokens, offsets, byte_counts, directory / f"{split}.names.jsonl")


def _with_progress(
    batches: Iterable[list[Document]], total_bytes: int, label: str
) -> Iterator[list[Document]]:
    """Passes batches on; shows on stderr, as a bar or in plain lines, how many bytes are done."""
    sizes = ((batch, sum(document.byte_count for document in batch)) for batch in batches)
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True) as bar:
            for batch, size in sizes:
                yield batch
                bar.update(size)
        return
    done = 0
    for batch, size in sizes:
        yield batch
        tenths_before, done = 10 * done // total_bytes, done + size
        if 10 * done // total_bytes > tenths_before:
            _say(f"{label}: {done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
