"""What it saves that shared prefixes are read once: scoring with and without, in turn.

    python -m benchmarks.prefix_reuse [--questions=64] [--shots=4] [--choices=4] [--rounds=3]

Requests like HellaSwag's: examples of about 115 tokens, a question of 50 to 120, choices of 15 to
45. The examples are drawn for each question, or are the same for all. The model is that of
configs/quickstart.py with random parameters, and a Transformer of its size.
Prints a table and writes benchmarks/results/prefix_reuse_cpu.json.
"""

import statistics
from functools import partial

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.measure import interleaved_seconds, write_results
from configs.quickstart import get_config
from retnet_jax.evaluation import PrefixTrie, Request, score_trie
from retnet_jax.model import build_model

QUESTIONS = flags.DEFINE_integer("questions", 64, "of the file", 1)
SHOTS = flags.DEFINE_integer("shots", 4, "examples before each question", 0)
CHOICES = flags.DEFINE_integer("choices", 4, "of each question", 1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "as in `score`", 1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "timed runs of each", 1)


def requests(fixed: bool, vocab_size: int) -> list[Request]:
    """Random tokens in the shape of a task."""
    rng = np.random.default_rng(0)

    def text(least, most):
        return rng.integers(1, vocab_size, rng.integers(least, most + 1)).tolist()

    found, examples = [], None
    for _ in range(QUESTIONS.value):
        if examples is None or not fixed:
            examples = [token for _ in range(SHOTS.value) for token in text(65, 165)]
        context = [0, *examples, *text(50, 120)]
        found += [Request(context, text(15, 45)) for _ in range(CHOICES.value)]
    return found


def main(_) -> None:
    rows = []
    for architecture in ("retnet", "transformer"):
        config = get_config(architecture).model
        model = build_model(config, rngs=nnx.Rngs(0))
        for mode in ("per-document", "fixed"):
            asked = requests(mode == "fixed", config.vocab_size)
            tries = {name: PrefixTrie(asked, reuse=name == "on") for name in ("on", "off")}
            calls = {
                name: partial(score_trie, model, trie, batch_size=BATCH_SIZE.value)
                for name, trie in tries.items()
            }
            seconds = interleaved_seconds(calls, ROUNDS.value)
            row = {
                "architecture": architecture,
                "shots": mode,
                "tokens": {name: trie.tokens for name, trie in tries.items()},
                "seconds": {name: statistics.median(kept) for name, kept in seconds.items()},
                "ratio": statistics.median(
                    off / on for on, off in zip(seconds["on"], seconds["off"], strict=True)
                ),
            }
            rows.append(row)
            print(
                f"{architecture:<12} {mode:<13} {row['tokens']['off']:>9,} tokens alone, "
                f"{row['tokens']['on']:>8,} shared; {row['seconds']['off']:7.2f} s and "
                f"{row['seconds']['on']:6.2f} s: {row['ratio']:.1f} times as fast",
                flush=True,
            )
    settings = {name: flags.FLAGS[name].value for name in ("questions", "shots", "choices")}
    path = write_results(
        f"prefix_reuse_{jax.default_backend()}",
        settings | {"batch_size": BATCH_SIZE.value, "rows": rows},
    )
    print(f"written to {path}")


if __name__ == "__main__":
    app.run(main)
