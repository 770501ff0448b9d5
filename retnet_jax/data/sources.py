"""Reads the documents of a corpus.

A corpus is a list of pieces, each read by one process. The pieces and their contents depend only on
the files. A document that cannot be used is skipped, counted and named.
"""

from __future__ import annotations

import functools
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from retnet_jax.config import SOURCES, DataConfig
from retnet_jax.data import formats
from retnet_jax.data.corpus_files import corpus_files
from retnet_jax.data.formats import BYTE_ORDER_MARK, Record, UnreadableError, UnreadableValue
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.own_objects import is_own, own_object

_PIECE_BYTES = 64_000_000
_EXAMPLES = 10_000  # in a piece of a data set that is read by index


@dataclass(frozen=True)
class Document:
    """A text and its name, which also decides whether it is held out."""

    name: str
    text: str

    @property
    def byte_count(self) -> int:
        return len(self.text.encode("utf-8"))


class Source(Protocol):
    """The interface of the user's own source, named "module:class" in `data.source`.

    Each call must return the same pieces for a path, and the same documents for a piece. See
    docs/extend.md.
    """

    @staticmethod
    def pieces(path: str) -> Iterable[str]:
        """The parts of the corpus that `data.path` names, such as its files."""
        ...

    @staticmethod
    def read(piece: str) -> Iterable[Document]:
        """The documents of one piece, in their order."""
        ...


@dataclass(frozen=True)
class Piece:
    """A part of a corpus.

    Attributes:
      path: File, URL, or name of a data set.
      name: Beginning of the names of its documents; "" in the user's own source.
      start: Its first byte, row group, example or shard.
      stop: Its end, exclusive; None: the end of the file.
      first: Number of its first line, row or example in the file.
      bytes: Its approximate size.
    """

    path: str
    name: str
    start: int = 0
    stop: int | None = None
    first: int = 0
    bytes: int = 0


