"""Experiments of costs: measurements as runs, models of equal sizes, tables of known records."""

import math
import os

import pytest
from flax import nnx

from benchmarks.programs import random_progress, state_bytes, weight_bytes
from experiments import figures, inference_cost, inference_cost_figure, runs, training_cost
from experiments.compiled_costs import needed
from experiments.cost_models import ARCHITECTURES, SIZES, decoding_config
from experiments.processes import in_own_process
from experiments.runs import Measurement, make_missing, read_records
from retnet_jax.model import build_model, for_decoding


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "WORKDIRS", tmp_path / "workdirs")
    monkeypatch.setattr(figures, "OF_SMALL_RUNS", tmp_path / "figures")
    return tmp_path


def test_a_measurement_is_made_once_and_again_if_it_failed(places):
    calls = []

    def measure():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("killed")
        return {"answer": 42}

    run = Measurement("first", {"kind": "some"}, measure)
    with pytest.raises(RuntimeError):
        make_missing("costs", "small", lambda *_: [run])
    assert read_records("costs", "small") == {}
    record = make_missing("costs", "small", lambda *_: [run])["first"]
    assert (record["kind"], record["answer"]) == ("some", 42)
    assert record["command"] == "python -m experiments.costs --budget=small --only=first"
    assert set(record["machine"]) >= {"commit", "device", "cores"}
    make_missing("costs", "small", lambda *_: [run])
    assert len(calls) == 2
    assert list((places / "workdirs" / "costs_small").iterdir()) == []


@pytest.mark.parametrize("experiment", [training_cost, inference_cost])
def test_names_of_runs_are_unique(experiment):
    for budget in experiment.BUDGETS:
        found = experiment.runs(budget, {})
        assert len({run.name for run in found}) == len(found) >= 2


@pytest.mark.parametrize("size", SIZES[1:])
def test_models_of_a_size_have_equally_many_parameters(size):
    counts = []
    for architecture in ARCHITECTURES:
        config = decoding_config(size, architecture)
        config.check()
        counts.append(config.parameter_count())
    assert max(counts) / min(counts) < 1.002
    (attention,) = decoding_config(size, "hybrid").attention_layers
    assert attention.layers[:2] == (3, 7)
    assert attention.window == 1024


def test_bytes_of_states_grow_with_the_length_for_a_transformer_only():
    rows, grown = 3, {}
    for architecture in ARCHITECTURES:
        config = decoding_config("tiny", architecture)
        model = nnx.eval_shape(lambda c=config: for_decoding(build_model(c, rngs=nnx.Rngs(0))))
        assert weight_bytes(model) == 4 * config.parameter_count()
        grown[architecture] = state_bytes(model, rows, 30) - state_bytes(model, rows, 20)
    keys_and_values = 2 * config.d_model * 4 * config.n_layers
    assert grown == {"retnet": 0, "hybrid": 0, "transformer": rows * 10 * keys_and_values}


def test_a_random_state_is_at_its_position():
    config = decoding_config("tiny", "transformer")
    model = for_decoding(build_model(config, rngs=nnx.Rngs(0)))
    state = random_progress(model, 2, 9, 5).state
    assert state.visible.sum(axis=1).tolist() == [5, 5]
    assert state.length.tolist() == state.position.tolist() == [5, 5]


def test_a_function_in_its_own_process(tmp_path):
    assert in_own_process(math.hypot, 3, 4) == 5.0
    found = in_own_process(os.getenv, "PYTHONPATH", packages=[tmp_path])
    assert found.split(os.pathsep)[0] == str(tmp_path)


def test_what_a_step_that_does_not_fit_needs():
    found = needed("the step does not fit: it needs 206.8 GiB, more than its 141.0 GiB. It needs")
    assert found["peak_bytes"] == 206.8 * 2**30
    assert needed("it does not fit")["peak_bytes"] is None


def cell(architecture, length, milliseconds, gigabytes):
    return {
        "architecture": architecture,
        "length": length,
        "weight_bytes": 0,
        "state_bytes": 0,
        "peak_bytes": int(gigabytes * 1e9),
        **({"milliseconds": milliseconds} if milliseconds else {}),
    }


def decoding_record(batch, *cells):
    about = {"kind": "measured", "size": "tiny", "precision": "float32", "batch": batch}
    return {"name": f"batch{batch}", **about, "cells": cells, "machine": {"cores": 2}}


def test_report_of_inference(places):
    few = decoding_record(
        1,
        cell("retnet", 8192, [1.0, 2.0, 4.0], 0.5),
        cell("transformer", 8192, [2.0, 6.0, 10.0], 2.0),
    )
    many = decoding_record(
        16,
        cell("retnet", 8192, [8.0], 1.0),
        cell("hybrid", 8192, [7.0], 1.5),
        cell("transformer", 8192, None, 9.0),
    )
    records = {x["name"]: x for x in (few, many)}
    text = inference_cost.report("small", records)
    assert "| 2 (1 to 4) |  | 6 (2 to 10) | 0.50 |  | 2.00 | 2.50 (2.00 to 3.00) |" in text
    assert "| 8 | 7 | does not fit | 1.00 | 1.50 | 9.00 |  |" in text
    # The best throughputs: 16 rows in 8 ms, one row in 6 ms.
    cells = list(inference_cost.cells_of(records))
    found = [inference_cost_figure.ratio(cells, name) for name in inference_cost.PAPER]
    assert found == [pytest.approx(9), pytest.approx(12), None]
    assert (places / "figures" / "inference_cost.png").exists()


def test_time_on_an_h200_is_that_of_moving_the_bytes():
    bandwidth = inference_cost.h200_bandwidth()
    moved = cell("retnet", 8, None, 1) | {"moved_bytes": bandwidth / 100, "fits": True}
    about = {"kind": "compiled", "size": "6.7B", "architecture": "retnet", "batch": 4}
    (found,) = inference_cost.cells_of({"some": {**about, "cells": [moved]}})
    assert found.latency == pytest.approx(10)
    assert found.throughput == pytest.approx(400)


def test_report_of_training(places):
    about = {"kind": "compiled", "length": 8192, "remat": "products", "count": 1, "size": "1.3B"}
    flash = {"architecture": "transformer", "device": "TPU v5p", "flash": True}
    plain = {"architecture": "transformer", "device": "H200", "flash": False}
    compiled = [
        about | flash | {"fits": True, "peak_bytes": 3 * 2**30, "kernels": 72},
        about | plain | {"fits": False, "peak_bytes": 300 * 2**30},
    ]
    measured = {
        "kind": "measured",
        "length": 512,
        "rows": 2,
        "machine": {"cores": 2},
        "retnet": {
            "parameters": 10**6,
            "program_bytes": 2**30,
            "seconds": [1.0, 2.0, 4.0],
            "peak_bytes": 2**31,
        },
        "transformer": {"parameters": 10**6, "program_bytes": 2**40},
    }
    text = training_cost.report("small", dict(enumerate([*compiled, measured])))
    assert "| 1.3B, 1 TPU v5p | Transformer, flash | 3.0 | 72 | 38.8 |" in text
    assert "| 1.3B, 1 H200 | Transformer | > 300.0 |  | 74.8 |" in text
    row = "| 512 | 512 (256 to 1,024) | does not fit | does not fit | 2.00 | does not fit |"
    assert row in text
    assert (places / "figures" / "training_cost.png").exists()
