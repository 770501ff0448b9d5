"""Builds token stores in parallel. A build that was killed is resumed by the next start.

The division of a corpus into shards depends only on its files. The files are read twice: the survey
finds duplicates and samples text for a BPE; then each shard is encoded into a directory, which
appears when it is complete. The store is the same, byte for byte, whether or not the build was
killed, and for any number of processes.

    plan.json            options and shards: written first, deleted when the store is complete
    work/                surveys and records of shards: deleted when the store is complete
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retnet_jax.config import DataConfig
from retnet_jax.data.block_digests import write_block_digests
from retnet_jax.data.bpe_sample import Sample
from retnet_jax.data.build_plan import begin_or_resume, discard_plan, has_only_a_lock, is_written
from retnet_jax.data.round_trip import check_round_trip, describe_round_trip, measure_round_trip
from retnet_jax.data.shard_writer import OLD_RECORD, completed_shard, shard_record, write_shard
from retnet_jax.data.sources import Document, Piece, Skipped, file_of, list_pieces, read_piece
from retnet_jax.data.split import describe_tail, parts_of
from retnet_jax.data.store_options import differences, pretrained_tokenizer, stored_options
from retnet_jax.data.survey import (
    check_documents,
    check_kept,
    check_splits,
    digest_of,
    documents_of,
    kept_documents,
    skipped_of,
    survey_documents,
    texts_to_try,
)
from retnet_jax.data.token_store import (
    FORMAT,
    SPLITS,
    TokenStore,
    manifest_text,
    open_store,
)
from retnet_jax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    train_bpe,
)
from retnet_jax.data.workers import for_each_shard, say
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import atomic, lock
from retnet_jax.files import paths as files
from retnet_jax.files.digests import sha256_of, sha256_of_file, xxh3_of
from retnet_jax.provenance import code_fingerprint, versions
from retnet_jax.waiting import showing

DEFAULT_COMMAND = "build_store(config.data, vocab_size)"

_SHARD_BYTES = 64_000_000  # of source files in a shard, about
_MOST_SHARDS = 4096


def build_store(
    config: DataConfig,
    vocab_size: int,
    processes: int | None = None,
    command: str = DEFAULT_COMMAND,
) -> TokenStore:
    """Builds the store in `config.store`, or finishes an unfinished one.

    Args:
      config: The data options, checked.
      vocab_size: Number of tokens of the BPE; other tokenizers ignore it.
      processes: Number of processes that work in parallel; None: one for each core.
      command: Command that builds or finishes the store, for error messages; recorded in the store.

    Raises:
      ConfigError: if the store is already complete, or was begun with other options or files; if
        there are no documents, none or all are held out, or no BPE of that size can be trained.
    """
    if files.exists(files.expanded(f"{config.store}/manifest.json")):
        raise ConfigError(
            f"data.store={config.store!r} exists already; delete it to build it again"
        )
    return build_or_wait(config, vocab_size, processes, command)


def build_or_wait(
    config: DataConfig,
    vocab_size: int,
    processes: int | None = None,
    command: str = DEFAULT_COMMAND,
) -> TokenStore:
    """As `build_store`; if another process is building the store, waits for it and opens it."""
    if files.is_remote(config.store):
        raise ConfigError(
            f"data.store={config.store!r} does not exist, and stores are built on local disk: "
            "build it in a local directory and copy that to the URL, where it can be read"
        )
    directory = files.local(config.store)
    created = files.missing_directories(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.store={config.store!r} cannot be used as a directory: {error}"
        ) from error
    with lock.held(directory, lambda who: say(f"{directory} is being built by {who}: waiting")):
        if not (directory / "manifest.json").exists():
            try:
                _build(config, vocab_size, processes, directory, command)
            except (ConfigError, CheckpointError, KeyboardInterrupt):
                if has_only_a_lock(directory):
                    shutil.rmtree(directory)
                    files.remove_empty(created)
                raise
        else:
            _tidy(directory)  # deletes the lock, and what a build killed at its end has left
    return open_store(directory)


def is_to_be_built(config: DataConfig, vocab_size: int) -> bool:
    """Whether `config.store` has no store, or one that is being built.

    An unfinished store that nobody is building is built anew if it was begun with other options.
    With the same options it is to be finished, by the command that began it.
    """
    if files.is_remote(config.store):
        return False
    directory = files.local(config.store)
    if not directory.exists():
        return True
    if not directory.is_dir() or (directory / "manifest.json").exists():
        return False
    if lock.holder(directory) is not None or has_only_a_lock(directory):
        return True
    plan = directory / "plan.json"
    if not plan.exists():
        return False
    found = json.loads(plan.read_text())["options"]
    return bool(differences(found, stored_options(config, vocab_size)))


def _build(
    config: DataConfig, vocab_size: int, processes: int | None, directory: Path, command: str
) -> None:
    plan = begin_or_resume(directory, _plan(config, vocab_size, command))
    shards = [[Piece(**piece) for piece in pieces] for pieces in plan["shards"]]
    for name in ("work", "shards"):
        (directory / name).mkdir(exist_ok=True)
    processes = min(processes or os.cpu_count() or 1, len(shards))
    sizes = [max(1, sum(piece.bytes for piece in pieces)) for pieces in shards]
    try:
        job, surveys = _surveyed(config, directory, shards, sizes, processes)
        kept, texts = _mark_duplicates(job, len(shards))
        check_kept(config, surveys, kept, texts, job.held_out_by)
        if not has_tokenizer(directory):
            tokenizer = _make_tokenizer(config, vocab_size, surveys)
            round_trip = measure_round_trip(tokenizer, texts_to_try(surveys))
            check_round_trip(round_trip, config.tokenizer)
    except ConfigError:  # no store can be built from this plan
        if not is_written(directory):
            discard_plan(directory)
        raise

    if not has_tokenizer(directory):
        with tempfile.TemporaryDirectory(dir=directory / "work") as scratch:
            tokenizer.save(Path(scratch))
            for path in sorted(Path(scratch).iterdir(), reverse=True):  # tokenizer.json last
                path.rename(directory / path.name)
    undone = [(i, pieces) for i, pieces in enumerate(shards) if not job.is_encoded(i)]
    task = functools.partial(_encode, job)
    for_each_shard(task, undone, sizes, processes, f"building {directory}")
    _finish(job, plan, surveys, kept)


def _surveyed(
    config: DataConfig,
    directory: Path,
    shards: list[list[Piece]],
    sizes: list[int],
    processes: int,
) -> tuple[_Job, list[dict]]:
    """Surveys all shards. With `data.held_out_by="auto"` it decides what is held out.

    Returns:
      The build, and the surveys.

    Raises:
      ConfigError: if there are no documents, or one of the splits has none.
    """
    auto = config.held_out_by == "auto"
    job = _Job(config, str(directory), "document" if auto else config.held_out_by)
    surveys = _surveys(job, shards, sizes, processes, f"reading {directory}")
    check_documents(config, surveys, job.held_out_by)
    if auto and not all(documents_of(surveys).values()):
        job = dataclasses.replace(job, held_out_by="tail")
        label = f"reading {directory} again, to hold out the ends of its documents"
        surveys = _surveys(job, shards, sizes, processes, label)
    check_splits(config, surveys, job.held_out_by)
    return job, surveys


def _surveys(
    job: _Job, shards: list[list[Piece]], sizes: list[int], processes: int, label: str
) -> list[dict]:
    """The surveys of all shards; those that an earlier start has made are read."""
    undone = [(i, pieces) for i, pieces in enumerate(shards) if not job.survey_path(i).exists()]
    task = functools.partial(_survey, job)
    for_each_shard(task, undone, sizes, processes, label)
    return [json.loads(job.survey_path(i).read_text()) for i in range(len(shards))]


@dataclasses.dataclass(frozen=True)
class _Job:
    """A build, as passed to every process."""

    config: DataConfig
    directory: str
    held_out_by: str  # "document" or "tail", also if the option is "auto"

    def survey_path(self, shard: int) -> Path:
        return self._of_survey(shard, "json")

    def digests_path(self, shard: int) -> Path:
        return self._of_survey(shard, "digests.npy")

    def _of_survey(self, shard: int, kind: str) -> Path:
        by_tail = ".tail" if self.held_out_by == "tail" else ""
        return Path(self.directory) / "work" / f"{shard:05}{by_tail}.{kind}"

    def kept_path(self, shard: int) -> Path:
        return Path(self.directory) / "work" / f"{shard:05}.kept.npy"

    def record_path(self, shard: int) -> Path:
        return Path(self.directory) / "work" / f"{shard:05}.record.json"

    def shard_path(self, shard: int) -> Path:
        return Path(self.directory) / "shards" / f"{shard:05}"

    def is_encoded(self, shard: int) -> bool:
        directory = self.shard_path(shard)
        return directory.exists() and not (directory / OLD_RECORD).exists()


def _plan(config: DataConfig, vocab_size: int, command: str) -> dict[str, Any]:
    """The plan of a new build."""
    pieces = list_pieces(config)
    return {
        "format": FORMAT,
        "command": command,
        "options": stored_options(config, vocab_size),
        "shards": [[dataclasses.asdict(p) for p in group] for group in _grouped(pieces)],
    }


def _survey(job: _Job, task: tuple[int, list[Piece]]) -> int:
    """Reads a shard to find duplicates, and to sample text for training and testing a tokenizer."""
    shard, pieces = task
    skipped = Skipped()
    found, digests = survey_documents(job.config, _documents(job, pieces, skipped), skipped)
    np.save(job.digests_path(shard), digests)
    paths = {piece.path: file_of(job.config, piece) for piece in pieces if piece.start == 0}
    sources = {name: _digest_of_file(path) for name, path in paths.items() if path}
    atomic.write_text(job.survey_path(shard), json.dumps({"sources": sources} | found))
    return shard


def _encode(job: _Job, task: tuple[int, list[Piece]]) -> int:
    """Writes the directory of a shard, and its record first."""
    shard, pieces = task
    target = job.shard_path(shard)
    if (target / OLD_RECORD).exists() and _completed(job, shard):
        return shard
    try:
        with atomic.directory(target) as unfinished:
            record = _write_shard(job, shard, pieces, unfinished)
            atomic.write_text(job.record_path(shard), json.dumps(record))
    except OSError:
        # A process of an earlier start may still be running and have written the same shard.
        if not job.is_encoded(shard):
            raise
    return shard


def _completed(job: _Job, shard: int) -> bool:
    """Converts a shard of format 3 to this format. False if it is damaged; then it is deleted."""
    directory = job.shard_path(shard)
    record = completed_shard(directory)
    if record is None:
        say(f"{directory} is damaged and is written again")
        directory = directory.rename(directory.with_name(f".{directory.name}.damaged"))
        shutil.rmtree(directory)
        return False
    atomic.write_text(job.record_path(shard), json.dumps(record))
    (directory / OLD_RECORD).unlink()
    return True


def _write_shard(job: _Job, shard: int, pieces: list[Piece], directory: Path) -> dict[str, Any]:
    """Encodes the documents of a shard into an empty directory; returns the manifest's record."""
    tokenizer = load_tokenizer(Path(job.directory))
    survey = json.loads(job.survey_path(shard).read_text())
    kept = np.load(job.kept_path(shard))
    digests = bytearray()

    def documents() -> Iterator[tuple[str, Document]]:
        for number, (split, document) in enumerate(_documents(job, pieces, Skipped())):
            digests.extend(digest_of(document))
            if kept[number : number + 1].any():
                yield split, document

    splits = write_shard(directory, documents(), tokenizer)
    if sha256_of(digests) != survey["content"]:
        raise ConfigError(
            f"{pieces[0].path} or a file after it has changed since the build began; delete "
            f"{job.directory} and build it again"
        )
    digests_of_files = write_block_digests(directory, os.listdir(directory))
    name = job.shard_path(shard).name
    return shard_record(name, splits, digests_of_files, survey["content"])


