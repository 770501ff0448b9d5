"""The tokens of a trie in rows that hold several branches each, for models that can read them.

To read the children of a node one after the other takes a copy of the state after the node for
each. A Transformer's state is large, but attention can keep the branches of a row apart by a mask
(`Transformer.hidden_of_branches`), so small parts of a trie are read as one row from one copy.
"""

import itertools
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retnet_jax.evaluation.prefix_trie import Asked, BranchesOfRow, Node, PrefixTrie

# Most tokens of a row that holds a node and all nodes below it.
LONGEST_ROW = 1024
# Several such nodes with the same parent share a row up to this number of tokens. Longer rows
# would be slower: each token's scores are computed for the whole row.
FULL_ROW = 256
# Rows repeat the tokens before them, up to this number, instead of continuing a state.
SHORT_PATH = 32


class _Siblings(NamedTuple):
    """Nodes of a trie with the same parent, and what is read before them."""

    nodes: list[Node]
    before: Node | None  # the node that is read before them; None: there is none
    path: np.ndarray | None  # all tokens before them; None: they are more than SHORT_PATH
    uncounted: int  # how many of these are in no node that is read

    def fit_into_rows(self, below: dict[Node, int]) -> list[bool]:
        """Whether each node, with all below it, fits into a row."""
        room = LONGEST_ROW - (0 if self.path is None else len(self.path))
        return [below[node] <= room for node in self.nodes]


def with_branches(trie: PrefixTrie) -> list[Node]:
    """The roots of nodes with the tokens and queries of a trie, which is not changed.

    Whatever has few tokens below it is in rows of branches. Nodes above them are as in the trie.
    """
    below = _tokens_below(trie)
    roots: list[Node] = []
    pending = [_Siblings(trie.roots, None, np.zeros(0, np.int32), 0)]
    while pending:
        siblings = pending.pop()
        fit = siblings.fit_into_rows(below)
        roots += _rows(list(itertools.compress(siblings.nodes, fit)), siblings, below)
        for node in itertools.compress(siblings.nodes, (not x for x in fit)):
            children = _after(node, siblings)
            repeated = children.path is not None and all(children.fit_into_rows(below))
            if repeated and not node.queries:  # so it need not be read by itself
                uncounted = siblings.uncounted + len(node.tokens)
                pending.append(children._replace(uncounted=uncounted))
                continue
            same = Node(siblings.before, node.tokens, queries=node.queries, asked=node.asked)
            if same.parent is None:
                roots.append(same)
            pending.append(children._replace(before=same))
    return roots


def _after(node: Node, siblings: _Siblings) -> _Siblings:
    """The children of one of the siblings, without a node before them."""
    path = None
    if siblings.path is not None and len(siblings.path) + len(node.tokens) <= SHORT_PATH:
        path = np.concatenate([siblings.path, node.tokens])
    return _Siblings(node.children, None, path, 0)


def _rows(nodes: Sequence[Node], siblings: _Siblings, below: dict[Node, int]) -> list[Node]:
    """Some of the siblings as rows of branches; returns those that are roots."""
    path, uncounted = siblings.path, siblings.uncounted
    repeated = 0 if path is None else len(path)
    roots = []
    for filled in _filled(nodes, below, FULL_ROW - repeated):
        row = _row(filled, below, siblings.before if path is None else None, path)
        row.repeated, uncounted = repeated - uncounted, 0
        if row.parent is None:
            roots.append(row)
    return roots


def _tokens_below(trie: PrefixTrie) -> dict[Node, int]:
    """The number of tokens in each node and all below it."""
    below = {}
    for node in reversed(list(trie.nodes())):
        below[node] = len(node.tokens) + sum(below[child] for child in node.children)
    return below


def _filled(nodes: Sequence[Node], below: dict[Node, int], full: int) -> list[list[Node]]:
    """Divides nodes among rows of at most `full` tokens; a larger node has a row by itself.

    The largest come first, each into the fullest row that has room for it.
    """
    rows: list[list[Node]] = []
    room: list[tuple[int, int]] = []  # of rows that are not full: tokens, index in `rows`
    for node in sorted(nodes, key=lambda x: -below[x]):
        place = bisect_left(room, (below[node], 0))
        if place < len(room):
            space, index = room.pop(place)
            rows[index].append(node)
        else:
            space, index = full, len(rows)
            rows.append([node])
        if space > below[node]:
            insort(room, (space - below[node], index))
    return rows


def _row(
    nodes: Sequence[Node], below: dict[Node, int], parent: Node | None, path: np.ndarray | None
) -> Node:
    """Nodes and all below them as one row of branches, after the tokens of `path`."""
    if path is None:
        path = np.zeros(0, np.int32)
    first = len(path)
    length = first + sum(below[node] for node in nodes)
    tokens, place, until = (np.zeros(length, np.int32) for _ in range(3))
    previous = np.arange(-1, length - 1, dtype=np.int32)
    tokens[:first], place[:first], until[:first] = path, np.arange(first), length
    queries, asked, start = [], [], first
    pending = [(node, first, first - 1) for node in reversed(nodes)]
    while pending:
        node, depth, before = pending.pop()
        stop = start + len(node.tokens)
        tokens[start:stop] = node.tokens
        previous[start] = before
        place[start:stop] = np.arange(depth, depth + len(node.tokens))
        until[start:stop] = start + below[node]
        n = len(queries)
        queries += [(start + offset, target) for offset, target in node.queries]
        asked += [Asked(x.request, n + x.first, n + x.stop, n + x.last) for x in node.asked]
        below_it = depth + len(node.tokens)
        pending += [(child, below_it, stop - 1) for child in reversed(node.children)]
        start = stop
    branches = BranchesOfRow(previous, place, until)
    return Node(parent, tokens, [], queries, asked, branches=branches)
