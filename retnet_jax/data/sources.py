"""Documents: where the text comes from."""

from __future__ import annotations

import functools
import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retnet_jax.config import SOURCES, ConfigError


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by, which also decides whether it is held out."""

    name: str
    text: str

    @property
    def byte_count(self) -> int:
        return len(self.text.encode("utf-8"))


def read_documents(
    source: str, path: str, text_field: str, skipped: list[str]
) -> Iterator[Document]:
    """The documents of a source, in an order that depends on their names alone.

    What cannot be used (an empty text, bytes that are not UTF-8, a line that is no JSON object or
    lacks the field) is left out, and appended to `skipped` as "name: reason".

    Args:
      source: "stdlib" is the source code of the running Python's standard library, each file named
        by its path inside it. "text" is one document a file, named by its path. "jsonl" is one
        document a line, named "path:id" if the record has a string or an integer in its field "id"
        and "path:line number" if not.
      path: for "text" and "jsonl", the files by glob, `**` included.
      text_field: for "jsonl", the field that holds the text.
      skipped: grows while the documents are read.

    Raises:
      ConfigError: for an unknown source, and if `path` matches no file.
    """
    if source == "stdlib":
        pieces, parse = _whole_files(_stdlib_files()), _parse_text
    elif source == "text":
        pieces, parse = _whole_files((name, Path(name)) for name in _matches(path)), _parse_text
    elif source == "jsonl":
        pieces = _lines(_matches(path))
        parse = functools.partial(_parse_record, text_field=text_field)
    else:
        raise ConfigError(f"data.source={source!r} is not one of {', '.join(map(repr, SOURCES))}")
    for name, data in pieces:
        try:
            document = parse(name, data)
        except ValueError as error:
            skipped.append(f"{name}: {error}")
        else:
            yield document


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py"))
    installed = {"site-packages", "dist-packages", "__pycache__"}
    names = sorted(path.as_posix() for path in relative_paths if not installed & set(path.parts))
    return [(name, root / name) for name in names]


def _matches(pattern: str) -> list[str]:
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise ConfigError(
            f"data.path={pattern!r} matches no file (from {os.getcwd()}); "
            "give a file or a glob such as 'corpus/**/*.txt'"
        )
    return paths


def _whole_files(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, bytes]]:
    for name, path in files:
        yield name, path.read_bytes()


def _lines(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line


def _parse_text(name: str, data: bytes) -> Document:
    return Document(name, _usable(data.decode("utf-8")))


def _parse_record(name: str, data: bytes, text_field: str) -> Document:
    try:
        record = json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r} among {', '.join(map(repr, record))}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
    if type(record.get("id")) in (str, int):
        name = f"{name.rpartition(':')[0]}:{record['id']}"
    return Document(name, _usable(text))


def _usable(text: str) -> str:
    if not text.strip():
        raise ValueError("empty")
    text.encode("utf-8")  # raises for half a surrogate pair, which a JSON escape can spell
    return text
