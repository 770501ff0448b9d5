"""Reads the records of files and data sets, without skipping or filtering any.

zstandard, pyarrow, tensorflow_datasets and datasets are imported where they are used.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.files.hub import dataset_error

TOO_LONG = "too long"
BYTE_ORDER_MARK = "\ufeff"
Part = tuple[int, int | None, int, int]  # start, stop, number of the first record, bytes

_COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x04\x22\x4d\x18": "compressed with LZ4",
    b"PAR1\x15": "a parquet file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
      place: Its place in the file, such as ":7"; "" for the whole file.
      value: A dict of fields, or a text or its bytes.
      problem: Why there is no value: a reason, and perhaps details.
      fields: Names of all fields of the record; None: `value` has all of them.
    """

    place: str
    value: Any = None
    problem: tuple[str, ...] | None = None
    fields: Collection[str] | None = None


@dataclass(frozen=True)
class UnreadableValue:
    """A field that cannot be read: a reason, and perhaps details."""

    problem: tuple[str, ...]


class UnreadableError(Exception):
    """The rest of a file cannot be read: a reason and details."""


def whole_file(path: str, most_bytes: int) -> Iterator[Record]:
    """One record: the bytes of a file."""
    with _reading(), _opened(path) as file:
        size = files.size(path)
        if size > most_bytes:
            yield Record("", problem=(TOO_LONG, f"{size:,} bytes"))
            return
        with _decompressed(path, file) as content:
            data = content.read(most_bytes + 1)
        if len(data) > most_bytes:
            yield Record("", problem=(TOO_LONG, f"more than {most_bytes:,} bytes"))
        else:
            yield Record("", data)


def line_parts(path: str, part_bytes: int) -> list[Part]:
    """Parts of a file of lines, each about `part_bytes` large; a compressed file is one part."""
    try:
        size = files.size(path)
        with files.open_binary(path) as file:
            if size <= part_bytes or _compression(path, _first_bytes(file)):
                return [(0, None, 1, size)]
            return _cut_at_lines(file, part_bytes)
    except OSError:  # reading it will report the error
        return [(0, None, 1, 0)]


def _cut_at_lines(file: BinaryIO, part_bytes: int) -> list[Part]:
    parts, start, first, position, line = [], 0, 1, 0, 1
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
    """The JSON object of each line in a part of a file, without blank lines.

    Lines that are too long for a document of `most_bytes` are not read into memory.
    """
    with _reading(), _opened(path) as opened, _decompressed(path, opened) as file:
        if start:
            file.seek(start)
        left = None if stop is None else stop - start
        number = first
        # JSON can be six times as long as the text in it.
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
            place = f":{number}"
            number += 1
            if not line:
                yield Record(place, problem=(TOO_LONG, f"{taken:,} bytes"))
            elif line.removeprefix(BYTE_ORDER_MARK.encode()).strip():
                yield _parsed(place, line)


