"""The results of a model, what they say of it, and how those of two models differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from retnet_jax.evaluation.held_out_texts import Text
from retnet_jax.evaluation.recall_probes import RecallResult
from retnet_jax.evaluation.statistics import (
    Difference,
    PerplexityReport,
    PositionBucket,
    paired_difference,
    perplexity_report,
    position_buckets,
    ratio_standard_error,
    standard_error,
    sums,
)
from retnet_jax.evaluation.task_requests import TaskResult

LAST_TOKENS = 128  # that are scored after contexts of several lengths


class TokensRead(NamedTuple):
    """What a task took to read."""

    tokens: int
    without_sharing: int  # what it would have taken without shared prefixes
    truncated: int  # requests that were longer than `Plan.max_length`


class ContextLoss(NamedTuple):
    """The loss on the same last tokens after a context of some length."""

    context: int  # tokens
    documents: int  # that are long enough
    nll_per_token: float  # in nats
    standard_error: float  # of that, over documents


@dataclass(frozen=True)
class Results:
    """What a model gave.

    Attributes:
      text: what perplexity was computed on; None where there is none.
      nll: by protocol, of each document the -log p of its tokens.
      last_nll: by context length, of each document that is long enough the -log p of its last
        `LAST_TOKENS` tokens.
      tasks: by name and shots.
      read: what each of these read.
      recall: of each probe and distance.
    """

    text: Text | None
    nll: dict[str, list[np.ndarray]] = field(default_factory=dict)
    last_nll: dict[int, np.ndarray] = field(default_factory=dict)
    tasks: dict[tuple[str, int], TaskResult] = field(default_factory=dict)
    read: dict[tuple[str, int], TokensRead] = field(default_factory=dict)
    recall: list[RecallResult] = field(default_factory=list)

    @cached_property
    def perplexity(self) -> dict[str, dict[str, PerplexityReport]]:
        """By protocol: the report of all documents as "", and of each source if there are several.

        The sources are stores.
        """
        return {protocol: _by_source(nll, self.text) for protocol, nll in self.nll.items()}

    @cached_property
    def positions(self) -> list[PositionBucket]:
        """The stateful loss by position in the document."""
        return position_buckets(self.nll["stateful"]) if "stateful" in self.nll else []

    @cached_property
    def contexts(self) -> list[ContextLoss]:
        """The loss on the same last tokens by length of context."""
        found = []
        for length, nll in self.last_nll.items():
            each = nll / LAST_TOKENS
            error = standard_error(each)
            found.append(ContextLoss(length, len(each), float(each.mean()), error))
        return found

    @property
    def total_read(self) -> TokensRead:
        """What all tasks took to read."""
        return TokensRead(*np.sum(list(self.read.values()), axis=0).tolist())


def _by_source(nll: Sequence[np.ndarray], text: Text) -> dict[str, PerplexityReport]:
    found = {"": perplexity_report(nll, text.texts, text.byte_counts)}
    sources = list(dict.fromkeys(text.sources))
    for source in sources if len(sources) > 1 else []:
        of_source = np.flatnonzero(np.array(text.sources) == source)
        found[source] = perplexity_report(
            [nll[i] for i in of_source],
            [text.texts[i] for i in of_source],
            text.byte_counts[of_source],
        )
    return found


@dataclass(frozen=True)
class Differences:
    """How much larger the results of one model are than those of another.

    Attributes:
      bits_per_byte: by protocol.
      tasks: by name and shots, then by metric.
    """

    bits_per_byte: dict[str, Difference]
    tasks: dict[tuple[str, int], dict[str, Difference]]


def differences(one: Results, other: Results) -> Differences:
    """The first model's results less the second's, which are of the same documents and rows."""
    return Differences(
        bits_per_byte={
            protocol: bits_difference(nll, other.nll[protocol], one.text)
            for protocol, nll in one.nll.items()
        },
        tasks={
            key: {
                metric: paired_difference(correct, other.tasks[key].correct[metric])
                for metric, correct in found.correct.items()
            }
            for key, found in one.tasks.items()
        },
    )


def bits_difference(
    one: Sequence[np.ndarray], other: Sequence[np.ndarray], text: Text
) -> Difference:
    """How many bits per byte more `one` needs than `other` for the same documents."""
    bits = (sums(one) - sums(other)) / math.log(2)
    mean = float(bits.sum() / text.byte_counts.sum())
    return Difference(mean, ratio_standard_error(bits, text.byte_counts))