@dataclass
class Skipped:
    """The skipped documents: a count for each reason, and the first examples."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, name: str, reason: str, detail: str = "") -> None:
        self.reasons[reason] += 1
        self._keep([f"{name}: {reason}{': ' if detail else ''}{detail}"])

    def merge(self, other: Skipped) -> None:
        self.reasons += other.reasons
        self._keep(other.first)

    def as_dict(self) -> dict[str, Any]:
        reasons = dict(sorted(self.reasons.items()))
        return {"count": self.count, "reasons": reasons, "first": self.first}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Skipped:
        return cls(Counter(values["reasons"]), list(values["first"]))

    def _keep(self, examples: list[str]) -> None:
        self.first += examples[: 100 - len(self.first)]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{counts}; the first: {self.first[0]}" if self.first else "nothing"


class UnusableError(Exception):
    """A document that is skipped: the reason, and perhaps details."""


def list_pieces(config: DataConfig, piece_bytes: int = _PIECE_BYTES) -> list[Piece]:
    """The pieces of a corpus, in their order.

    Args:
      config: The data options. Documents of the sources: "stdlib", each file of the running
        Python's standard library; "text", each file; "jsonl", each line of .jsonl or .json files
        ("text" and "jsonl" may be compressed with gzip, bzip2, xz or zstandard); "parquet", each
        row; "tfds" and "hf", each example of the data set "name:split" or "name:config:split";
        "module:class", the documents of a `Source`.
      piece_bytes: Approximate size of a piece of a large file.

    Raises:
      ConfigError: if `data.path` matches no file, or a needed package is missing.
    """
    path = config.path
    if is_own(config.source):
        return _own_pieces(config)
    if config.source == "stdlib":
        root = _stdlib_root()
        return [
            Piece(name, name, bytes=(root / name).stat().st_size) for name in _stdlib_names(root)
        ]
    if config.source == "tfds":
        count = len(formats.tfds_source(path))
        return [
            Piece(path, path, start, min(start + _EXAMPLES, count), first=start, bytes=_EXAMPLES)
            for start in range(0, count, _EXAMPLES)
        ]
    if config.source == "hf":
        shards = formats.hf_shards(path)
        return [Piece(path, path, shard, shard + 1, bytes=1) for shard in range(shards)]
    return [
        Piece(*file, *part)
        for file in corpus_files(path)
        for part in _parts(config, file.path, piece_bytes)
    ]


def _parts(config: DataConfig, path: str, piece_bytes: int) -> list[formats.Part]:
    if config.source == "parquet":
        return formats.parquet_parts(path, piece_bytes)
    if config.source == "jsonl":
        return formats.line_parts(path, piece_bytes)
    return [(0, None, 0, _size(path))]


def _size(path: str) -> int:
    try:
        return files.size(path)
    except OSError:  # reading it will report the error
        return 0


def read_piece(config: DataConfig, piece: Piece, skipped: Skipped) -> Iterator[Document]:
    """The documents of a piece, in their order.

    If reading a file fails, the rest of it is skipped.

    Args:
      config: The source, the names of fields, and the filters.
      piece: A piece from `list_pieces`.
      skipped: Documents that are skipped are added to it.

    Raises:
      ConfigError: with `config.strict`, for the first document that cannot be used.
    """
    records = _records(config, piece)
    while True:
        try:
            record = next(records, None)
            if record is None:
                return
            document = _document(config, piece, record)
        except (UnusableError, UnreadableError) as error:
            name = piece.path
            if isinstance(error, UnusableError) and record is not None:
                name += record.place if piece.name else f":{record.place}"
            if config.strict and not str(error.args[0]).startswith("filtered"):
                raise ConfigError(f"{name}: {': '.join(error.args)} (data.strict)") from None
            skipped.add(name, *error.args)
        else:
            yield document


def file_of(config: DataConfig, piece: Piece) -> str | None:
    """The file of a piece; None for a piece of a data set."""
    if is_own(config.source):
        return piece.path if os.path.isfile(piece.path) else None
    if config.source in ("tfds", "hf"):
        return None
    return _path_of(config, piece)


def _path_of(config: DataConfig, piece: Piece) -> str:
    """The file of a piece of a corpus of files."""
    return str(_stdlib_root() / piece.path) if config.source == "stdlib" else piece.path


def approximate_bytes(config: DataConfig) -> int | None:
    """Size of a corpus in bytes of its files, which may be compressed; None for a data set.

    Raises:
      ConfigError: if `data.path` matches no file.
    """
    if is_own(config.source) or config.source == "stdlib":
        return sum(piece.bytes for piece in list_pieces(config))
    if config.source in ("tfds", "hf"):
        return None
    return sum(_size(file.path) for file in corpus_files(config.path))


def read_documents(config: DataConfig, skipped: Skipped) -> Iterator[Document]:
    """All documents of a corpus, in their order; see `list_pieces` and `read_piece`."""
    for piece in list_pieces(config):
        yield from read_piece(config, piece, skipped)


def _own_source(config: DataConfig) -> type[Source]:
    found = own_object("data.source", config.source)
    if not all(callable(getattr(found, name, None)) for name in ("pieces", "read")):
        raise ConfigError(
            f"data.source={config.source!r} is {found!r}, which does not have both pieces(path) "
            "and read(piece)"
        )
    return found


def _own_pieces(config: DataConfig) -> list[Piece]:
    pieces = list(_own_source(config).pieces(config.path))
    wrong = [piece for piece in pieces if not isinstance(piece, str)]
    if wrong or len(set(pieces)) < len(pieces) or not pieces:
        raise ConfigError(
            f"data.source={config.source!r}: pieces({config.path!r}) returned {len(pieces)} "
            f"pieces, {len(set(pieces))} of them different, such as {(wrong or pieces)[:1]}; it "
            "must return different strings"
        )
    sizes = (os.path.getsize(piece) if os.path.isfile(piece) else 1 for piece in pieces)
    return [Piece(piece, "", bytes=size) for piece, size in zip(pieces, sizes, strict=True)]


def _own_records(config: DataConfig, piece: Piece) -> Iterator[Record]:
    for document in _own_source(config).read(piece.path):
        if not isinstance(document, Document):
            raise ConfigError(
                f"data.source={config.source!r}: read({piece.path!r}) returned a "
                f"{type(document).__name__}, not a retnet_jax.data.sources.Document"
            )
        yield Record(document.name, document.text)


def _records(config: DataConfig, piece: Piece) -> Iterator[Record]:
    if is_own(config.source):
        return _own_records(config, piece)
    if config.source in ("stdlib", "text"):
        return formats.whole_file(_path_of(config, piece), config.max_document_bytes)
    span = (piece.path, piece.start, piece.stop, piece.first)
    if config.source == "jsonl":
        return formats.json_lines(*span, config.max_document_bytes)
    if config.source == "parquet":
        return formats.parquet_rows(*span, fields=_fields(config))
    if config.source == "tfds":
        return formats.tfds_examples(*span[:3])
    if config.source == "hf":
        return formats.hf_examples(*span[:2])
    raise ConfigError(
        f"data.source={config.source!r} is not one of {', '.join(map(repr, SOURCES))}"
    )


def _document(config: DataConfig, piece: Piece, record: Record) -> Document:
    """The document of a record; raises `UnusableError` if there is none or a filter drops it."""
    if record.problem is not None:
        raise UnusableError(*record.problem)
    text, name = record.value, piece.name + record.place
    if isinstance(record.value, dict):
        _filter(config, record.value)
        text = _text_of(config, record)
        number = _field(record.value, config.id_field)
        if type(number) in (str, int):
            name = f"{piece.name}:{number}"
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnusableError("invalid UTF-8", str(error)) from None
    if not isinstance(text, str):
        raise UnusableError(f"field {config.text_field!r} is {type(text).__name__}, not a string")
    if BYTE_ORDER_MARK in text:
        text = _MARKS.sub("", text)
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:  # half a surrogate pair, which a JSON escape can spell
        raise UnusableError("half a surrogate pair") from None
    if not text.strip():
        raise UnusableError("empty")
    if size > config.max_document_bytes:
        raise UnusableError(formats.TOO_LONG, f"{size:,} bytes")
    if size < config.min_bytes:
        raise UnusableError("filtered: min_bytes")
    return Document(name, text)


# At the beginning of the text, and of lines: files that begin with it may have been joined.
_MARKS = re.compile(f"(?:^|(?<=[\r\n])){BYTE_ORDER_MARK}+")


def _text_of(config: DataConfig, record: Record) -> Any:
    """The value of a record's text field.

    Raises:
      UnusableError: if there is no such field, or it is None or cannot be read.
    """
    name, text = config.text_field, _field(record.value, config.text_field, missing=_MISSING)
    if text is _MISSING:
        known = ", ".join(map(repr, record.value if record.fields is None else record.fields))
        raise UnusableError(f"no field {name!r}", f"among {known}" if known else "no fields at all")
    if text is None:
        raise UnusableError(f"field {name!r} is null")
    if isinstance(text, UnreadableValue):
        raise UnusableError(*text.problem)
    return text


def _filter(config: DataConfig, record: dict[str, Any]) -> None:
    for name, allowed, key in (
        ("extensions", config.extensions, config.extension_field),
        ("languages", config.languages, config.language_field),
        ("licenses", config.licenses, config.license_field),
    ):
        if not allowed:
            continue
        found = _field(record, key)
        found = found if isinstance(found, list | tuple) else [found]
        if not {str(x).lower() for x in found} & {x.lower() for x in allowed}:
            raise UnusableError(f"filtered: {name}")


_MISSING = object()


def _field(record: Any, name: str, missing: Any = None) -> Any:
    """A field by name. Without a field "meta.pile_set_name", looks inside the field "meta"."""
    if isinstance(record, UnreadableValue):
        return record
    if not isinstance(record, dict):
        return missing
    if name in record:
        return record[name]
    for dot in (place for place, character in enumerate(name) if character == "."):
        found = _field(record.get(name[:dot]), name[dot + 1 :], missing)
        if found is not missing:
            return found
    return missing


def _fields(config: DataConfig) -> set[str]:
    used = {config.text_field, config.id_field}
    used |= {config.extension_field} if config.extensions else set()
    used |= {config.language_field} if config.languages else set()
    used |= {config.license_field} if config.licenses else set()
    return used


@functools.cache  # because it is called for every file
def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_names(root: Path) -> list[str]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    installed = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(path.as_posix() for path in paths if not installed & set(path.parts))
