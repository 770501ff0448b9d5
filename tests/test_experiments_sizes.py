"""Perplexity by size: classes of tokens, lines and crossings with their errors, learning rates."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import small_config

from experiments import figures, rate_sweeps, size_figures, size_fits, token_classes
from experiments import perplexity_by_size as by_size
from experiments.size_fits import Losses, crossing, crossings, line, seed_deviation
from experiments.size_records import gap_part, paired_losses, sizes_of_pair
from experiments.size_tables import tables
from experiments.token_classes import CLASSES, COMMON, NEW, RARE, SEEN, context_starts, repeats
from experiments.use_of_context import has_fixed_state, loss_by_class, loss_by_distance
from retnet_jax.data.stores import open_or_build
from retnet_jax.evaluation.tables import as_markdown

DOCUMENT = np.array([0, 5, 6, 7, 5, 6, 6, 5, 6])  # d_0 is BOS
NONE = np.zeros(0, np.int64)
ALL_MODELS = (*by_size.MODELS, *by_size.HYBRIDS, *by_size.RATE_OF)


def test_classes_of_a_short_document():
    whole = np.zeros(8, np.int64)
    expected = [NEW, NEW, NEW, SEEN, RARE, SEEN, SEEN, RARE]
    assert token_classes.token_classes(DOCUMENT, whole, NONE).tolist() == expected
    common = token_classes.pairs(np.array([5, 6]))
    found = token_classes.token_classes(DOCUMENT, whole, common)
    assert found.tolist() == [COMMON if x == RARE else x for x in expected]
    # Windows of four inputs: the last one begins at d_4, so d_5 and d_6 are what it shows of 6.
    starts = context_starts(8, 4)
    assert starts.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    found = token_classes.token_classes(DOCUMENT, starts, NONE)
    assert found.tolist() == [NEW, NEW, NEW, SEEN, NEW, SEEN, SEEN, RARE]
    assert repeats(DOCUMENT).distance().tolist() == [0, 0, 0, 0, 3, 0, 0, 3]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_classes_are_what_the_windows_show(ids, length, stride):
    document = np.array(ids)
    starts = context_starts(len(ids) - 1, length, min(stride, length))
    common = np.unique(token_classes.pairs(np.array([0, 1, 2, 3])))
    found = token_classes.token_classes(document, starts, common)
    for i, (start, of_token) in enumerate(zip(starts, found, strict=True), start=1):
        context = ids[start:i]
        assert 1 <= len(context) <= length
        shown = list(itertools.pairwise(context))
        pair = (ids[i - 1], ids[i])
        if pair in shown:
            expected = COMMON if pair in [(0, 1), (1, 2), (2, 3)] else RARE
        else:
            expected = SEEN if ids[i] in context else NEW
        assert of_token == expected


def test_common_pairs_of_a_store(tmp_path):
    config = small_config(tmp_path)
    store = open_or_build(config.data, config.model.vocab_size)
    ids = store.train.read(0, store.train.token_count).tolist()
    counts = Counter(itertools.pairwise(ids))
    expected = [pair for pair, n in counts.items() if n > token_classes.RARE_AT_MOST]
    assert 10 < len(expected) < len(counts)
    found = token_classes.common_pairs(config.data.store)
    assert found.tolist() == sorted(a * 2**32 + b for a, b in expected)


def test_losses_by_class_and_by_distance_are_parts_of_the_whole():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, n) for n in (1, 2, 300, 700)]
    nll = [rng.exponential(size=len(x) - 1).astype(np.float32) for x in documents]
    found = loss_by_class(documents, nll, NONE)
    total = [x.sum() / math.log(2) for x in nll]
    assert np.sum([x["bits"] for x in found.values()], 0) == pytest.approx(total, abs=0.3)
    assert sum(x["tokens"] for x in found.values()) == sum(map(len, nll))
    assert found["common pair"]["tokens"] == 0
    # With the distance as the loss, each bucket's loss is between its bounds.
    distance = [repeats(x).distance().astype(np.float32) for x in documents]
    buckets = loss_by_distance(documents, [x * math.log(2) for x in distance], NONE)
    assert sum(x["tokens"] for x in buckets) == sum((x > 0).sum() for x in distance)
    assert [x["last"] for x in buckets[:3]] == [16, 32, 64]
    for bucket in buckets:
        assert bucket["first"] <= bucket["bits_per_token"] <= bucket["last"]


def test_the_deviation_over_seeds_is_pooled():
    assert seed_deviation([[1.0, 3.0], [7.0, 7.0, 7.0], [4.0]]) == pytest.approx(math.sqrt(2 / 3))
    assert math.isnan(seed_deviation([[1.0], [2.0]]))


def invented(level, slope, seeds, noise, difference_of_documents=0.0):
    """Losses on a line at four sizes, of 60 documents."""
    rng = np.random.default_rng(0)
    parameters = np.array([1e5, 3e5, 1e6, 2e6])
    byte_counts = rng.integers(100, 10_000, 60)
    each = level + slope * np.log10(parameters / 1e6)
    of_documents = difference_of_documents * rng.standard_normal(60)
    of_documents -= (of_documents * byte_counts).sum() / byte_counts.sum()
    bits = [np.tile((x + of_documents) * byte_counts, (seeds, 1)) for x in each]
    return Losses(parameters, bits, byte_counts, noise)


def test_a_line_and_its_errors():
    rng = np.random.default_rng(0)
    exact = size_fits.line_of(invented(1.5, -0.2, 3, 0.0), rng)
    assert (exact.level, exact.slope) == pytest.approx((1.5, -0.2))
    assert (exact.level_error, exact.slope_error) == pytest.approx((0, 0))
    assert exact.residuals == pytest.approx(np.zeros(4))
    # Noise over seeds: the error of least squares.
    noisy = size_fits.line_of(invented(1.5, -0.2, 4, 0.1), rng)
    x = np.log10(np.array([1e5, 3e5, 1e6, 2e6]) / 1e6)
    slope_error = 0.1 / math.sqrt(4) / math.sqrt(((x - x.mean()) ** 2).sum())
    assert noisy.slope_error == pytest.approx(slope_error, rel=0.1)
    # Documents that differ move all sizes together.
    losses = invented(1.5, -0.2, 2, 0.0, difference_of_documents=0.3)
    moved = size_fits.line_of(losses, rng)
    assert moved.slope_error == pytest.approx(0, abs=1e-9)
    assert moved.level_error == pytest.approx(losses.document_errors[0], rel=0.15)


def test_documents_cancel_in_a_difference():
    one = invented(1.6, -0.3, 2, 0.0, difference_of_documents=0.3)
    other = invented(1.5, -0.2, 2, 0.0, difference_of_documents=0.3)
    found = size_fits.difference(one, other)
    assert found.mean == pytest.approx(one.mean - other.mean)
    assert found.errors == pytest.approx(np.zeros(4), abs=1e-9)
    assert min(one.document_errors) > 0.01
    line = size_fits.line_of_difference(one, other, np.random.default_rng(0))
    assert (line.level, line.slope, line.slope_error) == pytest.approx((0.1, -0.1, 0))
    assert crossings(line, 1e5) == pytest.approx((1e7, 1e7, 1e7))


def test_crossings():
    assert crossing(0.1, -0.1, 1e5) == pytest.approx(1e7)
    assert crossing(0.1, 0.1, 1e5) == pytest.approx(1e5)
    assert crossing(0.11, 0.1, 1e5) == math.inf  # the gap is wider at larger sizes
    assert crossing(0.1, 0.0, 1e5) == math.inf
    parameters, draws = np.array([1e5, 1e6]), np.array([[0.2, 0.1], [0.2, 0.3]] * 50)
    found = line(parameters, np.array([0.2, 0.1]), draws)
    assert crossings(found, 1e5) == pytest.approx((1e7, 1e7, math.inf))


def test_all_models_of_a_size_have_equal_parameters():
    for size in by_size.SIZES.values():
        models = {x: by_size.model_of(x, size) for x in ALL_MODELS}
        counts = [by_size.non_embedding(x) for x in models.values()]
        assert max(counts) < 1.005 * min(counts)
        for model in models.values():
            model.check()
        assert not has_fixed_state(models["hybrid_full"])
        assert not has_fixed_state(models["transformer"])
        assert has_fixed_state(models["hybrid_window"])


def test_all_read_equal_tokens():
    for name in ALL_MODELS:
        config = by_size.config_of(name, "1M", 0, 0.04)
        row = config.data.sequence_length
        assert row * config.train.batch_size == by_size.LENGTH * by_size.ROWS
        assert (row == by_size.LENGTH) != name.endswith("_windows")
        assert config.train.steps == by_size.STEPS


def swept(smallest, largest):
    """Records of the sweeps of a model, with the best rate of each size."""
    records = {}
    for size, best in (("0.1M", smallest), ("2M", largest)):
        for rate in by_size.swept_rates("retnet", size, records):
            records[f"retnet_{size}_rate{rate:g}_seed0"] = {"validation": abs(rate - best) / 10}
    return records


def test_learning_rates_between_two_sweeps():
    records = swept(0.08, 0.04)
    assert len(records) == 3 + 2
    rates = [by_size.learning_rate("retnet", size, records) for size in by_size.SIZES]
    assert rates[0] == 0.08 > rates[1] > rates[2] > rates[3] == 0.04
    n = [by_size.non_embedding(by_size.model_of("retnet", x)) for x in by_size.SIZES.values()]
    slope = math.log(0.04 / 0.08) / math.log(n[3] / n[0])
    assert rates[1] == pytest.approx(0.08 * (n[1] / n[0]) ** slope, rel=0.01)
    del records["retnet_2M_rate0.04_seed0"]
    assert by_size.learning_rate("retnet", "0.1M", records) == 0.08
    assert by_size.learning_rate("retnet", "1M", records) is None


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.04, [0.02, 0.04, 0.08]),
        (0.16, [0.02, 0.04, 0.08, 0.16, 0.32]),
        (0.006, [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]),
    ],
)
def test_a_sweep_goes_on_while_the_best_rate_is_at_its_end(best, tried):
    losses = {}
    for _ in range(9):
        rates = rate_sweeps.rates_to_try((0.08, 0.02, 0.04), losses.get)
        if set(rates) <= losses.keys():
            break
        assert rate_sweeps.best_rate((0.02, 0.04, 0.08), losses.get) is None
        losses |= {rate: abs(math.log2(rate / best)) for rate in rates}
    assert rates == tried
    chosen = rate_sweeps.best_rate((0.02, 0.04, 0.08), losses.get)
    assert chosen == rate_sweeps.best_so_far((0.02, 0.04, 0.08), losses.get)
    assert chosen == min(tried, key=losses.get)


def test_a_sweep_does_not_go_on_for_the_difference_of_two_seeds():
    losses = {0.02: 1.834, 0.04: 1.830, 0.08: 1.825}
    assert rate_sweeps.rates_to_try(tuple(losses), losses.get) == list(losses)
    assert rate_sweeps.best_rate(tuple(losses), losses.get) == 0.08


def test_a_run_that_diverged_has_the_worst_loss():
    names = [by_size.run_name("retnet", "0.1M", 0, rate) for rate in by_size.RATES]
    records = {name: {"validation": x} for name, x in zip(names, (math.nan, 1.8, 1.9), strict=True)}
    assert by_size.best_rate("retnet", "0.1M", records) == by_size.RATES[1]


def test_the_run_of_the_best_rate_is_the_first_seed():
    first = [run.name for run in by_size.runs("2cores", {})]
    assert len(first) == 4 * 3
    names = [run.name for run in by_size.runs("2cores", swept(0.04, 0.02))]
    assert names[:12] == first
    # Two rates at the largest size, and the other seeds.
    assert len(set(names)) == len(names) == 12 + 2 + (3 - 1) + 3 + 3 + (3 - 1)
    assert {"retnet_0.1M_rate0.04_seed2", "retnet_2M_rate0.02_seed1"} < set(names)


def invented_record(model, size, parameters, seed, bits):
    byte_counts = [100, 300]
    protocol = {"bits_per_byte": sum(bits) / 400, "bits": bits}
    return {
        **{"name": f"{model}_{size}_{seed}", "model": model, "size": size, "seed": seed},
        **{"rate": 0.04, "non_embedding": parameters, "skipped_steps": 0},
        **{"training_seconds": 1.0, "measuring_seconds": 1.0, "validation": 1.0},
        "held_out": {"bytes": byte_counts, "window": protocol, "longer": protocol},
        "classes": {x: {"tokens": 10, "bits": [y / 4 for y in bits]} for x in CLASSES},
        **{"distances": [], "positions": [], "recall": []},
    }


def test_tables_of_invented_records():
    records = [
        invented_record(model, size, parameters, seed, [bits + seed, 3 * bits + seed])
        for model, worse in (("retnet", 20), ("transformer", 0))
        for size, parameters, better in (("0.1M", 1e5, 0), ("1M", 1e6, 10), ("10M", 1e7, 20))
        for seed in range(2)
        for bits in [200 + worse - better]
    ]
    text = as_markdown(tables({x["name"]: x for x in records}, {}))
    # 20 bits of 100 bytes: the same at every size, and in equal parts in each class.
    row = "| RetNet minus Transformer | 10M | +0.2000 | ± 0.0000 | ± 0.0035 |"
    assert row in text
    assert "| RetNet minus Transformer | 1M | " + "+0.0500 ± 0.0009 | " * 4 + "+0.2000 |" in text
    assert "| RetNet | +2.1025 |" in text
    assert "| -0.1000 |" in text
    named = {x["name"]: x for x in records}
    # Two seeds of a model differ by half a bit in 400 bytes in each class.
    part, error = gap_part(named, "retnet", "transformer", "10M", ["new"])
    assert (part, error) == pytest.approx((0.05, math.hypot(0.5, 0.5) / 400 / 2))
    cells = " | ".join(["+0.200 (+0.20, +0.20)"] * 3)
    assert f"| RetNet minus Transformer | windows | {cells} |" in text
    cells = " | ".join(["+0.100 ± 0.002"] * 3)
    assert f"| RetNet minus Transformer | windows, in repeated pairs | {cells} |" in text


def test_a_difference_is_of_the_seeds_that_both_models_have():
    bits = {"retnet": (204, 200, 260), "transformer": (200, 200)}
    records = [
        invented_record(model, "0.1M", 1e5, seed, [each, 3 * each])
        for model, of_seeds in bits.items()
        for seed, each in enumerate(of_seeds)
    ]
    records.append(invented_record("hybrid_full", "0.1M", 1e5, 7, [200, 600]))
    named = {x["name"]: x for x in records}
    one, other = paired_losses(named, "retnet", "transformer", ["0.1M"], "window")
    assert one.mean - other.mean == pytest.approx([0.02])
    assert gap_part(named, "retnet", "transformer", "0.1M", CLASSES)[0] == pytest.approx(0.01 * 2)
    assert not sizes_of_pair(named, "retnet", "hybrid_full")
    # The deviation is that of all seeds of a model; of two seeds that of all models of the size.
    own = np.std([2.04, 2.0, 2.6], ddof=1)
    assert one.seed_errors == pytest.approx([own / math.sqrt(2)])
    pooled = math.sqrt((2 * own**2 + 0) / 3)
    assert other.seed_errors == pytest.approx([pooled / math.sqrt(2)])


def test_a_crossing_is_given_only_of_a_line_that_fits():
    bits = {"retnet": {1e5: 300, 1e6: 260, 1e7: 220}, "transformer": {1e5: 200, 1e6: 200, 1e7: 200}}
    for bent, expected in ((0, "32M"), (100, "-")):
        bits["retnet"][1e6] = 260 + bent
        records = [
            invented_record(model, f"{size:g}", size, seed, [b + seed, 3 * b + seed])
            for model, by_size in bits.items()
            for size, b in by_size.items()
            for seed in range(2)
        ]
        (lines,) = (
            x for x in tables({x["name"]: x for x in records}, {}) if x.title.startswith("Lines")
        )
        (row,) = (row for row in lines.rows if row[0] == "RetNet minus Transformer")
        assert row[6] == expected


def drawn_record(model, size, parameters, seed):
    bucket = {"first": 0, "last": 15, "bits_per_token": 5.0, "standard_error": 0.1}
    probe = {"distance": 16, "standard_error": 0.04, "nll_per_token": 9.0}
    probes = [{"probe": x, "accuracy": 0.1} | probe for x in ("associative", "copying")]
    watched = {"new": 7.0, "rare pair": 6.0, "associative": 0.2}
    steps = [{"step": step} | watched for step in (100, 200)]
    return invented_record(model, size, parameters, seed, [200.0 + seed, 600.0]) | {
        **{
            "distances": [bucket],
            "positions": [bucket, bucket | {"first": 32_768, "last": 65_535}],
        },
        **{"recall": probes, "evaluations": steps, "tokens": 10**6},
        "options": {"train.steps": 200, "model.vocab_size": 4096},
    }


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_of_one_seed_and_of_several(tmp_path, monkeypatch, seeds):
    monkeypatch.setattr(figures, "OF_SMALL_RUNS", tmp_path)
    records = [
        drawn_record(model, size, parameters, seed)
        for size, parameters in (("0.1M", 1e5), ("0.3M", 3e5))
        for model in (by_size.MODELS if size == "0.1M" else ALL_MODELS)
        for seed in range(seeds)
    ]
    records[-1].pop("evaluations")
    size_figures.draw("small", {x["name"]: x for x in records})
    names = {"loss_by_size", "loss_by_class", "use_of_context", "learning_to_recall"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    assert set(size_figures.STYLES) == set(size_figures.LABELS) == set(ALL_MODELS)
