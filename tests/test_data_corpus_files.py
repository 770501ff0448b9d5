"""The files of a corpus: every pattern must match, and each file occurs once."""

import os
import tempfile
from pathlib import Path

import pytest

from retnet_jax.config import DataConfig
from retnet_jax.data.corpus_files import corpus_files
from retnet_jax.data.sources import Skipped, read_documents
from retnet_jax.errors import ConfigError


def make(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")


def names_of(patterns):
    return [file.name for file in corpus_files(str(patterns))]


def test_each_pattern_has_to_match(tmp_path):
    make(tmp_path, "a/1.txt", "b/2.txt")
    (tmp_path / "missing").mkdir()
    with pytest.raises(ConfigError, match=r"data\.path='.*': '.*/missing/\*\.txt' matches no file"):
        corpus_files(f"{tmp_path}/a/*.txt,{tmp_path}/missing/*.txt")
    with pytest.raises(ConfigError, match=r"matches no file"):
        corpus_files(f"{tmp_path}/missing.txt,{tmp_path}/a/*.txt")
    with pytest.raises(ConfigError, match=r"is a directory; give the files .* '.*/a/\*\*/\*"):
        corpus_files(f"{tmp_path}/a")
    with pytest.raises(ConfigError, match="matches no file"):
        corpus_files(" , ")


def test_spaces_around_commas_and_a_comma_at_the_end_are_nothing(tmp_path):
    make(tmp_path, "a/1.txt", "b/2.txt")
    assert names_of(f" {tmp_path}/a/*.txt, {tmp_path}/b/*.txt ,") == ["a/1.txt", "b/2.txt"]


def test_names_of_existing_files_are_not_patterns(tmp_path):
    make(tmp_path, "[clean]/1.txt", "[clean]/[2].txt", "c/3.txt", "what?.txt", "whats.txt", "2.txt")
    assert names_of(f"{tmp_path}/[clean]/*.txt") == ["1.txt", "[2].txt"]
    assert names_of(f"{tmp_path}/**/[clean]/*.txt") == ["1.txt", "[2].txt"]
    assert names_of(f"{tmp_path}/[clean]/[2].txt") == ["[2].txt"]
    assert names_of(f"{tmp_path}/what?.txt") == ["what?.txt"]
    assert names_of(f"{tmp_path}/[a-c]/*.txt") == ["3.txt"]


def test_names_with_commas_can_be_given(tmp_path):
    make(tmp_path, "one, two.txt", "x,y/3.txt", "x,y/4.txt", "5.txt")
    assert names_of(f"{tmp_path}/one, two.txt") == ["one, two.txt"]
    assert names_of(f"{tmp_path}/x,y/*.txt") == ["3.txt", "4.txt"]
    both = f"{tmp_path}/one, two.txt,{tmp_path}/x,y/*.txt,{tmp_path}/5.txt"
    assert names_of(both) == ["5.txt", "one, two.txt", "x,y/3.txt", "x,y/4.txt"]


def test_a_loop_of_links_gives_each_file_once(tmp_path):
    make(tmp_path, "corpus/sub/1.txt", "corpus/2.txt", "elsewhere/3.txt", "elsewhere/deep/4.txt")
    corpus = tmp_path / "corpus"
    (corpus / "a_loop").symlink_to(corpus)
    (corpus / "sub" / "loop").symlink_to(corpus)
    (corpus / "alias.txt").symlink_to(corpus / "2.txt")
    (corpus / "other").symlink_to(tmp_path / "elsewhere")
    expected = ["2.txt", "other/3.txt", "other/deep/4.txt", "sub/1.txt"]
    assert names_of(corpus / "**/*.txt") == expected
    assert names_of(f"{corpus}/**/*.txt,{corpus}/a_loop/*.txt,{corpus}/*.txt") == expected
    assert names_of(corpus / "**") == expected
    assert names_of(corpus / "alias.txt") == ["alias.txt"]


def test_dots_at_the_beginning_are_not_matched(tmp_path):
    make(tmp_path, ".hidden/1.txt", "a/.2.txt", "a/3.txt")
    assert names_of(tmp_path / "**/*.txt") == ["3.txt"]
    assert names_of(tmp_path / "a/.*") == [".2.txt"]
    assert names_of(tmp_path / ".hidden/*") == ["1.txt"]


def test_names_do_not_depend_on_how_the_path_was_typed(tmp_path, monkeypatch):
    make(tmp_path, "corpus/1.txt", "corpus/sub/2.txt", "home/x.txt")
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["1.txt", "sub/2.txt"]
    for typed in (
        "corpus/**/*.txt",
        "./corpus/**/*.txt",
        "corpus/../corpus//**/*",
        f"{tmp_path}/corpus/**/*.txt",
        "~/corpus/**/*.txt",
        "corpus/1.txt,~/corpus/*/2.txt",
        "link/**",
    ):
        assert names_of(typed) == names
    monkeypatch.chdir(tmp_path / "corpus")
    assert names_of("**") == names
    assert names_of("../corpus/sub/2.txt") == ["2.txt"]
    config = DataConfig(source="text", path="1.txt")
    assert [x.name for x in read_documents(config, Skipped())] == ["1.txt"]


def test_a_link_to_the_corpus_changes_no_name_of_what_links_in_it_lead_to(tmp_path):
    """A file is named by its real path, even if a path through a link is shorter."""
    make(tmp_path, "corpus/a/deep/1.txt", "corpus/2.txt")
    (tmp_path / "corpus" / "l").symlink_to(tmp_path / "corpus/a/deep")
    (tmp_path / "alias").symlink_to(tmp_path / "corpus")
    for typed in ("corpus", "alias"):
        path = f"{tmp_path}/{typed}/l/*,{tmp_path}/{typed}/**"
        assert names_of(path) == ["2.txt", "a/deep/1.txt"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file whose reading fails")
def test_files_that_cannot_be_read_are_counted_and_named(tmp_path):
    make(tmp_path, "good.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "torn.txt").symlink_to("/proc/self/mem")  # EIO at its first byte
    (tmp_path / "torn.jsonl").symlink_to("/proc/self/mem")
    for source in ("text", "jsonl"):
        skipped = Skipped()
        pattern = f"{tmp_path}/*.txt,{tmp_path}/torn.jsonl" if source == "text" else tmp_path / "t*"
        found = list(read_documents(DataConfig(source=source, path=str(pattern)), skipped))
        if source == "text":
            assert [x.name for x in found] == ["good.txt"]
            assert skipped.first[0].startswith(f"{tmp_path}/gone.txt: cannot be opened: FileNotFo")
        assert any("torn" in line and "unreadable: OSError" in line for line in skipped.first)


def test_a_directory_that_cannot_be_listed_is_counted_and_named():
    # Root reads everything, and what belongs to root under /tmp/pytest-of-root is not for others.
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), "open/1.txt", "closed/2.txt")
        Path(name).chmod(0o755)
        (Path(name) / "closed").chmod(0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            skipped = Skipped()
            config = DataConfig(source="text", path=f"{name}/**/*.txt")
            found = list(read_documents(config, skipped))
        finally:
            os.seteuid(before)
            (Path(name) / "closed").chmod(0o755)
    assert [x.text for x in found] == ["text of open/1.txt"]
    (line,) = skipped.first
    assert line.startswith(f"{name}/closed: cannot be opened: PermissionError")
