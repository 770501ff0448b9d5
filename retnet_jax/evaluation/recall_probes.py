"""Synthetic probes of what a model still knows of a text it has read: recall and copying.

    associative   pairs of a key and a value, then `distance` tokens of other text, then one of the
                  keys: is its value likelier than those of the other keys? (arXiv 2312.04927)
    copying       a span of random tokens, then `distance` tokens of other text, then the first half
                  of the span: is the second half what the model itself would write?

A state of one size cannot hold everything, and this is where retention is said to be weak; these
probes say from which distance on.
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
PAIRS = 8  # keys, each with a value
SPAN = 16  # tokens that are copied, the first half of which is the cue


@dataclass(frozen=True)
class RecallResult:
    """What a probe found at one distance."""

    probe: str
    distance: int
    correct: np.ndarray  # of each trial
    nll_per_token: float  # of the right answer, in nats
    random: float  # the share that guessing gets right

    @property
    def accuracy(self) -> float:
        """The share of trials that are right."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, over trials."""
        return standard_error(self.correct.astype(np.float64))


def recall(
    model: LanguageModel,
    filler: Sequence[int],
    *,
    bos_id: int,
    vocab_size: int | None = None,
    distances: Sequence[int] = DISTANCES,
    trials: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[RecallResult]:
    """Both probes at each distance.

    Args:
      model: RetNet or Transformer.
      filler: token ids of some text, from which what lies between is cut; a text shorter than a
        distance is repeated.
      bos_id: opens each trial.
      vocab_size: keys, values and spans are ids below it; None: all that the model knows.
      distances: tokens between what is to be remembered and the question.
      trials: of each probe and distance.
      seed: of all that is drawn.
      batch_size: as in `score`.
      progress: as in `score`.

    Raises:
      ConfigError: for an empty filler, and a vocabulary too small for different keys and values.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if not len(filler):
        raise ConfigError("recall needs text to put between: the filler is empty")
    if vocab_size <= 2 * PAIRS:
        raise ConfigError(f"vocab_size={vocab_size} has no {2 * PAIRS} different keys and values")
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


def _cut(filler: Sequence[int], length: int, rng: np.random.Generator) -> np.ndarray:
    start = rng.integers(len(filler))
    return np.take(np.asarray(filler), range(start, start + length), mode="wrap")


def _apart(between: np.ndarray, bos_id: int, vocab_size: int) -> np.ndarray:
    """Ids that the text between does not have, if there are enough of them."""
    all_ids = np.setdiff1d(np.arange(vocab_size), [bos_id])
    apart = np.setdiff1d(all_ids, between)
    return apart if len(apart) >= 2 * PAIRS else all_ids


def _associative(bos_id, ids, between, rng) -> list[Request]:
    """One context, and a request for each value; the first is the right one."""
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
