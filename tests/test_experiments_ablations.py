"""The ablations: what each variation changes, and its difference from its base."""

import math

import pytest

from experiments import ablations, figures
from retnet_jax.config.as_json import flatten
from retnet_jax.evaluation.tables import as_markdown

BITS = {"base": [10.0, 20.0], "no_gate": [11.0, 22.0], "gamma_1": [30.0, 60.0]}


def record(of_base, variation, seed, more=0.0):
    """An invented record: the bits of a variation, and `more` in each document."""
    found = {"bits": [x + more for x in BITS[variation]], "bits_per_byte": 2, "nll_per_token": 3}
    held_out = {"tokens": [5, 10], "bytes": [20, 40], "window": found, "stateful": found}
    return {
        **{"name": f"{of_base}_{variation}_{seed}", "base": of_base, "variation": variation},
        **{"seed": seed, "parameters": 1_000_000, "tokens": 1_228_800, "skipped_steps": 0},
        **{"held_out": held_out, "options": {"optimizer.learning_rate": 0.04}},
    }


def named(*records):
    return {x["name"]: x for x in records}


def test_a_variation_changes_what_its_name_says():
    runs = {run.name: run for run in ablations.runs("2cores", {})}
    base = flatten(runs["quickstart_base_1"].config)
    for name, options in ablations.VARIATIONS.items():
        found = flatten(runs[f"quickstart_{name}_1"].config)
        changed = {option for option, value in found.items() if value != base[option]}
        assert changed == {*options}, name
    assert base["train.seed"] == 1
    half = flatten(runs["half_base_0"].config)
    assert half["optimizer.learning_rate"] == base["optimizer.learning_rate"] / 2
    assert half["optimizer.muon_learning_rate"] == base["optimizer.muon_learning_rate"] / 2


def test_the_papers_retnet_waits_for_its_rate():
    def made(bits):
        found = {"window": {"bits_per_byte": bits}, "stateful": {"bits_per_byte": bits + 1}}
        return {"validation": found}

    names = [f"paper_rate_{rate}" for rate in ablations.RATES]
    records = dict(zip(names, map(made, (2.0, 1.0, 3.0)), strict=True))
    runs = {run.name: run for run in ablations.runs("2cores", records)}
    assert runs["paper_base_2"].config.optimizer.learning_rate == ablations.RATES[1]
    assert runs["paper_base_2"].config.model.short_conv is None
    del records[names[2]]
    assert not any(x.name == "paper_base_0" for x in ablations.runs("2cores", records))
    seeds = {run.config.train.seed for name, run in runs.items() if "rate" in name}
    assert seeds.isdisjoint(ablations.SEEDS)


def test_a_difference_is_of_the_same_seed_in_nats_per_token():
    records = named(
        record("quickstart", "base", 0),
        record("quickstart", "base", 1, more=15.0),
        record("quickstart", "no_gate", 0),
        record("quickstart", "no_gate", 1, more=15.0),
        record("quickstart", "no_gate", 2, more=99.0),  # its base is not made yet
    )
    found = ablations.difference(records, "quickstart", "no_gate", "window")
    # One bit more in 5 tokens, two in 10.
    assert found.each == pytest.approx((0.2 * math.log(2),) * 2)
    assert (found.of_documents, found.of_seeds) == (pytest.approx(0), pytest.approx(0))
    assert ablations.difference(records, "quickstart", "gamma_1", "window") is None
    assert ablations.difference(records, "paper", "no_gate", "window") is None
    table = as_markdown(ablations.tables("2cores", records))
    # A token has 4 bytes, so a fifth of a bit per token is a twentieth of a bit per byte.
    assert "| no swish gate | 1,000,000 | 0 | +0.0500 | +0.1386 ± 0.0000 ± 0.0000 |" in table
    assert f"{math.log(27.84 / 26.05):+.4f}" in table


def test_the_figure_is_drawn_of_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "OF_SMALL_RUNS", tmp_path)
    records = named(
        record("quickstart", "base", 0),
        record("quickstart", "no_gate", 0, more=1.0),
        record("quickstart", "gamma_1", 0),  # far beyond the axis
    )
    assert "gamma = 1" in ablations.report("small", records)
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
