"""Sources: the same documents in the same order; what is left out has a name and a reason."""

import bz2
import gzip
import io
import json
import lzma
import sys
import types
from pathlib import Path

import pytest

from retnet_jax.config import DataConfig
from retnet_jax.data import sources
from retnet_jax.data.sources import Document, Skipped, list_pieces, read_documents, read_piece
from retnet_jax.errors import ConfigError


def read(source, path="", **options):
    skipped = Skipped()
    config = DataConfig(source=source, path=str(path), **options)
    return list(read_documents(config, skipped)), skipped


def compressed(path, data):
    """The data as the end of the file's name says."""
    if path.name.endswith(".gz"):
        return gzip.compress(data)
    if path.name.endswith(".zst"):
        # Two frames, as tools that compress in parallel write them.
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2
        compress = zstandard.ZstdCompressor().compress
        return compress(data[:half]) + compress(data[half:])
    return data


def write_parquet(path, rows, row_group_size):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(rows), path, row_group_size=row_group_size)


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


def test_a_wrong_field_names_those_that_there_are(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"content": "x", "url": "u"}], 5)
    assert read("parquet", path)[1].first == [f"{path}:0: no field 'text': among 'content', 'url'"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": null}\n{}')
    assert read("jsonl", lines)[1].first == [
        f"{lines}:1: field 'text' is null",
        f"{lines}:2: no field 'text': no fields at all",
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_a_value_that_is_not_utf8_costs_its_row(nested, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [b"good %d" % number for number in range(600)]
    values[300] = b"bad \xff"
    texts = pyarrow.array(values).view(pyarrow.string())
    if nested:
        texts = pyarrow.StructArray.from_arrays([texts], ["body"])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path)
    documents, skipped = read("parquet", path, text_field="text.body" if nested else "text")
    assert [x.text for x in documents] == [f"good {n}" for n in range(600) if n != 300]
    (line,) = skipped.first
    assert line.startswith(f"{path}:300: invalid UTF-8: ")


def test_damaged_row_groups_cost_their_rows(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"text": f"{number} " + "x" * 50} for number in range(90)]
    write_parquet(path, rows, 30)
    metadata = pytest.importorskip("pyarrow.parquet").ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    column = metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    documents, skipped = read("parquet", path)
    assert [x.name for x in documents] == [f"a.parquet:{n}" for n in (*range(30), *range(60, 90))]
    assert skipped.reasons == {"unreadable": 30}
    assert skipped.first[0].startswith(f"{path}:30: unreadable: OSError: ")


def test_an_id_that_is_no_string_or_integer_is_not_used(tmp_path):
    """Python has no time in the year 30,000; without pandas it has none in nanoseconds either."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = pyarrow.array([9 * 10**17, 10**15], pyarrow.timestamp("us"))
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": times}), path)
    documents, skipped = read("parquet", path)
    assert documents == [Document("a.parquet:0", "one"), Document("a.parquet:1", "two")]
    assert skipped.count == 0
    assert read("parquet", path, text_field="id")[1].reasons == {
        "cannot be converted from timestamp[us]": 1,
        "field 'id' is datetime, not a string": 1,
    }


def compressed_as(kind, data):
    if kind == "gzip":
        return gzip.compress(data[:9]) + gzip.compress(data[9:])
    if kind == "bzip2":
        return bz2.compress(data[:9]) + bz2.compress(data[9:])
    if kind == "xz":
        return lzma.compress(data[:9]) + lzma.compress(data[9:])
    zstandard = pytest.importorskip("zstandard")
    if kind == "zstd":
        return b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.ZstdCompressor().compress(data)
    # As `zstd --long=31` and the dumps of Reddit: a window of 2 GB, in a frame of unknown size.
    options = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, hash_log=10)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd", "zstd --long=31"])
@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.GZ", "corpus.zst"])
def test_compression_is_known_by_the_first_bytes(kind, name, tmp_path):
    path = tmp_path / name
    data = b'{"text": "one"}\n{"text": "two"}\n'
    path.write_bytes(compressed_as(kind, data))
    documents, skipped = read("jsonl", path, strict=True)
    assert [x.text for x in documents] == ["one", "two"]
    assert read("text", path)[0] == [Document(name, data.decode())]
    assert read("text", path, max_document_bytes=len(data) - 1)[1].reasons == {"too long": 1}
    config = DataConfig(source="jsonl", path=str(path))
    assert len(list_pieces(config, piece_bytes=1)) == 1
    path.write_bytes(path.read_bytes()[:-12])
    skipped = read("jsonl", path)[1]
    assert skipped.reasons == {"the rest of the file is unreadable": 1}
    path.write_bytes(data)  # not compressed, whatever its name
    assert [x.text for x in read("jsonl", path)[0]] == ["one", "two"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04\x14\0\0\0", "is a zip archive, not UTF-8 text"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8 text"),
        (b"PAR1\x15\x04\x15", "is a parquet file, not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_what_is_no_text_is_named_as_what_it_is(data, reason, source, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(data + bytes(range(256)))
    assert read(source, tmp_path / "a.jsonl")[1].first == [f"{tmp_path}/a.jsonl: {reason}"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named_and_the_next_is_read(name, tmp_path):
    rows = [{"text": f"document {number} " + "x" * 50} for number in range(3000)]
    path, other = tmp_path / name, tmp_path / ("b" + name[1:])
    source = "parquet" if name.endswith("parquet") else "jsonl"
    for file, some in ((path, rows), (other, [{"text": "good"}])):
        if source == "parquet":
            write_parquet(file, some, 100)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in some)
            file.write_bytes(compressed(file, lines.encode()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    documents, skipped = read(source, f"{path},{other}")
    assert documents[-1].text == "good"
    assert len(documents) < 3000
    (line,) = skipped.first
    assert line.startswith(f"{path}: the rest of the file is unreadable: ")


def test_parquet_as_the_stack_has_it(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [
        {
            "content": f"print({number})",
            "ext": ["py", "rs", "PY"][number % 3],
            "lang": ["Python", "Rust"][number % 2],
            "max_stars_repo_licenses": [["MIT"], ["GPL-3.0", "mit"], ["GPL-3.0"]][number % 3],
            "hexsha": f"{number:02}",
            "unused": "x",
        }
        for number in range(12)
    ]
    rows[4]["content"] = None
    write_parquet(path, rows, 5)
    options = {"text_field": "content", "id_field": "hexsha"}
    documents, skipped = read("parquet", path, **options)
    assert [x.name for x in documents] == [f"data.parquet:{n:02}" for n in range(12) if n != 4]
    assert skipped.as_dict()["reasons"] == {"field 'content' is null": 1}
    config = DataConfig(source="parquet", path=str(path), **options)
    pieces = list_pieces(config, piece_bytes=1)
    assert [(x.start, x.stop, x.first) for x in pieces] == [(0, 1, 0), (1, 2, 5), (2, 3, 10)]
    assert [x for piece in pieces for x in read_piece(config, piece, Skipped())] == documents

    documents, skipped = read(
        "parquet",
        path,
        **options,
        extensions=("py",),
        licenses=("mit",),
        license_field="max_stars_repo_licenses",
    )
    assert [x.text for x in documents] == ["print(0)", "print(3)", "print(6)", "print(9)"]
    reasons = {"filtered: extensions": 4, "filtered: licenses": 4}
    assert skipped.as_dict()["reasons"] == reasons
    documents, skipped = read("parquet", path, **options, languages=("rust",), min_bytes=9)
    assert [x.text for x in documents] == ["print(11)"]
    assert skipped.reasons["filtered: min_bytes"] == 5 - (4 % 2 == 1)


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
def test_remote_files_without_what_reads_them(scheme, monkeypatch):
    for package in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{scheme}://bucket/.* cannot be read: "):
        read("jsonl", f"{scheme}://bucket/*.jsonl")


def test_a_data_set_of_tfds(monkeypatch):
    """A source with the two methods that tfds's have."""

    class Examples:
        def __len__(self):
            return 25_000

        def __getitem__(self, number):
            return {"text": f"text {number}".encode(), "label": 1}

    def data_source(name, split):
        assert (name, split) == ("c4/en", "train")
        return Examples()

    fake = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    config = DataConfig(source="tfds", path="c4/en:train")
    assert [(x.start, x.stop) for x in list_pieces(config)][-1] == (20_000, 25_000)
    documents, skipped = read("tfds", "c4/en:train")
    assert len(documents) == 25_000
    assert documents[-1] == Document("c4/en:train:24999", "text 24999")
    assert skipped.count == 0
    with pytest.raises(ConfigError, match="does not name a data set and a split"):
        read("tfds", "c4")


def test_a_data_set_of_hugging_face(monkeypatch):
    class Stream:
        num_shards = 3

        def __init__(self, examples):
            self.examples = examples

        def shard(self, num_shards, index):
            return Stream(self.examples[index::num_shards])

        def __iter__(self):
            return iter(self.examples)

    def load_dataset(name, *config, split, streaming):
        assert (name, config, split, streaming) == ("allenai/c4", ("en",), "train", True)
        return Stream([{"text": str(number), "url": "u"} for number in range(7)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    documents, _ = read("hf", "allenai/c4:en:train")
    assert [x.text for x in documents] == ["0", "3", "6", "1", "4", "2", "5"]
    assert documents[3].name == "allenai/c4:en:train:1:0"


def test_a_prepared_data_set_of_tfds(tmp_path, monkeypatch):
    """Written and read by the library, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((number, {"text": f"größer {number}"}) for number in range(30))

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    del Tiny
    for path, count in (("tiny:train", 30), ("tiny:1.0.0:train", 30), ("tiny:train[5:12]", 7)):
        documents, skipped = read("tfds", path)
        assert [x.name for x in documents] == [f"{path}:{number}" for number in range(count)]
        assert {x.text for x in documents} <= {f"größer {number}" for number in range(30)}
        assert len({x.text for x in documents}) == count
        assert skipped.count == 0
    assert "tensorflow" not in sys.modules
    with pytest.raises(ConfigError, match="'none/such:train' cannot be opened"):
        read("tfds", "none/such:train")


def test_a_streamed_data_set_of_hugging_face(tmp_path, monkeypatch):
    """A directory as on the hub, its files gzipped as C4's are."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    for number in range(3):
        lines = [json.dumps({"text": f"{number}.{i} é", "url": f"u{i}"}) for i in range(4)]
        data = "\n".join(lines).encode()
        (tmp_path / "c4" / f"train-{number:05}-of-00003.json.gz").write_bytes(gzip.compress(data))
    config = DataConfig(source="hf", path=f"{tmp_path}/c4:train", id_field="url")
    pieces = list_pieces(config)
    assert len(pieces) in (1, 3)  # shards are read apart where the library can
    documents = [x for piece in pieces for x in read_piece(config, piece, Skipped())]
    assert [x.text for x in documents] == [f"{n}.{i} é" for n in range(3) for i in range(4)]
    assert documents[5].name == f"{tmp_path}/c4:train:u1"
    with pytest.raises(ConfigError, match="nothing:train' cannot be opened"):
        read("hf", f"{tmp_path}/nothing:train")


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    (tmp_path / "a.jsonl.zst").touch()
    for module, source, path, package in (
        ("tensorflow_datasets", "tfds", "c4/en:train", "tensorflow-datasets"),
        ("datasets", "hf", "allenai/c4:en:train", "datasets"),
        ("zstandard", "jsonl", tmp_path / "a.jsonl.zst", "zstandard"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            read(source, path)


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
