"""Verifies every file of a token store and reports all problems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retnet_jax.data.block_digests import (
    BLOCK_BYTES,
    FILE_NAME,
    DamagedBlockError,
    ShardFiles,
    digests_of_file,
)
from retnet_jax.data.token_store import (
    TokenStore,
    files_of,
    is_unfinished,
    read_manifest,
    unfinished_message,
    verified_tokenizer,
)
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.files.digests import xxh3_of_file

_NOT_WRITTEN = "is not what was written"


def store_problems(directory: str | Path) -> list[str]:
    """The problems of a store, one line for each damaged file; none if it is intact.

    Every file is read, even if `open_store` refuses the store. A damaged manifest is the only
    line, because no other file can be verified without it. The files of a store of format 3 are
    compared with their SHA-256; its manifest cannot be verified.
    """
    directory = files.expanded(directory).rstrip("/")
    return [f"{directory}/{name} {problem}" for name, problem in _problems(directory)]


def check_files(store: TokenStore) -> None:
    """Verifies every file of a store.

    Raises:
      ConfigError: naming the files that are not what was written.
    """
    damaged = [f"{store.directory}/{name}" for name, _ in _problems(store.directory)]
    if damaged:
        raise ConfigError(
            f"the token store {store.directory!r} is damaged: {len(damaged)} files are not what "
            f"was written: {', '.join(damaged)}; copy it again, or delete it and build it again "
            f"with: {store.manifest['command']}"
        )


def _problems(directory: str) -> Iterator[tuple[str, str]]:
    """The paths of damaged files in the store, and the problem of each."""
    if is_unfinished(directory):
        yield "manifest.json", f"does not exist yet: {unfinished_message(directory)}"
        return
    try:
        manifest = read_manifest(directory)
        yield from _tokenizer_problems(directory, manifest)
        for about in manifest["shards"]:
            yield from _shard_problems(directory, about)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        yield (
            "manifest.json",
            f"is missing or damaged ({type(error).__name__}: {error}); without it no other file "
            "can be verified",
        )


def _tokenizer_problems(directory: str, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    digests = manifest.get("tokenizer", {})
    found = {name: _problem_of_bytes(f"{directory}/{name}", x) for name, x in digests.items()}
    yield from ((name, problem) for name, problem in found.items() if problem)
    if not any(found.values()):
        try:
            verified_tokenizer(directory, manifest)
        except (OSError, ValueError) as error:
            yield next(iter(digests), "tokenizer.json"), f"cannot be loaded: {error}"


def _shard_problems(directory: str, about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    place = f"shards/{about['name']}"
    shard = ShardFiles(f"{directory}/{place}", about)
    for name, expected in files_of(about).items():
        problem = _problem_of_file(shard, name, expected)
        if problem:
            yield f"{place}/{name}", problem


def _problem_of_file(shard: ShardFiles, name: str, expected: dict[str, Any]) -> str:
    """The problem with a file of a shard, or ""."""
    path = f"{shard.directory}/{name}"
    try:
        size = files.size(path)
        if size != expected["bytes"]:
            return f"has {size} bytes, not {expected['bytes']}"
        if name == FILE_NAME:
            return _problem_of_bytes(path, expected["xxh3"])
        found = digests_of_file(path)
    except OSError as error:
        return _unreadable(error)
    try:
        blocks = shard.digests(name)
    except (DamagedBlockError, OSError, ValueError):  # blocks.npy is damaged; it has its own line
        blocks = None
    places = [] if blocks is None else np.flatnonzero(found.blocks != blocks)
    if len(places) and len(found.blocks) > 1:
        return (
            f"{_NOT_WRITTEN} in {len(places)} of its {len(found.blocks)} blocks of 64 KiB, the "
            f"first at byte {places[0] * BLOCK_BYTES:,}"
        )
    return "" if found.sha256 == expected["sha256"] else _NOT_WRITTEN


def _problem_of_bytes(path: str, xxh3: str) -> str:
    """The problem with a file that has one digest, or ""."""
    try:
        return "" if xxh3_of_file(path) == xxh3 else _NOT_WRITTEN
    except OSError as error:
        return _unreadable(error)


def _unreadable(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