def _finish(job: _Job, plan: dict[str, Any], surveys: list[dict], kept: dict[str, int]) -> None:
    """Writes the manifest when all shards are complete."""
    directory = Path(job.directory)
    shards = [json.loads(job.record_path(i).read_text()) for i in range(len(surveys))]
    skipped, documents = skipped_of(surveys), sum(documents_of(surveys).values())
    tokenizer = load_tokenizer(directory)
    round_trip = measure_round_trip(tokenizer, texts_to_try(surveys))
    hashes = {name: value for survey in surveys for name, value in survey["sources"].items()}
    sources: dict[str, int] = {}
    for piece in (piece for pieces in plan["shards"] for piece in pieces):
        sources[piece["path"]] = sources.get(piece["path"], 0) + piece["bytes"]
    manifest = {
        "format": FORMAT,
        "command": plan["command"],
        "options": plan["options"],
        "held_out_by": job.held_out_by,
        "fingerprint": tokenizer.fingerprint,
        "tokenizer": {name: xxh3_of(contents) for name, contents in tokenizer.files.items()},
        "versions": versions("retnet-jax", "tokenizers", "tiktoken", "sentencepiece")
        | {"retnet_jax/data": code_fingerprint("data")},
        "splits": {
            split: {
                kind: sum(shard["splits"][split][kind] for shard in shards)
                for kind in ("documents", "tokens", "bytes")
            }
            for split in SPLITS
        },
        "duplicates": documents - sum(kept.values()),
        "round_trip": round_trip,
        "skipped": skipped.as_dict(),
        "sources": [
            {"path": path, "bytes": size, "sha256": hashes.get(path)}
            for path, size in sources.items()
        ],
        "shards": shards,
    }
    atomic.write_text(directory / "manifest.json", manifest_text(manifest))
    _tidy(directory)
    if job.held_out_by == "tail":
        say(f"{directory}: {describe_tail(manifest)}")
    if skipped.count:
        say(f"skipped documents: {skipped.count} ({skipped})")
    if describe_round_trip(round_trip):
        say(f"{directory}: in a sample {describe_round_trip(round_trip)}")


