"""Formats of corpora: compression, parquet, and data sets; damage costs only what is damaged."""

import bz2
import gzip
import json
import lzma
import sys
import types

import pytest
from corpora import compressed, read, write_parquet

from retnet_jax.config import DataConfig
from retnet_jax.data.sources import Document, Skipped, list_pieces, read_piece
from retnet_jax.errors import ConfigError


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
def test_binary_files_are_named_by_their_format(data, reason, source, tmp_path):
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


def test_only_strings_and_integers_are_used_as_ids(tmp_path):
    """Python cannot represent a time in the year 30,000, and without pandas no nanoseconds."""
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


def test_a_data_set_of_tfds(monkeypatch):
    """A source with the two methods of a tfds source."""

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
    """A directory as on the hub, with gzipped files as in C4."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    for number in range(3):
        lines = [json.dumps({"text": f"{number}.{i} é", "url": f"u{i}"}) for i in range(4)]
        data = "\n".join(lines).encode()
        (tmp_path / "c4" / f"train-{number:05}-of-00003.json.gz").write_bytes(gzip.compress(data))
    config = DataConfig(source="hf", path=f"{tmp_path}/c4:train", id_field="url")
    pieces = list_pieces(config)
    assert len(pieces) in (1, 3)  # three if the library can read shards separately
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
