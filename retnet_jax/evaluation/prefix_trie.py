"""The tokens of many requests as a trie, in which what several begin with is there once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from retnet_jax.errors import ConfigError
from retnet_jax.model.token_ids import checked_ids

# Most tokens of a node; a longer stretch of a trie is a chain of nodes.
LONGEST_NODE = 512


class Request(NamedTuple):
    """Asks for log p(continuation | context)."""

    context: Sequence[int]  # token ids; the first is BOS or what else opens a text
    continuation: Sequence[int]


class Asked(NamedTuple):
    """What a request wants of a node: its inner queries from `first` on, and `last`."""

    request: int  # its number in the order given
    first: int
    last: int


@dataclass(eq=False)
class Node:
    """A stretch of tokens, read after those of the parent.

    `queries` are the probabilities asked for: an offset in `tokens`, and the id that may come after
    the token there. First those of tokens that follow in the node itself, in order (`inner`), then
    those after its last token, of which there may be several.
    """

    parent: "Node | None"
    tokens: np.ndarray  # int32
    children: list["Node"] = field(default_factory=list)
    queries: list[tuple[int, int]] = field(default_factory=list)
    inner: int = 0  # how many queries are not after the last token
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self):
        self.level = 0
        if self.parent is not None:
            self.level = self.parent.level + 1
            self.parent.children.append(self)


class PrefixTrie:
    """What has to be read for a list of requests.

    Args:
      requests: contexts and continuations.
      max_length: most tokens that may be read for a request. Longer ones lose tokens at their
        beginning, as in lm-evaluation-harness; None: none is too long.
      reuse: False gives each request a path of its own, to see what sharing saves.

    Raises:
      ConfigError: for a context or a continuation without a token, and for a continuation longer
        than `max_length`.

    Attributes:
      requests: how many there are.
      roots: nodes without a parent.
      tokens: to read: those of all nodes.
      tokens_alone: to read if nothing were shared.
      truncated: requests that lost tokens to `max_length`.
    """

    def __init__(
        self, requests: Sequence[Request], max_length: int | None = None, reuse: bool = True
    ):
        rows = [_row(number, *request, max_length) for number, request in enumerate(requests)]
        # Big-endian, so that the order of the bytes is that of the ids.
        rows.sort(key=lambda row: row.inputs.astype(">i4").tobytes())
        self.requests = len(rows)
        self.truncated = sum(row.truncated for row in rows)
        self.tokens_alone = sum(len(row.inputs) for row in rows)
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
        """All of them, parents first."""
        pending = list(self.roots)
        while pending:
            node = pending.pop()
            yield node
            pending += node.children


class _Row(NamedTuple):
    """A request as it is read: all its tokens but the last, which is only predicted."""

    number: int
    inputs: np.ndarray
    last: int
    scored_from: int  # the offset of the input after which the continuation begins
    truncated: bool


def _row(
    number: int, context: Sequence[int], continuation: Sequence[int], max_length: int | None
) -> _Row:
    for name, tokens in (("context", context), ("continuation", continuation)):
        if not len(checked_ids(tokens, None, f"the {name} of request {number}")):
            raise ConfigError(f"request {number} has an empty {name}: at least a token is needed")
    if max_length is not None and len(continuation) > max_length:
        raise ConfigError(
            f"request {number} has a continuation of {len(continuation)} tokens, of which "
            f"max_length={max_length} would lose some; {len(continuation)} or more would do"
        )
    inputs = np.array([*context, *continuation[:-1]], np.int32)
    truncated = max_length is not None and len(inputs) > max_length
    if truncated:
        inputs = inputs[-max_length:]
    return _Row(number, inputs, continuation[-1], len(inputs) - len(continuation), truncated)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _parts(rows: range, common: np.ndarray, length: int) -> list[range]:
    """Sorted rows that share `length` tokens, in parts that share more than that."""
    if not rows:
        return []
    inside = common[rows.start + 1 : rows.stop]
    cuts = rows.start + 1 + np.flatnonzero(inside <= length)
    edges = [rows.start, *cuts.tolist(), rows.stop]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _ask(node: Node, start: int, rows: Sequence[_Row]) -> None:
    """Puts into a node what rows through it ask for; it begins at their offset `start`."""
    end = start + len(node.tokens)
    rows = [row for row in rows if row.scored_from < end]
    if not rows:
        return
    begin = max(0, min(row.scored_from for row in rows) - start)
    inner = range(begin, len(node.tokens) - 1)
    node.inner = len(inner)
    node.queries = [(offset, int(node.tokens[offset + 1])) for offset in inner]
    place = {}
    for row in rows:
        target = int(row.inputs[end]) if end < len(row.inputs) else int(row.last)
        if target not in place:
            place[target] = len(node.queries)
            node.queries.append((len(node.tokens) - 1, target))
        first = max(0, row.scored_from - start) - begin
        node.asked.append(Asked(row.number, first, place[target]))
