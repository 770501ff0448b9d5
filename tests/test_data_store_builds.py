"""Building token stores: parts, shards, kills and refusals do not change the bytes."""

from pathlib import Path

import numpy as np
import pytest
from token_stores import TEXTS, contents, small_store_config, texts_of, tokens_of

from retnet_jax import waiting
from retnet_jax.data import bpe_sample, shard_writer
from retnet_jax.data import build as store_builder
from retnet_jax.data.bpe_sample import Sample
from retnet_jax.data.build import build_store
from retnet_jax.data.sources import Document
from retnet_jax.data.split import is_held_out
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.tokenizers import train_bpe
from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic
from retnet_jax.programs import command_line


@pytest.fixture
def config(tmp_path):
    return small_store_config(tmp_path)


def test_bpe_is_trained_only_on_training_documents(config, monkeypatch):
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


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_build_killed_anywhere_ends_in_the_same_bytes(config, tokenizer, monkeypatch):
    """Each file operation is the last one in one of the builds."""
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
            try:  # unlike `build_store` it also tidies up a complete store
                store_builder.build_or_wait(config, 280, processes=1)
                finished = True
            except Killed:
                if not (Path(config.store) / "manifest.json").exists():
                    with pytest.raises(ConfigError, match=r"is unfinished: \d+ of \d+ shards"):
                        open_or_build(config, 280)
    assert survived > 2
    assert contents(config.store) == expected


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


def test_progress_in_plain_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 1)
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.0)
    store = build_store(config, 0, processes=1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert "\r" not in err
    assert len(lines) == 21
    assert lines[9] == f"reading {store.directory}: 100%"
    assert lines[19] == f"building {store.directory}: 100%"
    assert lines[20].startswith("skipped documents: 1 (1 empty; the first: ")


def test_a_build_of_a_moment_shows_no_progress(config, capsys, monkeypatch):
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 1000.0)
    build_store(config, 0, processes=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("skipped documents: 1 (1 empty; the first: ")


def test_building_over_a_store_is_refused(config):
    build_store(config, 0)
    with pytest.raises(ConfigError, match=r"data\.store=.* exists already"):
        build_store(config, 0)


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
    Path(config.path.replace("*", "new")).write_text("new")
    with pytest.raises(ConfigError, match="was begun with other files"):
        build_store(config, 0)


@pytest.mark.parametrize("build", [lambda c: build_store(c, 300), lambda c: open_or_build(c, 300)])
def test_an_unfinished_store_of_other_options_is_built_anew(config, build, monkeypatch, capsys):
    """Even if a part of its shards is written."""
    monkeypatch.setattr(store_builder, "_SHARD_BYTES", 300)
    monkeypatch.setattr(store_builder.os, "cpu_count", lambda: 1)
    encode = store_builder._encode

    def dies_at_the_third(job, task):
        return 1 / 0 if task[0] == 2 else encode(job, task)

    with monkeypatch.context() as patch:
        patch.setattr(store_builder, "_encode", dies_at_the_third)
        with pytest.raises(ZeroDivisionError):
            build_store(config, 300, processes=1)
    assert len(list((Path(config.store) / "shards").iterdir())) == 2
    config.held_out, config.tokenizer = 0.3, "bpe"
    capsys.readouterr()
    store = build(config)
    said = capsys.readouterr().err
    assert f"{config.store} was begun with other options and is built anew:\n" in said
    assert "  data.held_out: 0.2 in the store, 0.3 asked for\n" in said
    config.store += "_again"
    assert contents(store.directory) == contents(build_store(config, 300).directory)


def test_the_command_that_finishes_a_store_has_all_config_flags(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "--config", "a b.py", "--workdir", "w", "-config.train.steps", "5"]
    )
    command = "python tools/prepare_data.py --config 'a b.py' -config.train.steps 5"
    assert command_line.prepare_command() == command
