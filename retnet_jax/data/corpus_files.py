"""Finds the files of a corpus, and the names of its documents."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files


class CorpusFile(NamedTuple):
    """A file of a corpus.

    Attributes:
      path: Path to read it from.
      name: Its path relative to the deepest directory that contains all files of the corpus. It
        does not depend on how `path` was typed or where the corpus is.
    """

    path: str
    name: str


def corpus_files(patterns: str) -> list[CorpusFile]:
    """The files that `data.path` names, in the order of their names.

    A file with several paths, also through links, occurs once. Files and directories that cannot be
    examined are returned as files, so that reading them reports the error.

    Args:
      patterns: Paths and globs, separated by commas. The name of an existing file is not a pattern,
        even if it has wildcards or commas. "**" matches any number of directories.

    Raises:
      ConfigError: if one of the patterns matches no file.
    """
    once: dict[str, tuple[int, int, str, str]] = {}
    links = {"/": 0}  # number of links in the path of a directory
    directories: dict[str, str] = {}  # real paths of directories; many files share each
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
        # A file with several paths is named by the one with the fewest links, then by the shortest.
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
    """The paths that match. A part that matches nothing is joined with the part after its comma."""
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
        ending = _most_frequent_ending(files.expanded(part))
        matches = f"is a directory; give the files in it, such as '{part.rstrip('/')}/**/*{ending}'"
    else:
        matches = (
            f"matches no file (from {os.getcwd()}); give a file or a glob such as "
            "'corpus/**/*.txt', or several, separated by commas"
        )
    return f"data.path={patterns!r}{where} {matches}"


def _most_frequent_ending(directory: str) -> str:
    """The most frequent ending of the first thousand files below a directory, or ".txt"."""
    found = (name for _, _, names in os.walk(directory) for name in sorted(names))
    endings = Counter(os.path.splitext(name)[1] for name in itertools.islice(found, 1000))
    endings.pop("", None)
    return endings.most_common(1)[0][0] if endings else ".txt"


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
    """Whether a path is a file, or cannot be examined."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


class _Search:
    """Finds the paths that match a pattern. Wildcards do not match a dot at the beginning.

    Unlike `glob`, it does not follow a loop of links repeatedly, and reports directories that
    cannot be read.
    """

    def __init__(self):
        self.unreadable: list[str] = []  # directories

    def paths(self, directory: str, parts: list[str]) -> Iterator[str]:
        """The files below a directory that match the parts of a pattern."""
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
        """A directory and all directories below it, each once; links are followed last."""
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
