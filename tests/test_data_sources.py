"""Sources: the same documents in the same order; skipped documents have a name and a reason."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from corpora import compressed, read, write_parquet

from retnet_jax.config import DataConfig
from retnet_jax.data import sources
from retnet_jax.data.sources import Document, Skipped, list_pieces, read_documents, read_piece
from retnet_jax.errors import ConfigError


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
        Document("a.txt", "one\r\n"),
        Document("b.txt", "two"),
        Document("sub/c.txt", "drei é"),
    ]
    assert documents[2].byte_count == 7
    assert skipped.count == 0
    assert read("text", f"{tmp_path}/a.txt,{tmp_path}/b*")[0] == documents[:2]


def test_text_that_is_empty_or_not_utf8_is_named(tmp_path):
    (tmp_path / "blank.txt").write_bytes(b" \n")
    (tmp_path / "good.txt").write_bytes(b"good")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "long.txt").write_bytes(b"x" * 100)
    documents, skipped = read("text", tmp_path / "*.txt", max_document_bytes=99)
    assert documents == [Document("good.txt", "good")]
    assert skipped.first[0] == f"{tmp_path}/blank.txt: empty"
    assert skipped.first[1].startswith(f"{tmp_path}/latin1.txt: invalid UTF-8: 'utf-8' codec")
    assert skipped.first[2] == f"{tmp_path}/long.txt: too long: 100 bytes"
    assert skipped.as_dict()["reasons"] == {"empty": 1, "invalid UTF-8": 1, "too long": 1}


def test_glob_that_matches_nothing_names_the_field_and_the_pattern(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path='.*/\*\.nothing' matches no file"):
        read("text", tmp_path / "*.nothing")


LINES = [
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
PROBLEMS = [
    (5, "no field 'body': among 'text'"),
    (6, "field 'body' is int, not a string"),
    (7, "invalid JSON: "),
    (8, "a JSON list, not an object"),
    (9, "empty"),
    (10, "invalid UTF-8: "),
    (11, "half a surrogate pair"),
]  # and line 12 is blank


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "a.jsonl.zst", "c4.json.gz"])
def test_jsonl_names_by_id_or_line_and_reports_each_bad_line(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(compressed(path, b"\n".join(LINES)))
    documents, skipped = read("jsonl", path, text_field="body")
    assert documents == [
        Document(f"{name}:1", "first"),
        Document(f"{name}:abc", "second"),
        Document(f"{name}:7", "third"),
        Document(f"{name}:4", "fourth"),
        Document(f"{name}:13", "a pair 😀"),
    ]
    assert skipped.count == len(PROBLEMS)
    for line, (number, reason) in zip(skipped.first, PROBLEMS, strict=True):
        assert line.startswith(f"{path}:{number}: {reason}")
    with pytest.raises(ConfigError, match=r"corpus.*:5: no field 'body'|:5: no field 'body'"):
        read("jsonl", path, text_field="body", strict=True)


@pytest.mark.parametrize("size", [1, 20, 60, 150, 10_000])
def test_pieces_of_a_file_are_the_file(size, tmp_path, monkeypatch):
    from retnet_jax.data import formats

    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(LINES * 3) + b"\n")
    config = DataConfig(source="jsonl", path=str(path), text_field="body")
    whole = Skipped()
    expected = list(read_documents(config, whole))

    class Blocks(io.BytesIO):
        """Blocks of 16 bytes, so that cuts fall anywhere."""

        def read(self, _=-1):
            return super().read(16)

    with monkeypatch.context() as patch:
        patch.setattr(formats.files, "open_binary", lambda path: Blocks(Path(path).read_bytes()))
        pieces = list_pieces(config, piece_bytes=size)
    assert (len(pieces) > 1) == (size < 10_000)
    assert sum(piece.bytes for piece in pieces) == path.stat().st_size
    skipped = Skipped()
    found = [x for piece in pieces for x in read_piece(config, piece, skipped)]
    assert found == expected
    assert skipped == whole


def test_lines_that_are_too_long_are_not_held(tmp_path):
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 100_000})
    path.write_text('{"text": "one"}\n' + long + "\n" + '{"text": "two"}\n' + long)
    documents, skipped = read("jsonl", path, max_document_bytes=1000)
    assert [document.text for document in documents] == ["one", "two"]
    assert skipped.first == [
        f"{path}:{n}: too long: {len(long) + e:,} bytes" for n, e in ((2, 1), (4, 0))
    ]
    assert read("jsonl", path)[1].count == 0


def test_jsonl_keeps_line_ends_inside_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "one\r\ntwo\u2028three\n"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read("jsonl", path)[0] == [Document("a.jsonl:1", text)]


MARK = "\ufeff"


def test_a_byte_order_mark_is_no_content(tmp_path):
    lines = [
        f'{MARK}{{"text": "one"}}',
        '{"text": "two"}',
        f'{MARK}{{"text": "{MARK}three"}}',
        MARK,
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    documents, skipped = read("jsonl", tmp_path / "a.jsonl", strict=True)
    assert [x.text for x in documents] == ["one", "two", "three"]
    assert skipped.count == 0

    for name, text in {
        "1.txt": f"{MARK}first\nsecond",
        "2.txt": "first\nsecond",
        "3.txt": f"one\r\n{MARK}joined\n{MARK}{MARK}a word{MARK}joiner",
        "4.txt": MARK,
    }.items():
        (tmp_path / name).write_bytes(text.encode())
    documents, skipped = read("text", tmp_path / "*.txt")
    assert documents[0].text == documents[1].text == "first\nsecond"
    assert documents[0].byte_count == 12
    assert documents[2].text == f"one\r\njoined\na word{MARK}joiner"
    assert skipped.first == [f"{tmp_path}/4.txt: empty"]


def test_blank_lines_are_no_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "one"}\n \r\n\n{"text": "two"}\n\n\n')
    documents, skipped = read("jsonl", path, strict=True)
    assert documents == [Document("a.jsonl:2", "one"), Document("a.jsonl:5", "two")]
    assert skipped.count == 0


def test_a_column_whose_name_has_a_dot(tmp_path):
    flat, nested = tmp_path / "flat.parquet", tmp_path / "nested.parquet"
    write_parquet(flat, [{"meta.text": "flat", "meta": {"text": "inside", "n": 5}}], 5)
    write_parquet(nested, [{"meta": {"text": "inside", "n": 5}}, {"meta": None}], 5)
    options = {"text_field": "meta.text", "id_field": "meta.n"}
    assert read("parquet", flat, **options)[0] == [Document("flat.parquet:5", "flat")]
    documents, skipped = read("parquet", nested, **options)
    assert documents == [Document("nested.parquet:5", "inside")]
    assert skipped.first == [f"{nested}:1: no field 'meta.text': among 'meta'"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"meta.text": "flat", "meta": {"text": "inside"}}\n{"a.b": {"c": "deep"}}')
    assert read("jsonl", lines, text_field="meta.text")[0] == [Document("a.jsonl:1", "flat")]
    assert read("jsonl", lines, text_field="a.b.c")[0] == [Document("a.jsonl:2", "deep")]


def test_an_error_for_a_wrong_field_names_the_existing_fields(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"content": "x", "url": "u"}], 5)
    assert read("parquet", path)[1].first == [f"{path}:0: no field 'text': among 'content', 'url'"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": null}\n{}')
    assert read("jsonl", lines)[1].first == [
        f"{lines}:1: field 'text' is null",
        f"{lines}:2: no field 'text': no fields at all",
    ]


def test_fields_inside_fields(tmp_path):
    path = tmp_path / "pile.jsonl"
    rows = [{"meta": {"pile_set_name": name, "n": i}, "text": name} for i, name in enumerate("ab")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, _ = read(
        "jsonl", path, languages=("b",), language_field="meta.pile_set_name", id_field="meta.n"
    )
    assert documents == [Document("pile.jsonl:1", "b")]


def test_remote_files():
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("a", "b"):
        system.pipe(f"/corpus/{name}.jsonl.gz", gzip.compress(b'{"text": "%s"}' % name.encode()))
    documents, skipped = read("jsonl", "memory://corpus/*.jsonl.gz")
    assert [x.text for x in documents] == ["a", "b"]
    assert documents[0].name == "a.jsonl.gz:1"
    assert skipped.count == 0


@pytest.mark.parametrize("scheme", ["gs", "s3", "nothing"])
def test_remote_files_without_the_package_that_reads_them(scheme, monkeypatch):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{scheme}://bucket/.* cannot be read: "):
        read("jsonl", f"{scheme}://bucket/*.jsonl")


def test_stdlib_leaves_out_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_stdlib_root", lambda: tmp_path)
    for name in ("b.py", "a/z.py", "site-packages/x.py", "a/__pycache__/y.py", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    documents, _ = read("stdlib")
    assert documents == [Document("a/z.py", "# a/z.py"), Document("b.py", "# b.py")]


def test_stdlib_of_this_interpreter():
    documents, _ = read("stdlib")
    texts = {document.name: document.text for document in documents}
    assert len(texts) == len(documents)
    assert list(texts) == sorted(texts)
    assert texts["json/__init__.py"].encode() == Path(json.__file__).read_bytes()
    assert not any("site-packages" in name for name in texts)
