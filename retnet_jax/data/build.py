"""Writes token stores, in parallel, so that what was done survives a kill.

A corpus is divided into shards by its files alone. They are read twice: the survey finds duplicates
and samples text for a BPE, then each shard is encoded into a directory that gets its name when it
is complete. What is left undone is done by the next start; the store is the same, byte for byte,
however often that happens and however many processes work on it.

    plan.json            options and shards, written first, gone when the store is complete
    work/                what the survey found; the same
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import heapq
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet_jax.config import TOKENIZERS, DataConfig
from retnet_jax.config_json import marked
from retnet_jax.data.sources import (
    Document,
    Piece,
    Skipped,
    file_of,
    list_pieces,
    read_documents,
    read_piece,
)
from retnet_jax.data.token_store import (
    FORMAT,
    SPLITS,
    TokenStore,
    open_store,
)
from retnet_jax.data.tokenizers import (
    TOKENIZER_FILES,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    text_parts,
    train_bpe,
)
from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic
from retnet_jax.files.digests import sha256_of, sha256_of_file
from retnet_jax.files.paths import is_remote
from retnet_jax.provenance import code_fingerprint, versions

_SHARD_BYTES = 64_000_000  # of source files
_MOST_SHARDS = 4096
_SAMPLE_CHARACTERS = 8_000_000  # that a BPE is trained on; more hardly changes the merges
_BATCH_CHARACTERS = 2_000_000  # encoded at once: enough for all threads, little in memory
_PART_CHARACTERS = 1_000_000  # of a document; `tokenizers` takes 90 times as much memory as text


class Stores(NamedTuple):
    """What a run is trained on."""

    stores: dict[str, TokenStore]  # by the last part of their directories
    weights: np.ndarray  # share of each in the windows
    tokenizer: Tokenizer  # of all of them


def open_stores(config: DataConfig, vocab_size: int) -> Stores:
    """The stores of `config.mixture`; without one `config.store`, built if it does not exist.

    Raises:
      ConfigError: as `open_or_build`; for stores of a mixture that are not there, have the same
        name, or another tokenizer than the first.
    """
    if not config.mixture:
        store = open_or_build(config, vocab_size)
        return Stores({_name(config.store): store}, np.ones(1), store.tokenizer)
    stores: dict[str, TokenStore] = {}
    for directory in config.mixture:
        store = open_store(directory)
        if _name(directory) in stores:
            raise ConfigError(f"data.mixture has two stores with the name {_name(directory)!r}")
        stores[_name(directory)] = store
    (first, *others) = stores.values()
    for store in others:
        if store.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(
                f"data.mixture: {store.directory} has another tokenizer than {first.directory}; "
                f"build it with data.tokenizer={first.directory!r}"
            )
    _check_vocabulary(first, vocab_size)
    return Stores(stores, np.array(list(config.mixture.values())), first.tokenizer)


def open_or_build(config: DataConfig, vocab_size: int) -> TokenStore:
    """The store in `config.store`, built first if the directory does not exist.

    Args:
      config: the data options, checked.
      vocab_size: `model.vocab_size`. A BPE has exactly as many tokens; all tokens have to fit in.

    Raises:
      ConfigError: if the store is unfinished or was built with other options, or as `build_store`
        and `open_store` do.
    """
    if is_remote(config.store) or Path(config.store).exists():
        store = open_store(config.store)
    else:
        store = build_store(config, vocab_size)
    built, asked = store.manifest["options"], _options(config, vocab_size)
    if asked["data.tokenizer"] is None:  # its directory is gone; what it was is in the store
        asked["data.tokenizer"] = built.get("data.tokenizer")
    differences = _differences(built, asked)
    if differences:
        raise ConfigError(
            f"data.store={config.store!r} was built with other options:{differences}\n"
            "name another directory in data.store, or delete this one and build it again with: "
            f"{_command()}"
        )
    _check_vocabulary(store, vocab_size)
    return store


def build_store(config: DataConfig, vocab_size: int, processes: int | None = None) -> TokenStore:
    """Builds the store in `config.store`, or finishes it.

    Args:
      config: the data options, checked.
      vocab_size: tokens of the BPE; other tokenizers ignore it.
      processes: that work in parallel; None: as many as there are cores.

    Raises:
      ConfigError: if the store is complete already, or was begun with other options or files; if
        there are no documents, none or all are held out, or no BPE of that size can be trained.
    """
    if is_remote(config.store):
        raise ConfigError(
            f"data.store={config.store!r} is not there, and stores are built on local disk: build "
            "it in a directory and copy that; the copy is read where it is"
        )
    directory = Path(config.store)
    if (directory / "manifest.json").exists():
        if (directory / "plan.json").exists():  # killed at the very end
            _tidy(directory)
            return open_store(directory)
        raise ConfigError(f"data.store={config.store!r} exists already; delete it to build it anew")
    plan = _begin(config, vocab_size, directory)
    shards = [[Piece(**piece) for piece in pieces] for pieces in plan["shards"]]
    job = _Job(config, str(directory))
    processes = min(processes or os.cpu_count() or 1, len(shards))
    work = directory / "work"
    sizes = [max(1, sum(piece.bytes for piece in pieces)) for pieces in shards]

    undone = [i for i in range(len(shards)) if not job.survey_path(i).exists()]
    task = functools.partial(_survey, job)
    _run(task, [(i, shards[i]) for i in undone], sizes, processes, f"reading {directory}")
    surveys = [json.loads(job.survey_path(i).read_text()) for i in range(len(shards))]
    _check_splits(config, surveys)
    duplicates = _mark_duplicates(job, len(shards))

    if not has_tokenizer(directory):
        tokenizer = _make_tokenizer(config, vocab_size, job, len(shards))
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            tokenizer.save(Path(scratch))
            for path in sorted(Path(scratch).iterdir(), reverse=True):  # tokenizer.json last
                path.rename(directory / path.name)
    undone = [i for i in range(len(shards)) if not job.shard_path(i).exists()]
    task = functools.partial(_encode, job)
    _run(task, [(i, shards[i]) for i in undone], sizes, processes, f"building {directory}")
    _finish(job, plan, surveys, duplicates)
    return open_store(directory)


def train_tokenizer(configs: Sequence[DataConfig], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE for several corpora, trained on as much text of each.

    Args:
      configs: where the documents come from; held-out ones are left out.
      vocab_size: tokens in all.

    Raises:
      ConfigError: if a corpus has no documents to train on, or they do not give as many tokens.
    """
    texts: list[str] = []
    for config in configs:
        sample = _Sample()
        for document in read_documents(config, Skipped()):
            if _split_of(document, config.held_out) == "train":
                sample.add(document)
        found = [text for _, _, text in reversed(sample.items())]
        if not found:
            raise ConfigError(f"data.path={config.path!r} has no documents to train a tokenizer on")
        texts += found
    return train_bpe(texts, vocab_size)


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is kept from training: a function of its name and nothing else.

    With a larger share, what was held out stays held out.
    """
    return _fraction(name) < share


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every process knows of a build."""

    config: DataConfig
    directory: str

    def survey_path(self, shard: int) -> Path:
        return Path(self.directory) / "work" / f"{shard:05}.json"

    def digests_path(self, shard: int) -> Path:
        return Path(self.directory) / "work" / f"{shard:05}.digests.npy"

    def kept_path(self, shard: int) -> Path:
        return Path(self.directory) / "work" / f"{shard:05}.kept.npy"

    def shard_path(self, shard: int) -> Path:
        return Path(self.directory) / "shards" / f"{shard:05}"


