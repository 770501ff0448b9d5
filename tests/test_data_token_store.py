"""The token store: what goes in comes out, split by name; nothing half-written is ever opened."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet_jax.config import DataConfig
from retnet_jax.data import BatchStream, bpe_sample, shard_writer, stores
from retnet_jax.data import build as store_builder
from retnet_jax.data.bpe_sample import Sample
from retnet_jax.data.build import build_store
from retnet_jax.data.sources import Document
from retnet_jax.data.split import is_held_out
from retnet_jax.data.store_problems import check_files
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.token_store import open_store
from retnet_jax.data.tokenizers import ByteTokenizer, train_bpe
from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic
from retnet_jax.programs import command_line

TEXTS = {f"{i}.txt": f"document {i} says {'na ' * (i % 7)}é\r\n" for i in range(40)}


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in TEXTS.items():
        (corpus / name).write_bytes(text.encode())
    (corpus / "empty.txt").touch()
    return DataConfig(
        source="text",
        path=str(corpus / "*.txt"),
        tokenizer="byte",
        store=str(tmp_path / "deep" / "store"),
        held_out=0.2,
    )


def texts_of(store, split):
    return {
        name.rpartition("/")[2]: store.tokenizer.decode(split.document(i))
        for i, name in enumerate(split.names)
    }


def tokens_of(split):
    return split.read(0, split.token_count)


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("byte", 257), ("bpe", 280)])
def test_every_document_is_in_one_split_and_comes_back(config, tokenizer, vocab_size):
    config.tokenizer = tokenizer
    store = open_or_build(config, vocab_size)
    train, held_out = texts_of(store, store.train), texts_of(store, store.held_out)
    assert train | held_out == TEXTS
    assert not train.keys() & held_out.keys()
    assert store.tokenizer.vocab_size == vocab_size
    for split, texts in ((store.train, train), (store.held_out, held_out)):
        assert len(split) == len(texts)
        assert all(is_held_out(n, 0.2) == (split is store.held_out) for n in split.names)
        assert list(split.byte_counts) == [len(text.encode()) for text in texts.values()]
        assert all(split.document(i)[0] == store.tokenizer.bos_id for i in range(len(split)))
        assert np.count_nonzero(tokens_of(split) == store.tokenizer.bos_id) == len(split)


def test_manifest_says_what_is_there(config):
    store = build_store(config, 0)
    for name, split in (("train", store.train), ("held_out", store.held_out)):
        assert store.manifest["splits"][name] == {
            "documents": len(split),
            "tokens": split.token_count,
            "bytes": split.byte_counts.sum(),
        }
        assert split.token_count == split.byte_counts.sum() + len(split)
    empty = config.path.replace("*", "empty")
    assert store.manifest["skipped"] == {
        "count": 1,
        "reasons": {"empty": 1},
        "first": [f"{empty}: empty"],
    }
    assert store.manifest["duplicates"] == 0
    sources = {Path(x["path"]).name: x for x in store.manifest["sources"]}
    assert sources.keys() == TEXTS.keys() | {"empty.txt"}
    for name, text in TEXTS.items():
        assert sources[name]["bytes"] == len(text.encode())
        assert sources[name]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_bpe_sees_training_documents_alone(config, monkeypatch):
    seen = []

    def record(texts, vocab_size):
        seen.extend(texts)
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(store_builder, "train_bpe", record)
    config.tokenizer = "bpe"
    store = build_store(config, 280)
    assert sorted(seen) == sorted(texts_of(store, store.train).values())


def test_bpe_sample_is_bounded_and_does_not_depend_on_order(monkeypatch):
    monkeypatch.setattr(bpe_sample, "_CHARACTERS", 200)
    samples = []
    for names in (list(TEXTS), list(TEXTS)[::-1]):
        sample, halves = Sample(), [Sample() for _ in range(2)]
        for number, name in enumerate(names):
            sample.add(Document(name, TEXTS[name]))
            halves[number % 2].add(Document(name, TEXTS[name]))
        merged = Sample()
        for half in halves:
            for item in half.items():
                merged.push(*item)
        samples += [sample.items(), merged.items()]
    assert all(sample == samples[0] for sample in samples)
    total = sum(len(text) for _, _, text in samples[0])
    assert 200 <= total < 200 + len(max(TEXTS.values(), key=len))


def test_batching_changes_nothing(config, monkeypatch):
    whole = build_store(config, 0)
    config.store += "_again"
    monkeypatch.setattr(shard_writer, "_BATCH_CHARACTERS", 50)
    pieces = build_store(config, 0)
    for one, other in ((whole.train, pieces.train), (whole.held_out, pieces.held_out)):
        np.testing.assert_array_equal(tokens_of(one), tokens_of(other))
        np.testing.assert_array_equal(one.lengths, other.lengths)
        assert one.names == other.names
    assert whole.manifest == pieces.manifest


def test_large_vocabularies_take_four_bytes(config, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**16 + 1)
    store = build_store(config, 0)
    assert tokens_of(store.train).dtype == np.uint32
    assert texts_of(store, store.train) | texts_of(store, store.held_out) == TEXTS


@given(name=st.text(st.characters()), share=st.floats(0, 1), more=st.floats(0, 1))
def test_held_out_is_a_function_of_the_name_and_grows_with_the_share(name, share, more):
    assert is_held_out(name, share) <= is_held_out(name, max(share, more))
    assert is_held_out(name, 1)
    assert not is_held_out(name, 0)


def test_held_out_share_is_the_share():
    held_out = sum(is_held_out(f"document {i}", 0.1) for i in range(10_000))
    assert abs(held_out - 1000) < 5 * (10_000 * 0.1 * 0.9) ** 0.5


def test_names_with_line_ends_and_quotes_come_back(config, tmp_path):
    odd = {"new\nline.txt": "one", 'a "quote" é.txt': "two"}
    for name, text in odd.items():
        (tmp_path / "corpus" / name).write_text(text)
    store = build_store(config, 0)
    assert texts_of(store, store.train) | texts_of(store, store.held_out) == TEXTS | odd


def test_second_time_opens_and_does_not_build(config, monkeypatch):
    first = open_or_build(config, 257)
    monkeypatch.setattr(stores, "build_or_wait", None)
    second = open_or_build(config, 257)
    np.testing.assert_array_equal(tokens_of(first.train), tokens_of(second.train))
    assert second.manifest == first.manifest


def test_a_store_with_other_options_is_not_used(config):
    open_or_build(config, 257)
    config.held_out, config.tokenizer = 0.3, "bpe"
    with pytest.raises(ConfigError, match="built with other options") as error:
        open_or_build(config, 300, command_line.prepare_command())
    message = str(error.value)
    assert "data.held_out: 0.2 in the store, 0.3 asked for" in message
    assert "data.tokenizer: 'byte' in the store, 'bpe' asked for" in message
    assert "model.vocab_size: None in the store, 300 asked for" in message
    assert "data.path" not in message
    assert "give another directory in data.store, or delete" in message
    assert "build it again with: python tools/prepare_data.py" in message


@pytest.mark.parametrize(("built", "slip"), [("byte", "bite"), ("bpe", "bep")])
def test_a_slip_in_the_tokenizers_name_is_not_the_stores(config, built, slip):
    config.tokenizer = built
    open_or_build(config, 260)
    config.tokenizer = slip
    with pytest.raises(ConfigError, match=rf"data.tokenizer='{slip}' is not one of 'byte', 'bpe'"):
        open_or_build(config, 260)


def test_options_that_are_not_read_make_no_difference(config):
    open_or_build(config, 257)
    config.windows, config.sequence_length = "contiguous", 7
    assert open_or_build(config, 512).tokenizer.vocab_size == 257


def test_model_vocabulary_must_hold_the_tokenizers(config):
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is less than the 257 tokens"):
        open_or_build(config, 256)


def test_building_over_a_store_is_refused(config):
    build_store(config, 0)
    with pytest.raises(ConfigError, match=r"data\.store=.* exists already"):
        build_store(config, 0)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "tokenizer.json",
        "shards/00000/train.tokens.npy",
        "shards/00000/held_out.names.jsonl",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut short", "other"])
def test_a_damaged_store_is_not_opened(config, name, damage):
    command = command_line.prepare_command()
    path = Path(build_store(config, 0, command=command).directory) / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_text("{}")
    with pytest.raises(ConfigError, match="missing or damaged") as error:
        open_or_build(config, 257)
    assert config.store in str(error.value)
    assert "delete this one and build it again" in str(error.value)
    assert name == "manifest.json" or "with: python tools/prepare_data.py" in str(error.value)


@pytest.mark.parametrize("kind", ["tokens.npy", "offsets.npy", "bytes.npy", "names.jsonl"])
def test_a_changed_byte_is_found(config, kind):
    store = build_store(config, 0, command=command_line.prepare_command())
    check_files(store)
    path = Path(store.directory) / "shards" / "00000" / f"train.{kind}"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    store = open_store(store.directory)
    with pytest.raises(ConfigError, match=rf"is damaged: 1 files .*train\.{kind}; .* with: python"):
        check_files(store)
    if kind == "offsets.npy":
        with pytest.raises(ConfigError, match=r"train\.offsets\.npy is damaged"):
            store.train.borders(0, 10)


def test_another_format_is_not_opened(config):
    path = Path(build_store(config, 0).directory) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="its format is 99"):
        open_store(path.parent)


def test_no_documents_at_all(config):
    config.path = config.path.replace("*", "empty")
    with pytest.raises(
        ConfigError, match=r"data\.path='.*' gives no documents; 1 skipped: 1 empty"
    ):
        build_store(config, 0)


@pytest.mark.parametrize(
    ("share", "message"), [(1e-9, "holds out none of 40"), (1 - 1e-9, "leaves none of 40")]
)
def test_a_split_without_documents(config, share, message):
    config.held_out = share
    with pytest.raises(ConfigError, match=rf"data\.held_out=.* {message} documents"):
        build_store(config, 0)


def test_progress_in_plain_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 1)
    store = build_store(config, 0, processes=1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "\r" not in err
    assert len(lines) == 21
    assert lines[9] == f"reading {store.directory}: 0.0 of 0.0 MB"
    assert lines[19] == f"building {store.directory}: 0.0 of 0.0 MB"
    assert lines[20].startswith("skipped 1 documents: 1 empty; the first: ")


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_many_shards_are_one_stream(config, processes, monkeypatch):
    whole = build_store(config, 0)
    config.store += "_again"
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 100)
    monkeypatch.setattr(store_builder, "_MOST_SHARDS", 10**9)
    store = build_store(config, 0, processes=processes)
    assert len(store.manifest["shards"]) > 5
    for one, other in ((whole.train, store.train), (whole.held_out, store.held_out)):
        np.testing.assert_array_equal(tokens_of(one), tokens_of(other))
        np.testing.assert_array_equal(one.borders(0, 10**9), other.borders(0, 10**9))
        np.testing.assert_array_equal(one.byte_counts, other.byte_counts)
        assert one.names == other.names
        for index in range(len(one)):
            np.testing.assert_array_equal(one.document(index), other.document(index))
            assert one.name(index) == other.name(index)
        for start in range(0, one.token_count, 37):
            for length in (1, 50, 333):
                stop = start + length
                np.testing.assert_array_equal(one.read(start, stop), other.read(start, stop))
                np.testing.assert_array_equal(one.borders(start, stop), other.borders(start, stop))
            assert one.document_at(start) == other.document_at(start)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_killed_anywhere_it_ends_in_the_same_bytes(config, tokenizer, monkeypatch):
    """Every file operation is the last one once."""
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 300)
    monkeypatch.setattr(store_builder, "say", lambda *_: None)
    config.tokenizer = tokenizer
    expected = contents(build_store(config, 280, processes=1).directory)

    class Killed(BaseException):
        pass

    left = [0]

    def dying(original):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*arguments, **options)

        return call

    survived, finished = 0, False
    config.store += "_killed"
    while not finished:
        survived += 1
        left[0] = 3 * survived
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "write_text", dying(atomic.write_text))
            patch.setattr(store_builder.np, "save", dying(np.save))
            patch.setattr(Path, "rename", dying(Path.rename))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:  # as `build_store`, also when only what is left of the build has to go
                store_builder.build_or_wait(config, 280, processes=1)
                finished = True
            except Killed:
                if not (Path(config.store) / "manifest.json").exists():
                    with pytest.raises(ConfigError, match=r"is unfinished: \d+ of \d+ shards"):
                        open_or_build(config, 280)
    assert survived > 2
    assert contents(config.store) == expected


def test_an_unfinished_store_is_refused_with_the_command(config, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--workdir=x", "--config=a.py", "--config.data.x=1"]
    )
    monkeypatch.setattr(store_builder, "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_store(config, 0, command=command_line.prepare_command())
    with pytest.raises(ConfigError) as error:
        open_or_build(config, 257)
    command = "python tools/prepare_data.py --config=a.py --config.data.x=1"
    assert str(error.value).endswith(f"0 of 1 shards are built; finish it with: {command}")
    config.held_out = 0.3
    with pytest.raises(ConfigError, match="was begun with other options") as error:
        build_store(config, 0)
    assert "data.held_out: 0.2 in the store, 0.3 asked for" in str(error.value)
    config.held_out = 0.2
    Path(config.path.replace("*", "new")).write_text("new")
    with pytest.raises(ConfigError, match="was begun with other files"):
        build_store(config, 0)


def test_of_equal_texts_the_first_is_kept_and_no_text_is_in_both_splits(config, monkeypatch):
    corpus = Path(config.path).parent
    for number in range(60):
        (corpus / f"copy{number}.txt").write_bytes(TEXTS["3.txt"].encode())
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 200)
    store = build_store(config, 0, processes=1)
    train, held_out = texts_of(store, store.train), texts_of(store, store.held_out)
    assert not set(train.values()) & set(held_out.values())
    assert sorted((train | held_out).values()) == sorted(TEXTS.values())
    assert store.manifest["duplicates"] == 60
    config.deduplicate, config.store = False, config.store + "_all"
    store = build_store(config, 0, processes=1)
    train, held_out = texts_of(store, store.train), texts_of(store, store.held_out)
    assert not set(train.values()) & set(held_out.values())
    names = [path.name for path in corpus.iterdir() if path.stat().st_size]
    assert set(held_out) == {name for name in names if is_held_out(name, 0.2)}
    assert sum(text == TEXTS["3.txt"] for text in held_out.values()) > 1
    left_out = set(names) - set(held_out) - set(train)
    assert len(left_out) == store.manifest["duplicates"] > 0
    texts = set(held_out.values())
    assert {(corpus / name).read_bytes().decode() for name in left_out} <= texts


def test_files_that_change_between_the_passes_are_noticed(config, monkeypatch):
    survey = store_builder._survey

    def then_changed(job, task):
        shard = survey(job, task)
        path = Path(config.path.replace("*", "3"))
        path.write_bytes(path.read_bytes().replace(b"says", b"sees"))
        return shard

    monkeypatch.setattr(store_builder, "_survey", then_changed)
    with pytest.raises(ConfigError, match="has changed since the build began"):
        build_store(config, 0, processes=1)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_long_documents_are_encoded_in_parts(config, tokenizer, monkeypatch):
    config.tokenizer = tokenizer
    path = Path(config.path.replace("*", "long"))
    path.write_text("a very long document says na na naé " * 200, encoding="utf-8")
    whole = build_store(config, 280)
    config.store += "_again"
    monkeypatch.setattr(shard_writer, "_PART_CHARACTERS", 100)
    monkeypatch.setattr(shard_writer, "_BATCH_CHARACTERS", 250)
    parts = build_store(config, 280)
    assert max(*whole.train.lengths, *whole.held_out.lengths) > 500
    assert contents(whole.directory).keys() == contents(parts.directory).keys()
    assert whole.manifest == parts.manifest


def test_the_command_that_finishes_has_the_config_however_it_was_given(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "--config", "a b.py", "--workdir", "w", "-config.train.steps", "5"]
    )
    command = "python tools/prepare_data.py --config 'a b.py' -config.train.steps 5"
    assert command_line.prepare_command() == command


def test_a_store_is_not_built_on_remote_storage(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.store = "memory://nowhere/store"
    with pytest.raises(ConfigError, match="stores are built on local disk"):
        build_store(config, 0)
    with pytest.raises(ConfigError, match="missing or damaged"):
        open_or_build(config, 257)
    assert not list(tmp_path.glob("memory*"))


@pytest.mark.parametrize("windows", ["packed", "contiguous"])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_no_batch_has_a_held_out_document_and_an_epoch_has_all_others(config, windows, deduplicate):
    corpus = Path(config.path).parent
    for number in range(30):
        (corpus / f"copy{number}.txt").write_text(f"<{number % 10}>")
        (corpus / f"alone{number}.txt").write_text(f"<{100 + number}" + number * "x" + ">")
    config.deduplicate = deduplicate
    store = build_store(config, 257)
    train, held_out = (
        {tuple(split.document(i).tolist()) for i in range(len(split))}
        for split in (store.train, store.held_out)
    )
    assert not train & held_out
    stream = BatchStream(
        [store.train],
        [1.0],
        sequence_length=60,
        batch_size=4,
        bos_id=256,
        seed=0,
        policy=windows,
    )
    found, read = set(), [()] * 4  # what each row has read of a document
    for step in range(2 * store.train.token_count // 60):  # a row alone reads all
        batch = stream[step]
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(1, segments.max() + 1):
                tokens = tuple(batch.tokens[row][segments == segment].tolist())
                goes_on = segment == 1 and batch.continues[row]
                read[row] = read[row] + tokens if goes_on else tokens
                found.add(read[row])
                assert any(document[: len(read[row])] == read[row] for document in train)
    assert found >= train
    assert not found & held_out


def test_a_store_on_remote_storage_is_read_by_ranges(config):
    fsspec = pytest.importorskip("fsspec")
    local = build_store(config, 0)
    fsspec.filesystem("memory").put(local.directory, "/bucket/store", recursive=True)
    remote = open_store("memory://bucket/store")
    for one, other in ((local.train, remote.train), (local.held_out, remote.held_out)):
        np.testing.assert_array_equal(tokens_of(one), tokens_of(other))
        np.testing.assert_array_equal(one.borders(5, 500), other.borders(5, 500))
        np.testing.assert_array_equal(one.read(100, 117), other.read(100, 117))
        assert one.names == other.names
    assert remote.tokenizer.fingerprint == local.tokenizer.fingerprint
    check_files(remote)
    path = "/bucket/store/shards/00000/train.tokens.npy"
    fsspec.filesystem("memory").pipe(path, b"short")
    with pytest.raises(ConfigError, match=r"train\.tokens\.npy has 5 bytes"):
        open_store("memory://bucket/store")
