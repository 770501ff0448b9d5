"""Synthetic probes of a model's memory: associative recall, and copying.

    associative   key-value pairs, then `distance` tokens of other text, then one of the keys: is
                  its value more likely than those of the other keys? (arXiv 2312.04927)
    copying       a span of random tokens, then `distance` tokens of other text, then the first half
                  of the span: does greedy decoding give the second half?

A state of fixed size cannot hold everything, which is considered the weakness of retention. These
probes show up to which distance a model remembers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.prefix_trie import Request
from retnet_jax.evaluation.scoring import Score, score
from retnet_jax.evaluation.statistics import standard_error
from retnet_jax.model import LanguageModel

DISTANCES = (32, 128, 512, 2048, 8192)
PAIRS = 8  # number of key-value pairs
SPAN = 16  # number of tokens in a span; the first half is the cue


@dataclass(frozen=True)
class RecallResult:
    """The result of a probe at one distance."""

    probe: str
    distance: int
    correct: np.ndarray  # whether each trial was correct
    nll_per_token: float  # of the correct answer, in nats
    random: float  # accuracy of guessing

    @property
    def accuracy(self) -> float:
        """The fraction of correct trials."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the accuracy, over trials."""
        return standard_error(self.correct.astype(np.float64))


def recall(
    model: LanguageModel,
    filler: Sequence[int] | np.ndarray,
    *,
    bos_id: int,
    vocab_size: int | None = None,
    distances: Sequence[int] = DISTANCES,
    trials: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[RecallResult]:
    """Runs both probes at each distance.

    Args:
      model: RetNet or Transformer.
      filler: Token ids of some text, from which the text in between is cut; it is repeated if it is
        shorter than a distance.
      bos_id: Token id that begins each trial.
      vocab_size: Keys, values and spans are ids below it; None: the model's vocabulary size.
      distances: Numbers of tokens between the text to remember and the question.
      trials: Number of trials of each probe and distance.
      seed: Seed of the random trials.
      batch_size: As in `score`.
      progress: As in `score`.

    Raises:
      ConfigError: for an empty filler, and for a vocabulary smaller than the keys and values.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if not len(filler):
        raise ConfigError("filler is empty; recall needs text to put before the question")
    if vocab_size <= 2 * PAIRS:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small for {2 * PAIRS} different keys and values"
        )
    results = []
    for distance in distances:
        for number, (probe, make) in enumerate(_MAKERS.items()):
            rng = np.random.default_rng([seed, distance, number])
            requests = []
            for _ in range(trials):
                between = _cut(filler, distance, rng)
                ids = rng.permutation(_apart(between, bos_id, vocab_size))
                requests += make(bos_id, ids, between, rng)
            scores = score(model, requests, batch_size=batch_size, progress=progress)
            results.append(_result(probe, distance, scores, trials, len(requests[0].continuation)))
    return results


def _cut(filler: Sequence[int] | np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    start = rng.integers(len(filler))
    return np.take(np.asarray(filler), range(start, start + length), mode="wrap")


def _apart(between: np.ndarray, bos_id: int, vocab_size: int) -> np.ndarray:
    """Ids that do not occur in the text between, or all ids if these are too few."""
    all_ids = np.setdiff1d(np.arange(vocab_size), [bos_id])
    apart = np.setdiff1d(all_ids, between)
    return apart if len(apart) >= 2 * PAIRS else all_ids


def _associative(bos_id, ids, between, rng) -> list[Request]:
    """Requests for each value after one context; the first value is the correct one."""
    pairs = ids[: 2 * PAIRS].reshape(PAIRS, 2)
    asked = rng.integers(PAIRS)
    context = [bos_id, *pairs.ravel().tolist(), *between.tolist(), int(pairs[asked, 0])]
    values = [pairs[asked, 1], *np.delete(pairs[:, 1], asked)]
    return [Request(context, [int(value)]) for value in values]


def _copying(bos_id, ids, between, rng) -> list[Request]:
    span = rng.choice(ids, SPAN).tolist()
    context = [bos_id, *span, *between.tolist(), *span[: SPAN // 2]]
    return [Request(context, span[SPAN // 2 :])]


_MAKERS = {"associative": _associative, "copying": _copying}


def _result(
    probe: str, distance: int, scores: Sequence[Score], trials: int, answer_length: int
) -> RecallResult:
    log_likelihood = np.array([found.log_likelihood for found in scores]).reshape(trials, -1)
    choices = log_likelihood.shape[1]
    if choices == 1:
        correct = np.array([found.is_greedy for found in scores])
    else:
        correct = log_likelihood[:, 0] > log_likelihood[:, 1:].max(1)
    nll = -log_likelihood[:, 0].mean() / answer_length
    return RecallResult(probe, distance, correct, float(nll), 1 / choices if choices > 1 else 0.0)