def _begin(config: DataConfig, vocab_size: int, directory: Path) -> dict[str, Any]:
    """The plan of a build: written now, or found and compared."""
    pieces = list_pieces(config)
    plan = {
        "format": FORMAT,
        "command": _command(),
        "options": _options(config, vocab_size),
        "shards": [[dataclasses.asdict(p) for p in group] for group in _grouped(pieces)],
    }
    path = directory / "plan.json"
    if path.exists():
        found = json.loads(path.read_text())
        differences = _differences(found["options"], plan["options"])
        if found["format"] != FORMAT or differences:
            raise ConfigError(
                f"data.store={config.store!r} was begun with other options:{differences}\n"
                "name another directory in data.store, or delete this one"
            )
        if found["shards"] != plan["shards"]:
            raise ConfigError(
                f"data.store={config.store!r} was begun with other files, or they have changed; "
                "name another directory in data.store, or delete this one"
            )
        for unfinished in [*directory.glob("shards/.*"), *directory.glob("work/tmp*")]:
            shutil.rmtree(unfinished, ignore_errors=True)
        return found
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"data.store={config.store!r} has files in it and no plan.json; name a new directory"
        )
    (directory / "work").mkdir(parents=True)
    (directory / "shards").mkdir()
    atomic.write_text(path, json.dumps(plan, indent=1) + "\n")
    return plan


