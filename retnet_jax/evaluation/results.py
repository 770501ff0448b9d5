"""The results of a model, statistics of them, and differences of two models."""

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

LAST_TOKENS = 128  # number of tokens scored after contexts of several lengths


class TokensRead(NamedTuple):
    """The number of tokens read for a task."""

    tokens: int
    without_sharing: int  # tokens that would be read without shared prefixes
    truncated: int  # number of requests cut to `Plan.max_length`


class ContextLoss(NamedTuple):
    """The loss on the same last tokens after a context of some length."""

    context: int  # length of the context in tokens
    documents: int  # number of documents that are long enough
    nll_per_token: float  # in nats
    standard_error: float  # of nll_per_token, over documents


@dataclass(frozen=True)
class Results:
    """The results of a model.

    Attributes:
      text: Documents of perplexity and recall; None if the plan needs none.
      nll: -log p of each document's tokens, by protocol.
      last_nll: -log p of the last `LAST_TOKENS` tokens of each document that is long enough, by
        context length.
      tasks: Task results, by name and shots.
      read: Tokens read for each task result.
      recall: Results of each probe and distance.
      apart: Perplexity of the documents in `text.apart`; None: there are none.
    """

    text: Text | None
    nll: dict[str, list[np.ndarray]] = field(default_factory=dict)
    last_nll: dict[int, np.ndarray] = field(default_factory=dict)
    tasks: dict[tuple[str, int], TaskResult] = field(default_factory=dict)
    read: dict[tuple[str, int], TokensRead] = field(default_factory=dict)
    recall: list[RecallResult] = field(default_factory=list)
    apart: "Results | None" = None

    @property
    def documents(self) -> Text:
        """The text, for a plan that needs one (`Plan.needs_text`)."""
        assert self.text is not None
        return self.text

    @cached_property
    def perplexity(self) -> dict[str, dict[str, PerplexityReport]]:
        """Reports by protocol, then by source: "" is all documents, others are single stores.

        Single stores are reported only if there are several.
        """
        return {protocol: _by_source(nll, self.documents) for protocol, nll in self.nll.items()}

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
        """The number of tokens read for all tasks."""
        return TokensRead(*np.sum(list(self.read.values()), axis=0).tolist())


def _by_source(nll: Sequence[np.ndarray], text: Text) -> dict[str, PerplexityReport]:
    found = {"": perplexity_report(nll, text.texts, text.byte_counts)}
    sources = list(dict.fromkeys(text.sources))
    for source in sources if len(sources) > 1 else []:
        of_source = np.flatnonzero(np.array(text.sources) == source).tolist()
        found[source] = perplexity_report(
            [nll[i] for i in of_source],
            [text.texts[i] for i in of_source],
            text.byte_counts[of_source],
        )
    return found


@dataclass(frozen=True)
class Differences:
    """The results of one model minus those of another.

    Attributes:
      bits_per_byte: Differences of perplexity, by protocol.
      tasks: Differences of accuracy, by task and shots, then by metric.
    """

    bits_per_byte: dict[str, Difference]
    tasks: dict[tuple[str, int], dict[str, Difference]]


def differences(one: Results, other: Results) -> Differences:
    """The first model's results minus the second's, on the same documents and rows."""
    return Differences(
        bits_per_byte={
            protocol: bits_difference(nll, other.nll[protocol], one.documents)
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
    """The bits per byte of `one` minus those of `other`, on the same documents."""
    bits = (sums(one) - sums(other)) / math.log(2)
    mean = float(bits.sum() / text.byte_counts.sum())
    return Difference(mean, ratio_standard_error(bits, text.byte_counts))
