"""How does the loss fall with size, for RetNets and Transformers, and where do they differ?

Four models, RetNet and Transformer, each with and without short convolutions, at four sizes (0.1M
to 2M parameters without the embedding). All have equal parameters (the width of the feed-forward
layers makes up for differences), and read the same tokens: 2M tokens in windows of 256. There are
three seeds, each with an order of its own. The learning rate is swept for each model at the
smallest size (three rates) and the largest (the best of these, and half of it), further while the
best is clearly at an end (`rate_sweeps.py`), with one seed, judged on validation documents, and
interpolated in log size between them. Results are reported on other documents. The run of the best
rate counts as the first seed at these sizes.

The same trained models then answer where the difference lies (`experiments/use_of_context.py`):
loss by class of token, by distance to the last occurrence of a rare pair, by position; associative
recall and copying by distance; and the same during training. For that there are more models at one
size: hybrids with one layer of attention, to all tokens or in a window of 64, whose rates are swept
there; and each model with short convolutions in the windows that the quickstart gives it, which are
not the same tokens.

"RetNet" here is the quickstart's, without or with its short convolutions: wide keys, no rotation,
relu of queries and keys. What each of these changes is another experiment's question.

    taskset -c 0 python -m experiments.perplexity_by_size &
    taskset -c 1 python -m experiments.perplexity_by_size
        72 runs or more, of 3 (0.1M) to 18 minutes (2M), which two processes share: about six hours
    python -m experiments.perplexity_by_size --budget=small     two runs of a few steps: a minute
    python -m experiments.perplexity_by_size --plot_only        draws figures and tables again

The documents of the standard library are those of the Python that runs it; results are of 3.11.7.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import rate_sweeps, size_figures, size_tables
from experiments.recipe import HELD_OUT
from experiments.runs import Records, Run, main
from experiments.use_of_context import measure, while_training
from retnet_jax.config import Config, DataConfig, ModelConfig
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.configs.quickstart import get_config
from retnet_jax.evaluation.tables import Table, as_markdown

BUDGETS = ("small", "2cores")
STEPS, LENGTH, ROWS = 1000, 256, 8  # 2.05M tokens
# Of muon and of Adam, which trains the embedding; at the smallest size.
RATES = (0.02, 0.04, 0.08)
SMALLEST, LARGEST = SWEPT = ("0.1M", "2M")
SEEDS = 3
EXTRA_SIZE, EXTRA_SEEDS = "0.3M", 2
WINDOW = 64  # of the hybrid's attention layer
WATCHED = 100  # steps between evaluations during training


@dataclass(frozen=True)
class Size:
    """Sizes that all models of about equal parameters share."""

    d_model: int
    n_layers: int
    attention_heads: int  # of a Transformer's layer, or a hybrid's; a RetNet's layer has four


SIZES = {
    "0.1M": Size(56, 2, 1),
    "0.3M": Size(96, 2, 2),
    "1M": Size(136, 3, 2),
    "2M": Size(192, 3, 3),
}
MODELS = ("retnet", "retnet_conv", "transformer", "transformer_conv")
# At EXTRA_SIZE only. Hybrids have a sweep of their own there, the others another model's rate.
HYBRIDS = ("hybrid_full", "hybrid_window")
RATE_OF = {
    "retnet_conv_windows": "retnet_conv",
    "transformer_conv_windows": "transformer_conv",
}


def runs(budget: str, records: Records) -> list[Run]:
    """The sweeps, then the runs whose learning rates are known from them, seed by seed."""
    if budget == "small":
        return [make_run(name, "0.1M", 0, RATES[1], budget) for name in MODELS[1::2]]
    sweeps = [(name, size) for size in SWEPT for name in MODELS]
    sweeps += [(name, EXTRA_SIZE) for name in HYBRIDS]
    found = [
        make_run(name, size, 0, rate, budget)
        for name, size in sweeps
        for rate in swept_rates(name, size, records)
    ]
    wanted = [(name, size, SEEDS) for size in SIZES for name in MODELS]
    wanted += [(name, EXTRA_SIZE, EXTRA_SEEDS) for name in (*HYBRIDS, *RATE_OF)]
    for seed in range(SEEDS):
        for name, size, seeds in wanted:
            rate = learning_rate(name, size, records)
            if seed < seeds and rate is not None:
                found.append(make_run(name, size, seed, rate, budget))
    return list({run.name: run for run in found}.values())


def make_run(name: str, size: str, seed: int, rate: float, budget: str) -> Run:
    """One run of a model."""
    config = config_of(name, size, seed, rate)
    if budget == "small":
        config.train.steps = 30
    about = described(name, size, seed, rate, config)
    return Run(
        run_name(name, size, seed, rate),
        config,
        about,
        measure(config, budget),
        [while_training(config, WATCHED)],
    )


def run_name(name: str, size: str, seed: int, rate: float) -> str:
    """The name of a run."""
    return f"{name}_{size}_rate{rate:g}_seed{seed}"


def described(name: str, size: str, seed: int, rate: float, config: Config) -> dict[str, Any]:
    """What tells a run apart, for its record."""
    return {
        "model": name,
        "size": size,
        "seed": seed,
        "rate": rate,
        "non_embedding": non_embedding(config.model),
    }


def config_of(name: str, size: str, seed: int, rate: float) -> Config:
    """The config of a run."""
    config = get_config()
    config.model = model_of(name, SIZES[size])
    length, rows = LENGTH, ROWS
    if name.endswith("_windows"):
        quickstart = get_config(name.partition("_")[0])
        length, rows = quickstart.data.sequence_length, quickstart.train.batch_size
    config.data = DataConfig(
        store="data/stdlib_bpe4096_search", held_out=HELD_OUT, sequence_length=length
    )
    config.optimizer.learning_rate = config.optimizer.muon_learning_rate = rate
    train = {"steps": STEPS, "batch_size": rows, "seed": seed, "log_every": 20}
    config.train = dataclasses.replace(
        config.train, **train, eval_every=STEPS, checkpoint_every=200, keep_checkpoints=1
    )
    config.check()
    return config


def model_of(name: str, size: Size) -> ModelConfig:
    """A model with the parameters, in number, of this size's RetNet with short convolutions."""
    d, heads = size.d_model, size.attention_heads
    retnet = dataclasses.replace(
        get_config().model, d_model=d, key_dim=4 * d, n_layers=size.n_layers
    )
    transformer = dataclasses.replace(
        get_config("transformer").model,
        d_model=d,
        key_dim=2 * d,
        value_dim=2 * d,
        n_layers=size.n_layers,
        n_heads=heads,
    )
    middle = AttentionLayers(layers=(size.n_layers // 2,), n_heads=heads)
    windowed = dataclasses.replace(middle, window=WINDOW)
    models = {
        "retnet": dataclasses.replace(retnet, short_conv=None),
        "retnet_conv": retnet,
        "transformer": dataclasses.replace(transformer, short_conv=None),
        "transformer_conv": transformer,
        "hybrid_full": dataclasses.replace(retnet, attention_layers=(middle,)),
        "hybrid_window": dataclasses.replace(retnet, attention_layers=(windowed,)),
        "retnet_conv_windows": retnet,
        "transformer_conv_windows": transformer,
    }
    return with_parameters(models[name], non_embedding(retnet))


def with_parameters(model: ModelConfig, target: int) -> ModelConfig:
    """A model with `target` parameters without the embedding, by the width of its feed-forward."""
    matrices = 3 if model.ffn_gated else 2
    missing = (target - non_embedding(model)) / (matrices * model.d_model * model.n_layers)
    return dataclasses.replace(model, ffn_dim=model.ffn_width + round(missing))


def non_embedding(model: ModelConfig) -> int:
    """The number of parameters without the embedding, which is the output head too."""
    return model.parameter_count() - model.vocab_size * model.d_model


def learning_rate(name: str, size: str, records: Records) -> float | None:
    """The rate of a model at a size: linear in log size between the best rates of the sweeps.

    None: a sweep that it depends on is not complete.
    """
    if name in HYBRIDS:
        return best_rate(name, size, records)
    name = RATE_OF.get(name, name)
    best = [best_rate(name, swept, records) for swept in SWEPT]
    if size in SWEPT:
        return best[SWEPT.index(size)]
    if None in best:
        return None
    at = [math.log(non_embedding(model_of(name, SIZES[x]))) for x in (size, *SWEPT)]
    return _rounded(float(np.exp(np.interp(at[0], at[1:], np.log(np.array(best, float))))))


def _rounded(rate: float) -> float:
    """Runs are named by their rate, so a small change of a model's size must not change it."""
    return float(f"{rate:.2g}")


def best_rate(name: str, size: str, records: Records) -> float | None:
    """The rate of a sweep with the fewest bits per byte; None: the sweep is not complete."""
    first = _first_rates(name, size, records)
    return rate_sweeps.best_rate(first, loss_of_rate(name, size, records)) if first else None


def swept_rates(name: str, size: str, records: Records) -> list[float]:
    """The rates to try at a size; none as long as they are not known."""
    first = _first_rates(name, size, records)
    return rate_sweeps.rates_to_try(first, loss_of_rate(name, size, records)) if first else []


def _first_rates(name: str, size: str, records: Records) -> tuple[float, ...]:
    """Three rates at the smallest size; elsewhere its best and half of it, once that is known.

    A hybrid's are those of the RetNet with short convolutions, a half and a quarter of it.
    """
    if name in HYBRIDS:
        rate = learning_rate("retnet_conv", size, records)
        return () if rate is None else tuple(_rounded(rate / n) for n in (4, 2, 1))
    if size == SMALLEST:
        return RATES
    best = best_rate(name, SMALLEST, records)
    return () if best is None else (best / 2, best)


def loss_of_rate(name: str, size: str, records: Records) -> rate_sweeps.Loss:
    """Function of a rate: the validation loss of its run with seed 0."""

    def loss(rate: float) -> float | None:
        record = records.get(run_name(name, size, 0, rate))
        if record is None:
            return None
        # A run that diverged is one with the worst loss.
        return record["validation"] if math.isfinite(record["validation"]) else math.inf

    return loss


def chosen(records: Records) -> Records:
    """The records without those of rates that were not chosen."""
    return {
        name: x
        for name, x in records.items()
        if x["rate"] == learning_rate(x["model"], x["size"], records)
    }


def report(budget: str, records: Records) -> str:
    """Draws the figures and returns the tables as Markdown."""
    final = records if budget == "small" else chosen(records)
    if final:
        size_figures.draw(budget, final)
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """The losses and differences, their lines over size, and where the differences lie."""
    final = records if budget == "small" else chosen(records)
    return size_tables.tables(final, records)


if __name__ == "__main__":
    main(sys.modules[__name__])