def _survey(job: _Job, task: tuple[int, list[Piece]]) -> int:
    """Reads a shard for its duplicates and for text to train a BPE on."""
    shard, pieces = task
    config, skipped = job.config, Skipped()
    digests, held_out, counts = bytearray(), bytearray(), dict.fromkeys(SPLITS, 0)
    sample = _Sample()
    for document in _documents(config, pieces, skipped):
        split = _split_of(document, config.held_out)
        counts[split] += 1
        digests += _digest(document)
        held_out.append(split == "held_out")
        if split == "train" and config.tokenizer == "bpe":
            sample.add(document)
    table = np.empty(len(held_out), [("digest", "V16"), ("held_out", bool)])
    table["digest"] = np.frombuffer(digests, "V16")
    table["held_out"] = np.frombuffer(held_out, bool)
    np.save(job.digests_path(shard), table)
    paths = {piece.path: file_of(config, piece) for piece in pieces if piece.start == 0}
    found = {
        "sources": {name: sha256_of_file(path) for name, path in paths.items() if path is not None},
        "documents": counts,
        "content": sha256_of(digests),
        "skipped": skipped.as_dict(),
        "sample": sample.items(),
    }
    atomic.write_text(job.survey_path(shard), json.dumps(found))
    return shard


def _encode(job: _Job, task: tuple[int, list[Piece]]) -> int:
    """Writes the directory of a shard."""
    shard, pieces = task
    target = job.shard_path(shard)
    try:
        with atomic.directory(target) as unfinished:
            _write_shard(job, shard, pieces, unfinished)
    except OSError:
        # What an earlier start left running may have written the same shard meanwhile.
        if not (target / "shard.json").exists():
            raise
    return shard


def _write_shard(job: _Job, shard: int, pieces: list[Piece], directory: Path) -> None:
    """Encodes the documents of a shard into an empty directory."""
    config, tokenizer = job.config, load_tokenizer(Path(job.directory))
    survey = json.loads(job.survey_path(shard).read_text())
    kept = np.load(job.kept_path(shard))
    writers = {split: _SplitWriter(directory, split, tokenizer) for split in SPLITS}
    digests = bytearray()

    def parts() -> Iterator[_Part]:
        for number, document in enumerate(_documents(config, pieces, Skipped())):
            digests.extend(_digest(document))
            if kept[number : number + 1].any():
                split = _split_of(document, config.held_out)
                for place, text in enumerate(text_parts(document.text, _PART_CHARACTERS)):
                    yield _Part(document, split, text, opens=place == 0)

    for batch in _batches(parts()):
        ids = tokenizer.encode_batch([part.text for part in batch])
        encoded = list(zip(batch, ids, strict=True))
        for split, writer in writers.items():
            writer.append([x for x in encoded if x[0].split == split])
    if sha256_of(digests) != survey["content"]:
        raise ConfigError(
            f"{pieces[0].path} or a file after it has changed since the build began; delete "
            f"{job.directory} and build it anew"
        )
    splits = {split: writer.finish() for split, writer in writers.items()}
    written = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(directory.iterdir())
    }
    record = {"name": job.shard_path(shard).name, "splits": splits, "files": written}
    record["content"] = survey["content"]
    (directory / "shard.json").write_text(json.dumps(record), encoding="utf-8")


