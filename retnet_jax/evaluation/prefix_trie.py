"""The tokens of many requests as a trie, in which a shared prefix occurs once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from retnet_jax.errors import ConfigError
from retnet_jax.model.token_ids import checked_ids

# Largest number of tokens of a node; a longer stretch of a trie is a chain of nodes.
LONGEST_NODE = 512


class Request(NamedTuple):
    """A request for log p(continuation | context)."""

    context: Sequence[int]  # token ids; the first one is usually BOS
    continuation: Sequence[int]


class Asked(NamedTuple):
    """The queries of a node that a request needs: those from `first` to `stop`, and `last`."""

    request: int  # index of the request in the given order
    first: int  # index in the node's queries
    stop: int  # index in the node's queries
    last: int  # index in the node's queries


class BranchesOfRow(NamedTuple):
    """Which tokens of a row continue which, as a row of `model.places.Branches`."""

    previous: np.ndarray  # [n]
    place: np.ndarray  # [n]
    until: np.ndarray  # [n]


@dataclass(eq=False)
class Node:
    """A stretch of tokens that is read after the parent's tokens.

    Attributes:
      parent: Parent of the node; None for a root.
      tokens: Token ids, int32 [n].
      children: Nodes that continue this one.
      queries: Probabilities to compute, as pairs of an offset in `tokens` and the next token id.
        First those whose next token is in this node, in order; then those after the last token, one
        for each different next token.
      asked: The queries that each request needs.
      branches: None: each token continues the one before it. A row of branches holds a part of a
        trie (`rows_of_branches.py`); it has no children, and its queries are in no order.
      repeated: Number of the first tokens that were counted in another node already.
    """

    parent: "Node | None"
    tokens: np.ndarray
    children: list["Node"] = field(default_factory=list)
    queries: list[tuple[int, int]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    branches: BranchesOfRow | None = None
    repeated: int = 0

    def __post_init__(self):
        self.level = 0
        if self.parent is not None:
            self.level = self.parent.level + 1
            self.parent.children.append(self)


class PrefixTrie:
    """The tokens that must be read for a list of requests.

    Args:
      requests: Contexts and continuations.
      max_length: Largest number of tokens to read for a request. Longer ones lose their beginning,
        as in lm-evaluation-harness; None: no limit.
      reuse: Whether prefixes are shared; False is for measuring what sharing saves.

    Raises:
      ConfigError: for an empty context or continuation, and for a continuation longer than
        `max_length`.

    Attributes:
      requests: Number of requests.
      roots: Nodes without a parent.
      tokens: Number of tokens to read, over all nodes.
      tokens_unshared: Number of tokens to read if no prefix were shared.
      truncated: Number of requests cut to `max_length`.
    """

    def __init__(
        self, requests: Sequence[Request], max_length: int | None = None, reuse: bool = True
    ):
        rows = [_row(number, *request, max_length) for number, request in enumerate(requests)]
        # Big-endian bytes sort in the order of the ids.
        rows.sort(key=lambda row: row.inputs.astype(">i4").tobytes())
        self.requests = len(rows)
        self.truncated = sum(row.truncated for row in rows)
        self.tokens_unshared = sum(len(row.inputs) for row in rows)
        self.tokens = 0
        self.roots: list[Node] = []
        common = [_common(a.inputs, b.inputs) for a, b in itertools.pairwise(rows)]
        common = np.array([0, *common] if reuse else [0] * len(rows))
        pending = [(None, part, 0) for part in _parts(range(len(rows)), common, 0)]
        while pending:
            parent, part, start = pending.pop()
            first = rows[part.start].inputs
            end = min([len(first), *common[part.start + 1 : part.stop].tolist()])
            sharing = [rows[i] for i in part]
            for begin in range(start, end, LONGEST_NODE):
                node = Node(parent, first[begin : min(end, begin + LONGEST_NODE)])
                _ask(node, begin, sharing)
                self.tokens += len(node.tokens)
                if parent is None:
                    self.roots.append(node)
                parent = node
            ended = sum(len(row.inputs) == end for row in sharing)
            rest = range(part.start + ended, part.stop)
            pending += [(parent, child, end) for child in _parts(rest, common, end)]

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before their children."""
        return nodes_from(self.roots)


def nodes_from(roots: Sequence[Node]) -> Iterator[Node]:
    """The given nodes and all below them, parents before their children."""
    pending = list(roots)
    while pending:
        node = pending.pop()
        yield node
        pending += node.children


class _Row(NamedTuple):
    """A request as a row of inputs: all its tokens except the last, which is only predicted."""

    number: int  # index of the request in the given order
    inputs: np.ndarray
    last: int  # the last token
    scored_from: int  # offset of the last input before the continuation
    truncated: bool


def _row(
    number: int, context: Sequence[int], continuation: Sequence[int], max_length: int | None
) -> _Row:
    for name, tokens in (("context", context), ("continuation", continuation)):
        if not len(checked_ids(tokens, None, f"the {name} of request {number}")):
            raise ConfigError(f"request {number} has an empty {name}: give at least one token")
    if max_length is not None and len(continuation) > max_length:
        raise ConfigError(
            f"request {number} has a continuation of {len(continuation)} tokens, more than "
            f"max_length={max_length}"
        )
    inputs = np.array([*context, *continuation[:-1]], np.int32)
    truncated = max_length is not None and len(inputs) > max_length
    if max_length is not None:
        inputs = inputs[max(0, len(inputs) - max_length) :]
    return _Row(number, inputs, continuation[-1], len(inputs) - len(continuation), truncated)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix of two rows."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _parts(rows: range, common: np.ndarray, length: int) -> list[range]:
    """Divides sorted rows that share `length` tokens into parts that share more."""
    if not rows:
        return []
    inside = common[rows.start + 1 : rows.stop]
    cuts = rows.start + 1 + np.flatnonzero(inside <= length)
    edges = [rows.start, *cuts.tolist(), rows.stop]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _ask(node: Node, start: int, rows: Sequence[_Row]) -> None:
    """Adds the queries of `rows` to a node on their paths, which begins at their offset `start`."""
    end = start + len(node.tokens)
    rows = [row for row in rows if row.scored_from < end]
    if not rows:
        return
    begin = max(0, min(row.scored_from for row in rows) - start)
    inner = range(begin, len(node.tokens) - 1)
    node.queries = [(offset, int(node.tokens[offset + 1])) for offset in inner]
    place = {}
    for row in rows:
        target = int(row.inputs[end]) if end < len(row.inputs) else int(row.last)
        if target not in place:
            place[target] = len(node.queries)
            node.queries.append((len(node.tokens) - 1, target))
        first = max(0, row.scored_from - start) - begin
        node.asked.append(Asked(row.number, first, len(inner), place[target]))
