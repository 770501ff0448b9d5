"""Corpora of few documents, of which the ends are held out."""

import json
from pathlib import Path

import numpy as np
import programs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import rewrite_manifest
from token_stores import contents, small_store_config, texts_of

from retnet_jax.config import DataConfig
from retnet_jax.data import build as store_builder
from retnet_jax.data import build_store, open_store
from retnet_jax.data.bpe_sample import train_tokenizer
from retnet_jax.data.sources import Document, Skipped
from retnet_jax.data.split import is_held_out, parts_of, start_of_tail
from retnet_jax.data.store_problems import store_problems
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.tokenizers import train_bpe
from retnet_jax.errors import ConfigError

LINES = [f"line {n} of the play, with an é\n" for n in range(200)]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return DataConfig(
        source="text", path=str(path), tokenizer="byte", store=str(tmp_path / "store"), held_out=0.1
    )


@given(
    text=st.text(st.sampled_from("ab é\n.。👍\r\t")),
    share=st.floats(1e-3, 0.999),
)
def test_the_parts_are_the_text_and_none_is_blank(text, share):
    parts = list(parts_of([Document("x", text)], share, "tail"))
    assert "".join(part.text for _, part in parts) == text
    assert len({split for split, _ in parts}) == len(parts)
    if text.strip():
        assert all(part.text.strip() for _, part in parts)
    if len(parts) == 2:
        assert [split for split, _ in parts] == ["train", "held_out"]
        assert [part.name for _, part in parts] == ["x", "x (its end)"]
        size = len(text.rstrip().encode())
        tail = size - len(parts[0][1].text.encode())
        # One and a half times the share at most; characters here have at most four bytes.
        assert tail <= 4 * (1.5 * share * size + 2)


@pytest.mark.parametrize(
    ("text", "tail"),
    [
        ("one line\n" * 99 + "the last one\n", "one line\nthe last one\n"),
        ("First. " * 50 + "Second? " * 49 + "It ends here.", "It ends here."),
        ("word " * 200, "word word word word "),
        ("é" * 1000, "é" * 20),
        ("早上好。" * 100, "早上好。早上好。"),
        ("x" * 980 + "\r\n" + "y" * 20 + " \n\n\n", "y" * 20 + " \n\n\n"),
    ],
)
def test_the_tail_begins_at_a_line_a_sentence_a_word_or_a_character(text, tail):
    assert text[start_of_tail(text, 0.02) :] == tail


def test_the_end_of_a_single_file_is_held_out(config, capsys):
    store = open_or_build(config, 257)
    said = capsys.readouterr().err
    reason = "there are too few documents to hold out whole ones"
    assert f"{reason}, so the last 10% of each document is held out from training" in said
    assert store.train.names == ["play.txt"]
    assert store.held_out.names == ["play.txt (its end)"]
    (train,), (held_out,) = (
        texts_of(store, split).values() for split in (store.train, store.held_out)
    )
    assert train == "".join(LINES[:180])
    assert held_out == "".join(LINES[180:])
    for split, text in ((store.train, train), (store.held_out, held_out)):
        assert split.document(0).tolist() == [256, *text.encode()]
        assert split.byte_counts.tolist() == [len(text.encode())]
    assert store.manifest["held_out_by"] == "tail"
    assert store.manifest["options"]["data.held_out_by"] == "auto"
    assert store.manifest["splits"]["held_out"]["bytes"] == len(held_out.encode())
    assert store_problems(store.directory) == []
    capsys.readouterr()
    assert open_or_build(config, 257).manifest == store.manifest
    assert capsys.readouterr().err == ""


def test_a_tokenizer_is_trained_only_on_the_beginnings(config, monkeypatch):
    seen = []

    def record(texts, vocab_size):
        seen.append(list(texts))
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(store_builder, "train_bpe", record)
    monkeypatch.setattr("retnet_jax.data.bpe_sample.train_bpe", record)
    config.tokenizer = "bpe"
    store = build_store(config, 280)
    tokenizer = train_tokenizer([config], 280, Skipped())
    config.held_out_by = "tail"
    train_tokenizer([config], 280, Skipped())
    assert seen == [["".join(LINES[:180])]] * 3
    assert tokenizer.fingerprint == store.tokenizer.fingerprint