def _finish(job: _Job, plan: dict[str, Any], surveys: list[dict], duplicates: int) -> None:
    directory = Path(job.directory)
    shards = [
        json.loads((job.shard_path(i) / "shard.json").read_text()) for i in range(len(surveys))
    ]
    skipped = Skipped()
    for survey in surveys:
        skipped.merge(Skipped.from_dict(survey["skipped"]))
    hashes = {name: value for survey in surveys for name, value in survey["sources"].items()}
    sources: dict[str, int] = {}
    for piece in (piece for pieces in plan["shards"] for piece in pieces):
        sources[piece["path"]] = sources.get(piece["path"], 0) + piece["bytes"]
    manifest = {
        "format": FORMAT,
        "command": plan["command"],
        "options": plan["options"],
        "fingerprint": load_tokenizer(directory).fingerprint,
        "versions": versions("retnet-jax", "tokenizers", "tiktoken", "sentencepiece")
        | {"retnet_jax/data": code_fingerprint("data")},
        "splits": {
            split: {
                kind: sum(shard["splits"][split][kind] for shard in shards)
                for kind in ("documents", "tokens", "bytes")
            }
            for split in SPLITS
        },
        "duplicates": duplicates,
        "skipped": skipped.as_dict(),
        "sources": [
            {"path": path, "bytes": size, "sha256": hashes.get(path)}
            for path, size in sources.items()
        ],
        "shards": shards,
    }
    atomic.write_text(directory / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    _tidy(directory)
    if skipped.count:
        _say(f"skipped {skipped.count}: {skipped}")


def _tidy(directory: Path) -> None:
    """Leaves of a build what belongs to the store; the plan goes last."""
    shutil.rmtree(directory / "work", ignore_errors=True)
    for leftover in directory.glob("shards/.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    (directory / "plan.json").unlink()


def _check_splits(config: DataConfig, surveys: list[dict]) -> None:
    """Raises `ConfigError` for a corpus without documents in one of the splits."""
    counts = {split: sum(survey["documents"][split] for survey in surveys) for split in SPLITS}
    documents = sum(counts.values())
    if not documents:
        skipped = Skipped()
        for survey in surveys:
            skipped.merge(Skipped.from_dict(survey["skipped"]))
        raise ConfigError(
            f"data.source={config.source!r} with data.path={config.path!r} gives no documents; "
            f"{skipped.count} skipped{f': {skipped}' if skipped.count else ''}"
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


def _mark_duplicates(job: _Job, shards: int) -> int:
    """Writes which documents of each shard are kept; returns how many are not.

    Of documents with the same text the first is kept, in the order of shards. Without
    deduplication all are, but to train on a text that is held out. So no text is in both splits.
    All digests are in memory at once, 16 bytes a document.
    """
    found = [np.load(job.digests_path(shard)) for shard in range(shards)]
    words = np.concatenate([x["digest"] for x in found]).view("<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal texts stay in their order
    ordered = words[order]
    first = np.ones(len(words), bool)  # of its text, in that order
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kept = np.ones(len(words), bool)
    if job.config.deduplicate:
        kept[order] = first
    else:
        held_out = np.concatenate([x["held_out"] for x in found])[order]
        text = np.cumsum(first) - 1
        kept[order] = held_out | ~np.isin(text, text[held_out])
    for shard, mask in enumerate(np.split(kept, np.cumsum([len(x) for x in found])[:-1])):
        np.save(job.kept_path(shard), mask)
    return int(len(kept) - kept.sum())


def _make_tokenizer(config: DataConfig, vocab_size: int, job: _Job, shards: int) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        return _pretrained_tokenizer(config)
    sample = _Sample()
    for shard in range(shards):
        for fraction, name, text in json.loads(job.survey_path(shard).read_text())["sample"]:
            sample.push(fraction, name, text)
    texts = [text for _, _, text in reversed(sample.items())]
    _say(f"training a BPE of {vocab_size} tokens on {len(texts)} documents")
    return train_bpe(texts, vocab_size)


class _Sample:
    """The documents whose names have the smallest hashes, up to `_SAMPLE_CHARACTERS` in all.

    It depends on the documents alone, not on their order or on how they are divided.
    """

    def __init__(self):
        self._heap: list[tuple[float, str, str]] = []  # the largest hash comes off first
        self._characters = 0

    def add(self, document: Document) -> None:
        self.push(_fraction(document.name), document.name, document.text[:_SAMPLE_CHARACTERS])

    def push(self, fraction: float, name: str, text: str) -> None:
        heapq.heappush(self._heap, (-fraction, name, text))
        self._characters += len(text)
        while self._characters - len(self._heap[0][2]) >= _SAMPLE_CHARACTERS:
            self._characters -= len(heapq.heappop(self._heap)[2])

    def items(self) -> list[tuple[float, str, str]]:
        """(hash, name, text) by the hash."""
        return sorted((-fraction, name, text) for fraction, name, text in self._heap)


class _Part(NamedTuple):
    """What is encoded at once of a document."""

    document: Document
    split: str
    text: str
    opens: bool  # whether it is the first


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
        # numpy pads this header for a first axis of any length, so that it can be written again
        # over the old one when the length is known.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._offsets[-1],)}
        with self._path("tokens.npy").open(mode) as file:
            np.lib.format.write_array_header_1_0(file, header)


def _run(
    task: Callable[[tuple[int, list[Piece]]], int],
    items: list[tuple[int, list[Piece]]],
    sizes: list[int],
    processes: int,
    label: str,
) -> None:
    """Does a task for each shard, here or in other processes, and shows how far it is."""
    progress = _Progress(sum(sizes[shard] for shard, _ in items), label)
    with progress:
        if processes == 1 or len(items) == 1:
            for item in items:
                progress.add(sizes[task(item)])
            return
        pool = concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_prepare_process
        )
        with pool:
            futures = [pool.submit(task, item) for item in items]
            try:
                for future in concurrent.futures.as_completed(futures):
                    progress.add(sizes[future.result()])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _prepare_process() -> None:
    # Each process has a core; a tokenizer's own threads would only be in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class _Progress:
    """How many source bytes are done, on stderr: a bar, or plain lines at every tenth."""

    def __init__(self, total: int, label: str):
        self._total, self._label, self._done = total, label, 0
        self._bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._label, unit="B", unit_scale=True)
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def add(self, size: int) -> None:
        tenths_before, self._done = 10 * self._done // self._total, self._done + size
        if self._bar is not None:
            self._bar.update(size)
        elif 10 * self._done // self._total > tenths_before:
            _say(f"{self._label}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB")


def _documents(config: DataConfig, pieces: list[Piece], skipped: Skipped) -> Iterator[Document]:
    for piece in pieces:
        yield from read_piece(config, piece, skipped)


def _grouped(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces in shards, of files alone: the same for any number of processes."""
    size = max(_SHARD_BYTES, sum(piece.bytes for piece in pieces) // _MOST_SHARDS)
    group: list[Piece] = []
    total = 0
    for piece in pieces:
        group.append(piece)
        total += piece.bytes
        if total >= size or len(group) >= 10_000:
            yield group
            group, total = [], 0
    if group:
        yield group


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


def _fraction(name: str) -> float:
    """A hash of a name, uniform in [0, 1)."""
    # A file name that is not UTF-8 reaches Python as surrogates.
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _digest(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode(), digest_size=16).digest()


def _split_of(document: Document, share: float) -> str:
    return "held_out" if is_held_out(document.name, share) else "train"


def _options(config: DataConfig, vocab_size: int) -> dict[str, Any]:
    """All that the contents of a store depend on, by the names of the fields."""
    options = {name: getattr(config, name.removeprefix("data.")) for name in marked("in_store")}
    # As JSON has them, to be compared with what was written.
    options = json.loads(json.dumps(options))
    options["data.tokenizer"] = _tokenizer_option(config)
    if config.tokenizer == "bpe":
        options["model.vocab_size"] = vocab_size
    if config.source == "stdlib":
        options["python"] = platform.python_version()
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
            f"{', '.join(map(repr, TOKENIZERS))}, and no directory with one of "
            f"{', '.join(TOKENIZER_FILES)}"
        )
    try:
        return load_tokenizer(directory)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer={config.tokenizer!r}: {error}") from error


def _check_vocabulary(store: TokenStore, vocab_size: int) -> None:
    if vocab_size < store.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is less than the {store.tokenizer.vocab_size} tokens "
            f"of the tokenizer in {store.directory}"
        )


def _name(directory: str) -> str:
    return directory.rstrip("/").rpartition("/")[2]


def _differences(built: dict[str, Any], asked: dict[str, Any]) -> str:
    return "".join(
        f"\n  {name}: {built.get(name)!r} in the store, {asked.get(name)!r} asked for"
        for name in sorted(built | asked)
        if built.get(name) != asked.get(name)
    )


def _command() -> str:
    """The command that goes on with what this process begins."""
    options, taken = [], False
    for argument in sys.argv[1:]:
        if argument.startswith("-"):
            taken = argument.lstrip("-").startswith("config")
        if taken:  # "--config=FILE", or "--config" and "FILE"
            options.append(argument)
    return shlex.join(["python", "tools/prepare_data.py", *options])


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
