"""Time of scoring tasks with and without shared prefixes, in turn.

    python -m benchmarks.prefix_reuse [--questions=64] [--shots=4] [--rounds=1]

Questions with four choices, as random tokens with the lengths of HellaSwag and ARC. Examples are
drawn for each question, or are the same for all. The models have random parameters, 6 layers of
width 256 and a vocabulary of 2,048: their output head has a tenth of the parameters, as in a model
of 1.3B with 50,000 words. Prints a table and writes benchmarks/results/prefix_reuse_cpu.json.
"""

import dataclasses
import statistics
from functools import partial

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.measure import interleaved_seconds, write_results
from retnet_jax.configs.quickstart import get_config
from retnet_jax.evaluation import PrefixTrie, Request, score_trie
from retnet_jax.model import build_model

QUESTIONS = flags.DEFINE_integer("questions", 64, "Number of questions in a file", 1)
SHOTS = flags.DEFINE_integer("shots", 4, "Number of examples before each question", 0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Batch size of `score`", 1)
ROUNDS = flags.DEFINE_integer("rounds", 1, "Number of timed runs of each kind", 1)
CHOICES = 4
VOCABULARY = 2048
# The smallest and largest number of tokens of a question, and of a choice.
FILES = {"like HellaSwag": ((50, 120), (15, 45)), "like ARC": ((15, 50), (2, 12))}


def requests(file: str, fixed: bool) -> list[Request]:
    """Requests of random tokens with the lengths of a task."""
    rng = np.random.default_rng(0)
    question, choice = FILES[file]

    def text(least, most):
        return rng.integers(1, VOCABULARY, rng.integers(least, most + 1)).tolist()

    def drawn():
        shots = ([*text(*question), *text(*choice)] for _ in range(SHOTS.value))
        return [token for shot in shots for token in shot]

    once, found = drawn(), []
    for _ in range(QUESTIONS.value):
        context = [0, *(once if fixed else drawn()), *text(*question)]
        found += [Request(context, text(*choice)) for _ in range(CHOICES)]
    return found


def measure(model, file: str, fixed: bool) -> dict:
    """Seconds with and without shared prefixes, and their ratio."""
    asked = requests(file, fixed)
    tries = {name: PrefixTrie(asked, reuse=name == "shared") for name in ("shared", "alone")}
    calls = {
        name: partial(score_trie, model, trie, batch_size=BATCH_SIZE.value)
        for name, trie in tries.items()
    }
    seconds = interleaved_seconds(calls, ROUNDS.value)
    pairs = zip(seconds["alone"], seconds["shared"], strict=True)
    return {
        "tokens": {name: trie.tokens for name, trie in tries.items()},
        "seconds": {name: statistics.median(kept) for name, kept in seconds.items()},
        "ratio": statistics.median(alone / shared for alone, shared in pairs),
    }


def main(_) -> None:
    rows = []
    for architecture in ("retnet", "transformer"):
        config = dataclasses.replace(
            get_config(architecture).model, d_model=256, n_layers=6, vocab_size=VOCABULARY
        )
        model = build_model(config, rngs=nnx.Rngs(0))
        for file in FILES:
            for mode in ("per-document", "fixed"):
                row = {"architecture": architecture, "file": file, "shots": mode}
                row |= measure(model, file, mode == "fixed")
                rows.append(row)
                tokens, seconds = row["tokens"], row["seconds"]
                print(
                    f"{architecture:<12}{file:<15}{mode:<13}{tokens['alone']:>9,} tokens in "
                    f"{seconds['alone']:6.2f} s without sharing, {tokens['shared']:>7,} in "
                    f"{seconds['shared']:5.2f} s with: {row['ratio']:.1f} times as fast",
                    flush=True,
                )
                path = write_results(
                    f"prefix_reuse_{jax.default_backend()}",
                    {
                        "questions": QUESTIONS.value,
                        "shots": SHOTS.value,
                        "batch_size": BATCH_SIZE.value,
                        "rows": rows,
                    },
                )
    print(f"written to {path}")


if __name__ == "__main__":
    app.run(main)
