"""Experiments: runs are made once, recorded as they end, resumed, and shared by processes."""

import math

import pages
import pytest
from flax import nnx
from training_runs import STEPS, small_config

from experiments import recipe, results_page, runs
from experiments.held_out import (
    best_bits_per_byte,
    chosen_documents,
    document_bits,
    does_not_match,
)
from experiments.runs import RESULTS, Measurement, Run, make_again, make_missing, read_records
from retnet_jax import RetNet, Transformer
from retnet_jax.config import AttentionLayers
from retnet_jax.data.stores import open_or_build
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.perplexity import stateful_nll
from retnet_jax.evaluation.statistics import sums
from retnet_jax.files import lock
from retnet_jax.training.loop import Evaluator


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "WORKDIRS", tmp_path / "workdirs")
    return tmp_path


@pytest.mark.slow
@pytest.mark.compiles(80, reason="a whole run, saved from eight devices")
def test_a_run_is_made_once_and_recorded_when_it_ends(places):
    config, trained, known = small_config(places), [], []

    def fails(result):
        trained.append(len(result.metrics))
        raise RuntimeError("killed while it measured")

    def measure(result):
        trained.append(len(result.metrics))
        return {"answer": 42}

    watch = Evaluator("watch", STEPS // 2, lambda model: {"layers": model.config.n_layers})

    def all_runs(budget, records):
        known.append(list(records))
        return [Run("first", config, {"number": 1}, measure, [watch])]

    with pytest.raises(RuntimeError):
        make_missing("some", "small", lambda *_: [Run("first", config, {}, fails, [watch])])
    assert read_records("some", "small") == {}
    records = make_missing("some", "small", all_runs)
    assert trained[0] > STEPS  # records of steps and evaluations
    assert trained[1] == 0  # it was trained already
    assert known == [[], ["first"]]  # later runs may depend on it
    record = records["first"]
    assert (record["number"], record["answer"]) == (1, 42)
    assert (record["tokens"], record["skipped_steps"]) == (STEPS * 8 * 16, 0)
    assert (record["status"], record["options"]["model.d_model"]) == ("finished", 16)
    about = {"evaluator": "watch", "layers": 1}
    assert record["evaluations"] == [{"step": step} | about for step in (STEPS // 2, STEPS)]
    assert list((places / "workdirs" / "some_small").iterdir()) == []
    assert make_missing("some", "small", all_runs) == records == read_records("some", "small")
    assert len(trained) == 2


def test_bits_of_chosen_documents(places):
    config = small_config(places)
    store = open_or_build(config.data, config.model.vocab_size)
    chosen = chosen_documents(store, does_not_match("paragraph_0"))
    assert chosen == []
    chosen = chosen_documents(store, does_not_match(store.held_out.names[0]))
    assert chosen == list(range(1, len(store.held_out)))
    model = RetNet(config.model, rngs=nnx.Rngs(0))
    found = document_bits(model, store, chosen[:2], window_length=16)
    expected = stateful_nll(model, [store.held_out.document(i) for i in chosen[:2]], batch_size=2)
    assert found["stateful"]["bits"] == pytest.approx(sums(expected) / math.log(2), abs=0.01)
    for record in found.values():
        total = store.held_out.byte_counts[chosen[:2]].sum()
        assert record["bits_per_byte"] == pytest.approx(sum(record["bits"]) / total, rel=1e-3)
    assert list(document_bits(twin(config), store, chosen[:1], window_length=16)) == ["window"]


def twin(config):
    return Transformer(config.model.transformer_twin(), rngs=nnx.Rngs(0))


def test_the_options_of_a_hybrid_are_in_its_record(places):
    layers = AttentionLayers(layers=(1,), n_heads=2, window=64)
    options = {"model.attention_layers": (layers,)}
    run = Measurement("hybrid", {}, lambda: {"options": options})
    make_missing("some", "small", lambda *_: [run])
    (found,) = read_records("some", "small")["hybrid"]["options"]["model.attention_layers"]
    assert (found["layers"], found["window"]) == ([1], 64)


def test_a_run_of_another_process_is_left_to_it(places):
    run = Run("taken", small_config(places), {}, lambda result: {})
    claim = places / "workdirs" / "some_small" / "taken.claim"
    claim.mkdir(parents=True)
    with lock.held(claim):
        assert make_missing("some", "small", lambda *_: [run]) == {}
    assert not (places / "results").exists()


def test_configs_of_the_search():
    """Every run has sizes that fit, and is unlike every other run of its model."""
    for architecture in recipe.SEARCH:
        found = [run.config for run in recipe.runs("2cores", {}) if architecture in run.name]
        assert len({repr(config) for config in found}) == len(found) >= 16
    with pytest.raises(KeyError, match=r"there is no option model\.heads"):
        recipe.with_options(recipe.base("retnet"), {"model.heads": 2})
    with pytest.raises(ConfigError):
        recipe.with_options(recipe.base("retnet"), {"model.n_heads": 3})


def test_the_better_protocol_counts():
    found = {"window": {"bits_per_byte": 2.0}, "stateful": {"bits_per_byte": 1.5}}
    assert best_bits_per_byte(found) == 1.5
    assert list(filter(does_not_match("^b"), ["ab", "ba"])) == ["ab"]


def test_the_page_of_results_has_the_tables_of_the_records():
    for name in results_page.PAGES:
        page = pages.read(name)
        assert results_page.filled(page) == page, f"{name}: python -m experiments.results_page"
    all_tables = pages.read("docs/results_tables.md")
    records = [path.stem for path in RESULTS.glob("*.json") if not path.stem.endswith("_small")]
    assert len(records) >= 8
    for stem in records:
        assert f"<!-- tables {' '.join(stem.rsplit('_', 1))} -->\n**" in all_tables


def test_a_table_of_a_page_is_named_by_the_beginning_of_its_title():
    begin = "before\n<!-- tables quickstart 2cores: RetNet minus -->\n"
    page = begin + "|\n<!-- end of tables -->\nafter\n"
    filled = results_page.filled(page)
    assert filled.startswith(begin + "**RetNet minus Transformer, bits per byte**\n")
    assert filled.endswith("|\n<!-- end of tables -->\nafter\n")
    assert results_page.filled(filled) == filled
    with pytest.raises(ValueError, match="0 tables have a title that begins with 'no such'"):
        results_page.filled(page.replace("RetNet minus", "no such"))
    no_end = page.replace("<!-- end of tables -->\n", "")
    for wrong in (page.replace("2cores", "2 cores"), no_end, no_end + page):
        with pytest.raises(ValueError, match="tables that do not begin or end"):
            results_page.filled(wrong)


def test_a_run_is_made_again_beside_its_record(places):
    found = iter(
        (
            {"losses": {"all": 1.0, "each": [{"bits": list(range(20))}, {"bits": [3]}]}, "old": 1},
            {"losses": {"all": 1.5, "each": [{"bits": list(range(21))}, {"bits": [5]}]}},
        )
    )

    def measure():
        return next(found)

    def all_runs(budget, records):
        return [Measurement(name, {}, measure) for name in ("first", "second")]

    records = make_missing("some", "small", all_runs, "first")
    table = make_again("some", "small", all_runs, "first")
    assert {tuple(row) for row in table.rows if row[0] != "seconds"} == {
        ("losses.all", "1", "1.5", "0.5"),
        ("losses.each.0.bits, sum of 20", "190", "-", "-"),
        ("losses.each.0.bits, sum of 21", "-", "210", "-"),
        ("losses.each.1.bits.0", "3", "5", "2"),
        ("old", "1", "-", "-"),
    }
    assert not list((places / "workdirs").rglob("*.again"))
    assert read_records("some", "small") == records
    with pytest.raises(ConfigError, match="second has no record to compare with"):
        make_again("some", "small", all_runs, "second")
    for make in (make_again, make_missing):
        with pytest.raises(ConfigError, match="--only=frist: no run has this name; such as first"):
            make("some", "small", all_runs, "frist")
