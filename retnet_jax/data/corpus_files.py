"""Which files a corpus is made of, and the names that its documents have from them."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files


class CorpusFile(NamedTuple):
    """A file of a corpus.

    Attributes:
      path: where it is read.
      name: its path from the deepest directory that all files of the corpus are in. It is the same
        however `path` was typed, and wherever the corpus is.
    """

    path: str
    name: str


def corpus_files(patterns: str) -> list[CorpusFile]:
    """The files that `data.path` names, in the order of their names.

    A file that several paths lead to, over links too, comes once. Files and directories that cannot
    be looked at come as files, so that reading them says what is wrong.

    Args:
      patterns: paths and globs, separated by commas. What exists is taken as it is, also where its
        name has wildcards or commas. "**" is any number of directories.

    Raises:
      ConfigError: if one of the patterns matches no file.
    """
    once: dict[str, tuple[int, int, str, str]] = {}
    links = {"/": 0}  # on the way to a directory
    directories: dict[str, str] = {}  # real paths of those seen: most files share few
    for path in _all_matches(patterns):
        absolute = path if files.is_remote(path) else os.path.abspath(path)
        real, followed = absolute, 0
        if not files.is_remote(path):
            parent, name = os.path.split(absolute)
            if parent not in directories:
                directories[parent] = os.path.realpath(parent)
            real = os.path.join(directories[parent], name)
            is_link = os.path.islink(real)
            real = os.path.realpath(real) if is_link else real
            followed = _links_to(parent, links) + is_link
        # Of several paths to a file the one with the fewest links names it, then the shortest.
        candidate = (followed, absolute.count("/"), absolute, path)
        once[real] = min(candidate, once.get(real, candidate))
    absolutes = {path: absolute for _, _, absolute, path in once.values()}
    split = {path: absolute.split("/") for path, absolute in absolutes.items()}
    columns = zip(*(parts[:-1] for parts in split.values()), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))
    found = [CorpusFile(path, "/".join(parts[common:])) for path, parts in split.items()]
    return sorted(found, key=lambda file: file.name)


def _links_to(directory: str, known: dict[str, int]) -> int:
    """How many links an absolute path follows."""
    if directory not in known:
        known[directory] = _links_to(os.path.dirname(directory), known) + os.path.islink(directory)
    return known[directory]


def _all_matches(patterns: str) -> Iterable[str]:
    """The paths that match; a part between commas that matches nothing may be part of a name."""
    whole = files.expanded(patterns)
    if not files.is_remote(whole) and os.path.isfile(whole):
        return [whole]
    paths: list[str] = []
    parts, start = patterns.split(","), 0
    while start < len(parts):
        if not parts[start].strip():
            start += 1
            continue
        for stop in range(start + 1, len(parts) + 1):
            found = _matches(files.expanded(",".join(parts[start:stop]).strip()))
            if found:
                break
        else:
            raise ConfigError(_no_match_message(patterns, parts[start].strip()))
        paths += found
        start = stop
    if not paths:
        raise ConfigError(_no_match_message(patterns, patterns))
    return paths


def _no_match_message(patterns: str, part: str) -> str:
    where = "" if part == patterns.strip() else f": {part!r}"
    if os.path.isdir(files.expanded(part)):
        matches = f"is a directory; give the files in it, such as '{part.rstrip('/')}/**/*.txt'"
    else:
        matches = (
            f"matches no file (from {os.getcwd()}); give a file or a glob such as "
            "'corpus/**/*.txt', or several, separated by commas"
        )
    return f"data.path={patterns!r}{where} {matches}"


def _matches(pattern: str) -> list[str]:
    if files.is_remote(pattern):
        return files.matches(pattern)
    if os.path.lexists(pattern):
        return [] if os.path.isdir(pattern) else [pattern]
    root = "/" if pattern.startswith("/") else ""
    search = _Search()
    found = search.paths(root, [part for part in pattern.split("/") if part])
    return [path for path in found if _is_to_be_read(path)] + search.unreadable


def _is_to_be_read(path: str) -> bool:
    """Whether a path is a file, or something of which that cannot be said."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


class _Search:
    """What a pattern matches. As in a shell, wildcards do not match a dot at the beginning.

    `glob` reads files in a loop of links again and again, and is silent about directories that
    cannot be read.
    """

    def __init__(self):
        self.unreadable: list[str] = []  # directories

    def paths(self, directory: str, parts: list[str]) -> Iterator[str]:
        """The paths from a directory on that match parts of a path; not directories."""
        part, *rest = parts
        if part == "**":
            for below in self._tree(directory):
                yield from self.paths(below, rest or ["*"])
            return
        names = [part]
        if glob.has_magic(part) and not os.path.lexists(os.path.join(directory, part)):
            hidden = part.startswith(".")
            names = [x for x in self._names(directory) if hidden or not x.startswith(".")]
            names = fnmatch.filter(names, part)
        for path in (os.path.join(directory, name) for name in names):
            if rest and os.path.isdir(path):
                yield from self.paths(path, rest)
            elif not rest and os.path.lexists(path) and not os.path.isdir(path):
                yield path

    def _tree(self, top: str) -> Iterator[str]:
        """A directory and all below, each once: links are followed to what is not seen without."""
        seen: set[str] = set()
        directories, links = [top], []
        while directories or links:
            directory = directories.pop() if directories else links.pop(0)
            real = os.path.realpath(directory or ".")
            if real in seen:
                continue
            seen.add(real)
            yield directory
            names = [name for name in self._names(directory) if not name.startswith(".")]
            for path in (os.path.join(directory, name) for name in names):
                if os.path.isdir(path):
                    (links if os.path.islink(path) else directories).append(path)

    def _names(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory or "."))
        except OSError:
            if directory not in self.unreadable:
                self.unreadable.append(directory)
            return []
