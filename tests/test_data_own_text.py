"""A text of one's own: the directory of its store, the quickstart fitted to it, and progress."""

import operator

import numpy as np
import pytest
from token_stores import small_store_config

from retnet_jax import waiting
from retnet_jax.config import DataConfig
from retnet_jax.configs.quickstart import fitted, get_config
from retnet_jax.data import Stores, build_store, shard_writer, workers
from retnet_jax.data.sources import approximate_bytes
from retnet_jax.data.stores import default_store, repetition_notes
from retnet_jax.programs.prepare_data import table


def test_the_store_of_a_corpus_has_its_name():
    config = DataConfig(source="text", path="shakespeare.txt")
    assert default_store(config, 1024) == "data/shakespeare_bpe1024"
    config.tokenizer = "byte"
    assert default_store(config, 1024) == default_store(config, 257) == "data/shakespeare_byte"
    assert default_store(DataConfig(), 4096) == "data/stdlib_bpe4096"


def test_other_options_have_other_stores():
    configs = [
        DataConfig(source="text", path="a.txt"),
        DataConfig(source="text", path="./a.txt"),  # which the store records as it is typed
        DataConfig(source="text", path="more/a.txt"),
        DataConfig(source="text", path="/more/a.txt"),
        DataConfig(source="text", path="a.md"),
        DataConfig(source="text", path="a/**/*.txt"),
        DataConfig(source="text", path="~/a.txt"),
        DataConfig(source="text", path="a.txt", held_out=0.1),
        DataConfig(source="text", path="a.txt", held_out_by="tail"),
        DataConfig(source="text", path="a.txt", tokenizer="tokenizers/a"),
        DataConfig(source="text", path="a.txt", tokenizer="others/a"),
        DataConfig(source="jsonl", path="a.txt"),
        DataConfig(source="hf", path="owner/a:train"),
        DataConfig(source="text", path="/"),
        DataConfig(source="text", path="**"),
        DataConfig(source="text", path="é" * 300),
    ]
    names = {default_store(config, size) for config in configs for size in (300, 400)}
    assert len(names) == 2 * len(configs) - 2  # other tokenizers ignore the size
    assert all(len(name) < 100 and name.isascii() and name.count("/") == 1 for name in names)
    assert {name[:7] for name in names} >= {"data/a_", "data/te"}
    same = DataConfig(source="text", path="more/a.txt", strict=True, sequence_length=7)
    assert default_store(same, 300) == default_store(configs[2], 300)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (10, ("byte", 257, 200)),
        (100_000, ("byte", 257, 488)),
        (199_999, ("byte", 257, 976)),
        (200_000, ("bpe", 1024, 488)),
        (1_000_000, ("bpe", 1024, 1500)),
        (2_000_000, ("bpe", 4096, 1500)),
        (10**12, ("bpe", 4096, 1500)),
    ],
)
def test_the_quickstart_is_fitted_to_a_text(size, expected):
    given = get_config()
    config = fitted(given, set(), size)
    config.check()
    assert (config.data.tokenizer, config.model.vocab_size, config.train.steps) == expected
    assert (config.data.held_out, config.data.apart) == (0.02, "")
    assert given == get_config()


def test_a_text_of_unknown_size_has_only_the_split_of_other_texts():
    config, given = fitted(get_config(), {"data.apart"}, None), get_config()
    assert (config.data.held_out, config.data.apart) == (0.02, given.data.apart)
    config.data.held_out = given.data.held_out
    assert config == given


def test_options_that_the_user_has_given_are_not_fitted():
    def changes(*names, **options):
        config = get_config()
        config.init_from = options.pop("init_from", "")
        config.data.tokenizer = options.get("tokenizer", "bpe")
        found = fitted(config, {*names}, 50_000)
        return found.data.tokenizer, found.model.vocab_size, found.train.steps

    assert changes("train.steps") == ("byte", 257, 1500)
    assert changes("model.vocab_size") == ("bpe", 4096, 200)
    assert changes("data.tokenizer") == ("bpe", 512, 200)
    assert changes("data.tokenizer", tokenizer="byte") == ("byte", 257, 244)
    assert changes("data.tokenizer", tokenizer="a/b") == ("a/b", 4096, 200)
    assert changes(init_from="a/b") == ("bpe", 4096, 200)


def test_the_size_of_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("123é")
    (tmp_path / "b.txt").write_text("67")
    paths = f"{tmp_path}/*.txt,{tmp_path}/a.txt"
    for source in ("text", "jsonl", "parquet"):
        assert approximate_bytes(DataConfig(source=source, path=paths)) == 7
    assert approximate_bytes(DataConfig(source="hf", path="a:train")) is None


def test_a_run_says_when_it_reads_a_text_often(tmp_path):
    config = small_store_config(tmp_path)
    store = build_store(config, 0)
    tokens = store.train.token_count
    stores = Stores({"one": store, "two": store}, np.array([3.0, 1.0]), store.tokenizer)
    assert repetition_notes(stores, 20, tokens) == []
    notes = repetition_notes(stores, 40, tokens)  # 30 times and 10 times
    assert notes == [
        f"this run reads the {tokens:,} training tokens of {store.directory} 30 times; with "
        "--config.train.steps=26 it would read them 20 times"
    ]


def test_progress_inside_a_shard(tmp_path, monkeypatch, capsys):
    """A single file is one shard; it says how far it is."""
    path = tmp_path / "a.txt"
    path.write_text("some words\n" * 100_000)
    config = DataConfig(
        source="text", path=str(path), tokenizer="byte", store=str(tmp_path / "store")
    )
    monkeypatch.setattr(shard_writer, "_BATCH_CHARACTERS", 90_000)
    monkeypatch.setattr(shard_writer, "_PART_CHARACTERS", 100_000)
    monkeypatch.setattr(workers, "_BYTES_BETWEEN_REPORTS", 50_000)
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.0)
    store = build_store(config, 0)
    lines = capsys.readouterr().err.splitlines()
    last = {line.split(": ")[0]: line.split(": ")[1] for line in lines[:-1]}
    assert last == {
        f"reading {config.store}": "1.1 of 1.1 MB",
        f"reading {config.store} again, to hold out the ends of its documents": "1.1 of 1.1 MB",
        f"building {config.store}": "1.1 of 1.1 MB",
    }
    built = [line.split(": ")[1] for line in lines if line.startswith(f"building {config.store}")]
    assert len(built) == 10
    assert built[-1] == "1.1 of 1.1 MB"
    assert table(store).splitlines()[4] == (
        "there are too few documents to hold out whole ones, so the last 2% of each document is "
        "held out from training"
    )


def _working(item):
    for _ in range(9):
        workers.advance(30_000)
    return item[0]


@pytest.mark.parametrize(("task", "processes"), [(_working, 1), (operator.itemgetter(0), 2)])
def test_progress_ends_at_the_size_whatever_tasks_say(task, processes, monkeypatch, capsys):
    monkeypatch.setattr(workers, "_BYTES_BETWEEN_REPORTS", 50_000)
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.0)
    items, sizes = [(0, None), (1, None)], [100_000, 900_000]
    workers.for_each_shard(task, items, sizes, processes, "working")
    assert capsys.readouterr().err.splitlines()[-1] == "working: 1.0 of 1.0 MB"
