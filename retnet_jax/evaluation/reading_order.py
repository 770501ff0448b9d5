"""In which batches the nodes of a trie are read, and to which sizes they are padded."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count

import numpy as np

from retnet_jax.evaluation.prefix_trie import LONGEST_NODE, Node, nodes_from
from retnet_jax.shapes import power_of_two

LENGTH_STEP = 4
# Largest number of lengths: each is a program, which takes a second to compile.
MOST_LENGTHS = 12
# What one more length costs, in tokens of each row of a batch: one more batch that is not full.
# Scoring "like HellaSwag" with fixed examples (`benchmarks/prefix_reuse.py`) took 1.81 s with 0 and
# 2, 1.89 with 4 and 2.02 with 8.
COST_OF_LENGTH = 2


class Lengths:
    """The lengths to which nodes are padded: few lengths with little padding.

    Args:
      lengths: Number of tokens of each node.
      cost: Number of padded tokens that one more length has to save.
    """

    def __init__(self, lengths: Iterable[int], cost: int):
        found = np.fromiter((-(-x // LENGTH_STEP) for x in lengths), np.int64)
        values, counts = np.unique(found, return_counts=True)
        ends = _best_ends(values, counts, cost / LENGTH_STEP)
        self._sizes = [LENGTH_STEP * int(x) for x in values[ends]]

    def padded(self, length: int) -> int:
        """The length to which a node is padded."""
        return next(x for x in self._sizes if x >= length)


def _best_ends(values: np.ndarray, counts: np.ndarray, cost: float) -> list[int]:
    """Divides sorted values into runs with the least padding to their ends, plus `cost` for each.

    Returns the index of the last value of each run.
    """
    n = len(values)
    nodes = np.concatenate([[0], np.cumsum(counts)])
    # padded[i] is the padded sum of the first i values; one more run in each round.
    padded, chosen, totals = np.where(np.arange(n + 1) > 0, np.inf, 0.0), [], []
    for number in range(1, min(n, MOST_LENGTHS) + 1):
        # From i values on, up to j: [i j].
        through = padded[:-1, None] + values[None, :] * (nodes[None, 1:] - nodes[:-1, None])
        through[np.tril_indices(n, -1)] = np.inf
        chosen.append(through.argmin(0))
        padded = np.concatenate([[0.0], through.min(0)])
        totals.append(padded[-1] + cost * number)
    ends, end = [], n
    for begins in reversed(chosen[: int(np.argmin(totals)) + 1]):
        ends.append(end - 1)
        end = int(begins[end - 1])
    return ends[::-1]


class Schedule:
    """The nodes below some roots in batches of similar length, parents before their children.

    Full batches come first, and among them the one with the deepest node, which frees states. If no
    batch is full, the deepest waiting nodes are read, which may add children. Thus fewer nodes than
    a batch wait for each length, and their states are those of a few batches.

    The nodes of a batch are all rows of branches, or none is; and all begin with the first token or
    none does, if they are rows of branches.
    """

    def __init__(self, roots: Sequence[Node], batch_size: int):
        lengths = defaultdict(list)
        for node in nodes_from(roots):
            lengths[_kind(node)].append(len(node.tokens))
        self._lengths = {}
        for kind, found in lengths.items():
            self._lengths[kind] = Lengths(found, COST_OF_LENGTH * batch_size)
        self._roots = roots
        self._batch_size = batch_size

    def padded(self, node: Node) -> int:
        """The length to which a node is padded, at least."""
        return self._lengths[_kind(node)].padded(len(node.tokens))

    def rows(self, nodes: int, length: int) -> int:
        """Number of rows of a batch with `nodes` nodes of some padded length, a power of two."""
        return min(self._most(length), power_of_two(nodes))

    def _most(self, length: int) -> int:
        """The largest number of rows: fewer, if they are rows of branches longer than nodes."""
        return max(1, self._batch_size * min(length, LONGEST_NODE) // length)

    def __iter__(self) -> Iterator[list[Node]]:
        """Yields the batches."""
        ready, order = defaultdict(list), count()

        def add(node: Node) -> None:
            key = _kind(node), self.padded(node)
            heappush(ready[key], (-node.level, next(order), node))

        for node in self._roots:
            add(node)
        while waiting := [key for key, heap in ready.items() if heap]:
            key = max(
                waiting, key=lambda x: (len(ready[x]) >= self._most(x[1]), -ready[x][0][0], x)
            )
            kind, length = key
            most = self._most(length)
            batch = [heappop(ready[key])[-1] for _ in range(min(most, len(ready[key])))]
            # Shorter nodes fill the rows that would otherwise be padding.
            for shorter in sorted((x for x in waiting if x[0] == kind and x < key), reverse=True):
                while ready[shorter] and len(batch) < self.rows(len(batch), length):
                    batch.append(heappop(ready[shorter])[-1])
            yield batch
            for node in batch:
                for child in node.children:
                    add(child)


def _kind(node: Node) -> str:
    if node.branches is None:
        return "node"
    return "branches from the first token" if node.parent is None else "branches"