def test_documents_enough_are_held_out_by_name_and_the_option_decides_otherwise(tmp_path):
    config = small_store_config(tmp_path)
    store = build_store(config, 0)
    assert store.manifest["held_out_by"] == "document"
    assert all(is_held_out(name, 0.2) for name in store.held_out.names)

    config.held_out_by = "document"  # it is what "auto" has decided
    assert open_or_build(config, 257).manifest == store.manifest
    config.held_out_by = "tail"
    with pytest.raises(ConfigError, match="held_out_by: 'auto' in the store, 'tail' asked for"):
        open_or_build(config, 257)
    config.store += "_tail"
    store = open_or_build(config, 257)
    assert len(store.train) == 40
    held_out = texts_of(store, store.held_out)
    assert {f"{name} (its end)" for name in store.train.names} > set(held_out)
    assert len(set(held_out.values())) == len(held_out) > 2  # most ends are the same text
    config.held_out_by = "auto"  # would have held out whole documents
    with pytest.raises(ConfigError, match="held_out_by: 'tail' in the store, 'auto' asked for"):
        open_or_build(config, 257)


def test_a_store_that_was_built_before_the_option_opens(tmp_path):
    config = small_store_config(tmp_path)

    def forget(manifest):
        del manifest["held_out_by"], manifest["options"]["data.held_out_by"]

    rewrite_manifest(build_store(config, 0).directory, forget)
    for held_out_by in ("auto", "document"):
        config.held_out_by = held_out_by
        assert len(open_or_build(config, 257).held_out)


def test_equal_documents_and_equal_ends_are_kept_once(config, tmp_path):
    """And the end of one document is not the training text of another."""
    text = "".join(LINES)
    rows = [
        {"id": "a", "text": text},
        {"id": "copy", "text": text},
        {"id": "b", "text": text[:5000].replace("play", "tale") + text[5000:]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.source, config.path, config.held_out_by = "jsonl", str(path), "tail"
    store = build_store(config, 0)
    assert store.train.names == ["rows.jsonl:a", "rows.jsonl:b"]
    assert store.held_out.names == ["rows.jsonl:a (its end)"]
    assert store.manifest["duplicates"] == 3

    # Now the first part of b is the end of a.
    rows[1:] = [{"id": "b", "text": "".join(LINES[180:]) + LINES[0] * 2}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for deduplicate in (True, False):
        config.store, config.deduplicate = f"{tmp_path}/again_{deduplicate}", deduplicate
        store = build_store(config, 0)
        assert store.train.names == ["rows.jsonl:a"]
        assert store.held_out.names == ["rows.jsonl:a (its end)", "rows.jsonl:b (its end)"]


@pytest.mark.parametrize("held_out_by", ["auto", "tail"])
def test_a_build_of_tails_killed_anywhere_ends_in_the_same_bytes(config, held_out_by, monkeypatch):
    config.held_out_by, config.tokenizer = held_out_by, "bpe"
    expected = contents(build_store(config, 280, processes=1).directory)

    class Killed(BaseException):
        pass

    config.store += "_killed"
    for survived in range(1, 9):
        left = [survived]

        def save(*arguments, original=np.save, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(store_builder.np, "save", save)
            try:
                build_store(config, 280, processes=1)
                break
            except Killed:
                assert not (Path(config.store) / "manifest.json").exists()
    assert survived > 2
    assert contents(config.store) == expected


def test_texts_too_short_to_divide_are_refused(config):
    path = Path(config.path)
    path.write_text("ten bytes!")
    config.held_out = 0.02
    with pytest.raises(
        ConfigError, match=r"held_out=0\.02 holds out none of 1 document, because it is too short"
    ):
        open_or_build(config, 257)
    assert not Path(config.store).exists()
    path.write_text("la la\nla la\n")
    config.held_out = 0.5
    with pytest.raises(ConfigError, match="are so much alike that a split has none of its own"):
        open_or_build(config, 257)
    path.write_text("".join(LINES))  # the mended command
    config.held_out_by = "document"
    with pytest.raises(ConfigError, match=r"holds out none of 1 .*data\.held_out_by='tail'$"):
        open_or_build(config, 257)
    config.held_out_by = "auto"
    assert len(open_or_build(config, 257).held_out) == len(open_store(config.store).train) == 1


def test_inspecting_a_store_says_that_the_ends_are_held_out(config):
    build_store(config, 0)
    done = programs.run("tools/inspect_data.py", f"--store={config.store}", "--split=held_out")
    assert done.returncode == 0, done.stderr
    said = "there are too few documents to hold out whole ones, so the last 10% of each document is"
    assert f"\n  {said} held out from training\n" in done.stdout
    assert "--- play.txt (its end): " in done.stdout
