"""Patterns of files, however they are typed, over any tree of files and links."""

import fnmatch
import glob
import itertools
import os
import stat

import pytest
from hypothesis import strategies as st
from properties import holds_for, sizes

from retnet_jax.data.corpus_files import corpus_files
from retnet_jax.errors import ConfigError

NAMES = [
    *("a", "b", "a.txt", "b.txt", "c d.txt", "é.txt", "e\u0301.txt", "[ab].txt", "[a]", "x\ny.txt"),
    *(".h.txt", ".d", "k,l.txt", "~", "~x.txt", "**", "*", "?.txt", "{a}.txt", "-r.txt", "😀"),
    *("\udcff.txt", "q'\".txt", "#.txt", "%20.txt", "a\\b.txt"),
]
PARTS = [
    *(
        "*",
        "*",
        "**",
        "**",
        "**",
        "*.txt",
        "*.txt",
        "?.txt",
        "[ab]*",
        "[!a]*",
        ".*",
        "*[.]txt",
        "*.tx?",
        "nothing",
    ),
    *("a", "[a]", "[ab].txt", "b", "~", "*\n*", "{a}.txt", "c d.txt", "*e*", "[", "[]]"),
]
# kind; the directory it is in and what a link leads to, counted among those there are; its name
NODES = st.lists(
    st.tuples(
        st.sampled_from(["file", "file", "directory", "directory", "link", "link", "dangling"]),
        st.integers(0, 30),
        st.integers(0, 30),
        st.sampled_from(NAMES),
        st.booleans(),
    ),
    min_size=5,
    max_size=18,
)
PATTERNS = st.lists(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map("/".join), min_size=1, max_size=3
)


def grow(top, nodes):
    """Makes a tree of files, directories and links, of which some lead up, around or nowhere."""
    directories, every = [top], [top]
    for kind, parent, target, name, relative in nodes:
        parent = directories[parent % len(directories)]
        path = os.path.join(parent, name)
        if os.path.lexists(path):
            continue
        if kind == "directory":
            os.mkdir(path)
            directories.append(path)
        elif kind == "file":
            with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(path)
        else:
            target = every[target % len(every)] if kind == "link" else os.path.join(top, "gone")
            os.symlink(
                os.path.relpath(target, os.path.realpath(parent)) if relative else target, path
            )
            if kind == "link" and os.path.isdir(path):
                directories.append(path)
        every.append(path)


def is_document(path):
    """A file, or a link that leads nowhere, which is to be reported."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def entries(directory):
    return [name for name in os.listdir(directory) if not name.startswith(".")]


def below(directory):
    """The real directories that can be reached from one."""
    found, waiting = {directory}, [directory]
    while waiting:
        here = waiting.pop()
        inner = {os.path.realpath(os.path.join(here, name)) for name in entries(here)}
        new = {path for path in inner if os.path.isdir(path)} - found
        found |= new
        waiting += new
    return found


def model_of_matches(directory, parts):
    """The real files that a pattern means, by sets: without an order, and without ways to them."""
    part, *rest = parts
    if part == "**":
        inner = (model_of_matches(each, rest or ["*"]) for each in below(directory))
        return set().union(*inner)
    names = [part]
    if glob.has_magic(part) and not os.path.lexists(os.path.join(directory, part)):
        candidates = os.listdir(directory) if part.startswith(".") else entries(directory)
        names = fnmatch.filter(candidates, part)
    found = set()
    for path in (os.path.join(directory, name) for name in names):
        if rest and os.path.isdir(path):
            found |= model_of_matches(os.path.realpath(path), rest)
        elif not rest and os.path.lexists(path) and is_document(path):
            found.add(os.path.realpath(path))
    return found


def meant(top, pattern):
    exact = os.path.join(top, pattern)
    if os.path.lexists(exact):
        return {os.path.realpath(exact)} - (
            {os.path.realpath(exact)} if os.path.isdir(exact) else set()
        )
    return model_of_matches(top, pattern.split("/"))


@sizes(250, 2000)
def test_patterns_give_each_real_file_once_however_they_are_typed(most, tmp_path, monkeypatch):
    counter = itertools.count()
    outcomes = {True: 0, False: 0}

    @holds_for(most, nodes=NODES, patterns=PATTERNS)
    def once(nodes, patterns):
        number = next(counter)
        top = os.path.realpath(tmp_path / f"{number} [x]")
        os.mkdir(top)
        grow(top, nodes)
        os.symlink(top, tmp_path / f"alias {number}")
        monkeypatch.chdir(top)
        monkeypatch.setenv("HOME", top)
        expected = [meant(top, pattern) for pattern in patterns]
        names = []
        outcomes[all(expected)] += 1
        for before in (top, ".", "~", f"{top}//.", f"../{number} [x]", f"../alias {number}"):
            path = " , ".join(f"{before}/{pattern}" for pattern in patterns)
            if not all(expected):
                with pytest.raises(ConfigError, match=r"(?s)data.path='.* (matches no|is a dir)"):
                    corpus_files(path)
                continue
            found = corpus_files(path)
            real = [os.path.realpath(file.path) for file in found]
            assert len(set(real)) == len(real)
            assert set(real) == set().union(*expected)
            assert not any(os.path.isdir(file.path) for file in found)
            names.append([file.name for file in found])
            assert names[-1] == sorted(set(names[-1]))
            names[-1] = list(zip(names[-1], real, strict=True))
        assert all(each == names[0] for each in names)

    assert min(outcomes.values()) > most / 10