def _tidy(directory: Path) -> None:
    """Deletes everything that does not belong to the store, the plan last."""
    shutil.rmtree(directory / "work", ignore_errors=True)
    for leftover in directory.glob("shards/.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    (directory / lock.FILE_NAME).unlink(missing_ok=True)
    (directory / "plan.json").unlink(missing_ok=True)


def _mark_duplicates(job: _Job, shards: int) -> tuple[dict[str, int], int]:
    """Writes which documents of each shard are kept; returns counts as `kept_documents`."""
    tables = [np.load(job.digests_path(shard)) for shard in range(shards)]
    masks, counts, texts = kept_documents(tables, job.config.deduplicate)
    for shard, mask in enumerate(masks):
        np.save(job.kept_path(shard), mask)
    return counts, texts


def _make_tokenizer(config: DataConfig, vocab_size: int, surveys: list[dict]) -> Tokenizer:
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        return pretrained_tokenizer(config)
    sample = Sample()
    for survey in surveys:
        for item in survey["sample"]:
            sample.push(*item)
    texts = sample.texts()
    with showing(f"training a BPE of {vocab_size} tokens on {len(texts)} documents"):
        return train_bpe(texts, vocab_size)


def _documents(job: _Job, pieces: list[Piece], skipped: Skipped) -> Iterator[tuple[str, Document]]:
    """The documents of a shard, or their parts, with their splits."""
    for piece in pieces:
        documents = read_piece(job.config, piece, skipped)
        yield from parts_of(documents, job.config.held_out, job.held_out_by)


def _grouped(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces grouped into shards. The groups depend only on the pieces."""
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


def _digest_of_file(path: str) -> str | None:
    """The digest; None for a file that cannot be read, which is counted with its documents."""
    try:
        return sha256_of_file(path)
    except OSError:
        return None