def _parsed(place: str, line: bytes) -> Record:
    try:
        value = json.loads(line.decode("utf-8").lstrip(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        return Record(place, problem=("invalid UTF-8", str(error)))
    except (ValueError, RecursionError) as error:
        return Record(place, problem=("invalid JSON", str(error)))
    if not isinstance(value, dict):
        return Record(place, problem=(f"a JSON {type(value).__name__}, not an object",))
    return Record(place, value)


def parquet_parts(path: str, part_bytes: int) -> list[Part]:
    """Parts of a parquet file: groups of row groups, each about `part_bytes` large."""
    try:
        with files.open_binary(path) as file:
            metadata = package("pyarrow.parquet", "pyarrow").ParquetFile(file).metadata
    except (OSError, ValueError):  # pyarrow raises both; reading it will report the error
        return [(0, None, 0, 0)]
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
    path: str, start: int, stop: int | None, first: int, fields: Collection[str]
) -> Iterator[Record]:
    """The rows of some row groups, with the fields that exist.

    Args:
      path: Path of the file.
      start: The first row group.
      stop: The row group after the last; None: to the end of the file.
      first: Number of the first row in the file.
      fields: Names of columns; "a.b" for field b inside column a.
    """
    parquet = package("pyarrow.parquet", "pyarrow")
    with _reading(), _opened(path) as opened:
        file = parquet.ParquetFile(opened)
        names = file.schema_arrow.names
        number = first
        for group in range(start, file.metadata.num_row_groups if stop is None else stop):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(256, row_groups=[group], columns=list(fields)):
                    for row in _rows(batch):
                        yield Record(f":{number}", row, fields=names)
                        number += 1
            except (OSError, ValueError) as error:  # the next row group may be intact
                problem = ("unreadable", f"{type(error).__name__}: {error}")
                while number < end:
                    yield Record(f":{number}", problem=problem)
                    number += 1


def _rows(batch) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow batch."""
    columns = [_values(column) for column in batch.columns]
    for row in range(batch.num_rows):
        values = (column[row] for column in columns)
        yield dict(zip(batch.schema.names, values, strict=True))


def _values(column) -> list[Any]:
    try:
        return column.to_pylist()
    except _NOT_CONVERTED:
        return [_value(scalar) for scalar in column]


def _value(scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return UnreadableValue(("invalid UTF-8", str(error)))
    except _NOT_CONVERTED as error:
        return UnreadableValue((f"cannot be converted from {scalar.type}", str(error)))


# Values that are not UTF-8; dates that Python cannot represent; types pyarrow does not implement.
_NOT_CONVERTED = (ValueError, OverflowError, NotImplementedError)


def tfds_source(path: str):
    """The data set "name:split" of tensorflow_datasets, by index and without TensorFlow."""
    outside, bracket, of_split = path.partition("[")  # "c4/en:train[:1000]"
    name, _, split = outside.rpartition(":")
    if not name:
        raise ConfigError(
            f"data.path={path!r} does not name a data set and a split, such as 'c4/en:train'"
        )
    tfds = package("tensorflow_datasets", "tensorflow-datasets")
    with _opening(path):
        return tfds.data_source(name, split=split + bracket + of_split)


def tfds_examples(path: str, start: int, stop: int | None) -> Iterator[Record]:
    """Some examples of a data set of tensorflow_datasets."""
    source = tfds_source(path)
    for number in range(start, len(source) if stop is None else stop):
        yield Record(f":{number}", dict(source[number]))


def hf_shards(path: str) -> int:
    """The number of shards of a Hugging Face data set, which are read separately."""
    return max(1, getattr(_hf_stream(path), "num_shards", 1))


def hf_examples(path: str, shard: int) -> Iterator[Record]:
    """The examples of one shard of a Hugging Face data set, streamed."""
    stream = _hf_stream(path)
    shards = max(1, getattr(stream, "num_shards", 1))
    if shards > 1:
        stream = stream.shard(num_shards=shards, index=shard)
    with _explaining(path):
        for number, example in enumerate(stream):
            yield Record(f":{shard}:{number}", example)


def _hf_stream(path: str):
    name, *config, split = path.split(":") if ":" in path else ("", "")
    if not name or len(config) > 1:
        raise ConfigError(
            f"data.path={path!r} does not name a data set and a split, such as "
            "'allenai/c4:en:train'"
        )
    name, _, revision = name.partition("@")
    options = {"revision": revision} if revision else {}
    datasets = package("datasets", "datasets")
    with _explaining(path):
        return datasets.load_dataset(name, *config, split=split, streaming=True, **options)


@contextlib.contextmanager
def _explaining(path: str) -> Iterator[None]:
    """Raises the errors of the library `datasets` as one line that says what would help."""
    name, _, revision = path.partition(":")[0].partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or os.path.exists(name):
        with _opening(path):
            yield
        return
    try:
        yield
    except (ConfigError, UnreadableError):
        raise
    except Exception as error:  # of many types, also those of HTTP libraries
        raise dataset_error(error, name, revision or None) from error


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library raises many kinds, mostly for a wrong name
        kind = type(error).__name__
        raise ConfigError(f"data.path={path!r} cannot be opened: {kind}: {error}") from error


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turns the errors of damaged files into `UnreadableError`."""
    try:
        yield
    except ConfigError:  # a package is missing
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # pyarrow's errors are OSError or ValueError.
        detail = f"{type(error).__name__}: {error}"
        raise UnreadableError("the rest of the file is unreadable", detail) from None


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        if os.path.isdir(path):
            os.listdir(path)  # raises the error for which this directory is in the list of files
        file = files.open_binary(path)
    except OSError as error:
        raise UnreadableError("cannot be opened", f"{type(error).__name__}: {error}") from None
    with file:
        yield file


@contextlib.contextmanager
def _decompressed(path: str, file: BinaryIO) -> Iterator[BinaryIO | io.BufferedIOBase]:
    """The decompressed contents of a file, which need not be compressed.

    Raises:
      UnreadableError: if the file is not text.
      OSError, EOFError, zlib.error: while reading, if the file is damaged.
    """
    head = _first_bytes(file)
    kind = _compression(path, head)
    for beginning, name in _NO_TEXT.items():
        if head.startswith(beginning):
            raise UnreadableError(f"is {name}, not UTF-8 text")
    if kind == "gzip":
        with gzip.GzipFile(fileobj=file) as content:
            yield content
    elif kind == "bzip2":
        with bz2.BZ2File(file) as content:
            yield content
    elif kind == "xz":
        lzma = package("lzma", "backports.lzma")
        try:
            with lzma.LZMAFile(file) as content:
                yield content
        except lzma.LZMAError as error:
            raise OSError(f"LZMAError: {error}") from error
    elif kind == "zstandard":
        zstandard = package("zstandard", "zstandard")
        try:
            with io.BufferedReader(_ZstdStream(file), 1 << 20) as content:
                yield content
        except zstandard.ZstdError as error:
            raise OSError(f"ZstdError: {error}") from error
    else:
        yield file


def _first_bytes(file: BinaryIO) -> bytes:
    head = file.read(16)
    file.seek(0)
    return head


def _compression(path: str, head: bytes) -> str | None:
    """The compression of a file, by its first bytes; by its name if these are unknown binary."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    # The second is a skippable frame, which some tools write first.
    if head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == b"\x2a\x4d\x18":
        return "zstandard"
    if head and head.isascii():
        return None
    return _COMPRESSED.get(os.path.splitext(path)[1].lower())


class _ZstdStream(io.RawIOBase):
    """Reads zstandard frames, one after another.

    Unlike the package's own reader, it raises EOFError for a file that ends inside a frame.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        decompressor = package("zstandard", "zstandard").ZstdDecompressor(
            max_window_size=2**31  # the largest in the format, from `zstd --long=31`
        )
        self._new_frame = decompressor.decompressobj
        self._frame = self._new_frame()
        self._inside = False  # whether the position is inside a frame
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


def package(name: str, to_install: str):
    """A module of an optional package; a `ConfigError` that names the package if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"reading this source needs the package {to_install}: pip install {to_install}"
        ) from error
