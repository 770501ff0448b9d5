"""Sources: the same documents in the same order; what is left out has a name and a reason."""

import json
import sysconfig
from pathlib import Path

import pytest

from retnet_jax.config import ConfigError
from retnet_jax.data.sources import Document, read_documents


def read(source, path="", text_field="text"):
    skipped = []
    return list(read_documents(source, str(path), text_field, skipped)), skipped


def test_text_is_one_document_a_file_sorted_by_path(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, data in {
        "b.txt": b"two",
        "a.txt": b"one\r\n",
        "sub/c.txt": "drei é".encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "other.md").write_text("not matched")
    documents, skipped = read("text", tmp_path / "**" / "*.txt")
    assert documents == [
        Document(f"{tmp_path}/a.txt", "one\r\n"),
        Document(f"{tmp_path}/b.txt", "two"),
        Document(f"{tmp_path}/sub/c.txt", "drei é"),
    ]
    assert documents[2].byte_count == 7
    assert skipped == []


def test_text_that_is_empty_or_not_utf8_is_named(tmp_path):
    (tmp_path / "blank.txt").write_bytes(b" \n")
    (tmp_path / "good.txt").write_bytes(b"good")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    documents, skipped = read("text", tmp_path / "*.txt")
    assert documents == [Document(f"{tmp_path}/good.txt", "good")]
    assert skipped[0] == f"{tmp_path}/blank.txt: empty"
    assert skipped[1].startswith(f"{tmp_path}/latin1.txt: 'utf-8' codec can't decode byte 0xe9")
    assert len(skipped) == 2


def test_glob_that_matches_nothing_names_the_field_and_the_pattern(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path='.*/\*\.nothing' matches no file"):
        read("text", tmp_path / "*.nothing")


def test_unknown_source_is_named():
    with pytest.raises(ConfigError, match=r"data\.source='web' is not one of 'stdlib'"):
        read("web")


def test_jsonl_names_by_id_or_line_and_reports_each_bad_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [
        b'{"body": "first"}',
        b'{"body": "second", "id": "abc"}',
        b'{"body": "third", "id": 7}',
        b'{"body": "fourth", "id": true}',
        b'{"text": "another field"}',
        b'{"body": 3}',
        b"{broken",
        b'["a list"]',
        b'{"body": ""}',
        b'{"body": "\xff"}',
        rb'{"body": "half a pair \ud800"}',
        b"",
        rb'{"body": "a pair \ud83d\ude00"}',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, skipped = read("jsonl", path, text_field="body")
    assert documents == [
        Document(f"{path}:1", "first"),
        Document(f"{path}:abc", "second"),
        Document(f"{path}:7", "third"),
        Document(f"{path}:4", "fourth"),
        Document(f"{path}:13", "a pair 😀"),
    ]
    reasons = [
        (5, "no field 'body' among 'text'"),
        (6, "field 'body' is int, not a string"),
        (7, "invalid JSON: "),
        (8, "a JSON list, not an object"),
        (9, "empty"),
        (10, "'utf-8' codec can't decode"),
        (11, "'utf-8' codec can't encode"),
        (12, "invalid JSON: "),
    ]
    assert len(skipped) == len(reasons)
    for line, (number, reason) in zip(skipped, reasons, strict=True):
        assert line.startswith(f"{path}:{number}: {reason}")


def test_jsonl_keeps_line_ends_inside_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "one\r\ntwo\u2028three\n"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read("jsonl", path)[0] == [Document(f"{path}:1", text)]


def test_stdlib_leaves_out_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for name in ("b.py", "a/z.py", "site-packages/x.py", "a/__pycache__/y.py", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    assert read("stdlib") == ([Document("a/z.py", "# a/z.py"), Document("b.py", "# b.py")], [])


def test_stdlib_of_this_interpreter():
    documents, _ = read("stdlib")
    texts = {document.name: document.text for document in documents}
    assert len(texts) == len(documents)
    assert list(texts) == sorted(texts)
    assert texts["json/__init__.py"].encode() == Path(json.__file__).read_bytes()
    assert not any("site-packages" in name for name in texts)
