"""Reads the records of files and data sets as they are: nothing is judged or skipped.

zstandard, pyarrow, tensorflow_datasets and datasets are imported where they are used.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files

TOO_LONG = "too long"
Part = tuple[int, int | None, int, int]  # start, stop, number of the first record, bytes


@dataclass(frozen=True)
class Record:
    """What is at one place of a file.

    Attributes:
      path: the file.
      name: the place.
      value: an object of fields, or a text or its bytes.
      problem: why there is no value: a reason, and perhaps details.
    """

    path: str
    name: str
    value: Any = None
    problem: tuple[str, ...] | None = None


class UnreadableError(Exception):
    """The rest of a file cannot be read: a reason and details."""


def whole_file(path: str, name: str, most_bytes: int) -> Iterator[Record]:
    """One record, the bytes of a file."""
    size = files.size(path)
    if size > most_bytes:
        yield Record(path, name, problem=(TOO_LONG, f"{size:,} bytes"))
    else:
        yield Record(path, name, files.read_bytes(path))


def line_parts(path: str, part_bytes: int) -> list[Part]:
    """Parts of a file of lines, about as large as asked for; a compressed file is one part."""
    size = files.size(path)
    if path.endswith((".gz", ".zst")) or size <= part_bytes:
        return [(0, None, 1, size)]
    parts, start, first, position, line = [], 0, 1, 0, 1
    with files.open_binary(path) as file:
        while block := file.read(1 << 20):
            cut = block.rfind(b"\n") + 1
            if cut and position + cut - start >= part_bytes:
                line += block.count(b"\n", 0, cut)
                parts.append((start, position + cut, first, position + cut - start))
                start, first = position + cut, line
                line += block.count(b"\n", cut)
            else:
                line += block.count(b"\n")
            position += len(block)
    if start < position:
        parts.append((start, position, first, position - start))
    return parts


def json_lines(
    path: str, start: int, stop: int | None, first: int, most_bytes: int
) -> Iterator[Record]:
    """The JSON object of each line in a part of a file. Longer lines are not held in memory."""
    with _reading(path), _decompressed(path) as file:
        if start:
            file.seek(start)
        left = None if stop is None else stop - start
        number = first
        # JSON can be six times as long as what it spells.
        longest = 6 * most_bytes + 65_536
        while left is None or left > 0:
            line = file.readline(longest)
            if not line:
                return
            taken, whole = len(line), len(line) < longest or line.endswith(b"\n")
            while not whole:
                more = file.readline(1 << 20)
                taken += len(more)
                whole = len(more) < 1 << 20 or more.endswith(b"\n")
                line = b""
            left = None if left is None else left - taken
            name = f"{path}:{number}"
            number += 1
            if not line:
                yield Record(path, name, problem=(TOO_LONG, f"{taken:,} bytes"))
            else:
                yield _parsed(path, name, line)


def _parsed(path: str, name: str, line: bytes) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(path, name, problem=("invalid UTF-8", str(error)))
    except (ValueError, RecursionError) as error:
        return Record(path, name, problem=("invalid JSON", str(error)))
    if not isinstance(value, dict):
        return Record(path, name, problem=(f"a JSON {type(value).__name__}, not an object",))
    return Record(path, name, value)


def parquet_parts(path: str, part_bytes: int) -> list[Part]:
    """Parts of a parquet file: row groups, as many as are about as large as asked for."""
    try:
        with files.open_binary(path) as file:
            metadata = _package("pyarrow.parquet", "pyarrow").ParquetFile(file).metadata
    except (OSError, ValueError):  # pyarrow's errors are both; reading it will say so again
        return [(0, None, 0, files.size(path))]
    parts: list[Part] = []
    start = row = first = size = 0
    for group in range(metadata.num_row_groups):
        row += metadata.row_group(group).num_rows
        size += metadata.row_group(group).total_byte_size
        if size >= part_bytes or group + 1 == metadata.num_row_groups:
            parts.append((start, group + 1, first, size))
            start, first, size = group + 1, row, 0
    return parts


def parquet_rows(
    path: str, start: int, stop: int | None, first: int, columns: set[str]
) -> Iterator[Record]:
    """The rows of some row groups, with those of the columns that there are."""
    parquet = _package("pyarrow.parquet", "pyarrow")
    with _reading(path), files.open_binary(path) as opened:
        file = parquet.ParquetFile(opened)
        known = [name for name in file.schema_arrow.names if name in columns]
        groups = range(start, file.metadata.num_row_groups if stop is None else stop)
        number = first
        for batch in file.iter_batches(256, row_groups=list(groups), columns=known):
            for row in batch.to_pylist():
                present = {name: value for name, value in row.items() if value is not None}
                yield Record(path, f"{path}:{number}", present)
                number += 1


def tfds_source(path: str):
    """The data set "name:split" of tensorflow_datasets, by index and without TensorFlow."""
    outside, bracket, of_split = path.partition("[")  # "c4/en:train[:1000]"
    name, _, split = outside.rpartition(":")
    if not name:
        raise ConfigError(f"data.path={path!r} is no data set and split, such as 'c4/en:train'")
    tfds = _package("tensorflow_datasets", "tensorflow-datasets")
    with _opening(path):
        return tfds.data_source(name, split=split + bracket + of_split)


def tfds_examples(path: str, start: int, stop: int) -> Iterator[Record]:
    """Some examples of a data set of tensorflow_datasets."""
    source = tfds_source(path)
    for number in range(start, stop):
        yield Record(path, f"{path}:{number}", dict(source[number]))


def hf_shards(path: str) -> int:
    """The number of shards of a data set of Hugging Face, which are read apart."""
    return max(1, getattr(_hf_stream(path), "num_shards", 1))


def hf_examples(path: str, shard: int) -> Iterator[Record]:
    """The examples of one shard of a data set of Hugging Face, streamed."""
    stream = _hf_stream(path)
    shards = max(1, getattr(stream, "num_shards", 1))
    if shards > 1:
        stream = stream.shard(num_shards=shards, index=shard)
    for number, example in enumerate(stream):
        yield Record(path, f"{path}:{shard}:{number}", example)


def _hf_stream(path: str):
    name, *config, split = path.split(":") if ":" in path else ("", "")
    if not name or len(config) > 1:
        raise ConfigError(
            f"data.path={path!r} is no data set and split, such as 'allenai/c4:en:train'"
        )
    datasets = _package("datasets", "datasets")
    with _opening(path):
        return datasets.load_dataset(name, *config, split=split, streaming=True)


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library has many of its own, for a wrong name above all
        kind = type(error).__name__
        raise ConfigError(f"data.path={path!r} cannot be opened: {kind}: {error}") from error


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns the errors of damaged files into `UnreadableError`."""
    try:
        yield
    except ConfigError:  # a package that is not there
        raise
    except (OSError, EOFError, ValueError, zlib.error, *_zstd_errors(path)) as error:
        # pyarrow's are OSError or ValueError.
        detail = f"{type(error).__name__}: {error}"
        raise UnreadableError("the rest of the file is unreadable", detail) from None


@contextlib.contextmanager
def _decompressed(path: str) -> Iterator[BinaryIO]:
    with files.open_binary(path) as file:
        if path.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as content:
                yield content
        elif path.endswith(".zst"):
            with io.BufferedReader(_ZstdStream(file), 1 << 20) as content:
                yield content
        else:
            yield file


class _ZstdStream(io.RawIOBase):
    """Zstandard frames, one after the other. The package's own reader takes a torn one for the end.

    Raises:
      EOFError: at the end of a file that ends inside a frame.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._new_frame = _package("zstandard", "zstandard").ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._inside = False  # a frame
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._inside = self._new_frame(), False
            data = data or self._file.read(1 << 18)
            if not data:
                if self._inside:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            self._inside = True
            self._ready = self._frame.decompress(data)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _zstd_errors(path: str) -> tuple[type[Exception], ...]:
    return (_package("zstandard", "zstandard").ZstdError,) if path.endswith(".zst") else ()


def _package(name: str, to_install: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"reading this source needs the package {to_install}: pip install {to_install}"
        ) from error
