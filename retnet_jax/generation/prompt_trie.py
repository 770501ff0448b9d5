"""Prompts as a trie of pieces, in which a shared prefix occurs once, for any number of requests.

A prompt is cut into pieces of PIECE tokens, the last of which may be shorter. Where the cuts are
depends on the prompt only, and only whole pieces are shared, so sharing does not change a number.
Each piece that has been read is a node with a row of a pool, which has the state after the piece. A
row is kept as long as a request needs it. Then it is kept for later requests with the same prefix,
until another node needs a row: the row that was needed longest ago is taken.

Scoring has a trie of its own (`evaluation/prefix_trie.py`): it knows all requests beforehand, so it
cuts where they differ and never reads a node twice.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

PIECE = 64  # tokens


class Prompted(Protocol):
    """A request, as far as its prompt is read."""

    order: int  # requests that came first are read first
    ids: np.ndarray  # the prompt's tokens [t]


@dataclass(eq=False)
class Node:
    """A piece of a prompt, after the pieces of its ancestors.

    Attributes:
      parent: Node of the piece before; None: the root, which has no tokens.
      tokens: Token ids of the piece, as bytes of int32.
      row: Row of the pool with the state after the piece; None: not read, or no longer there.
      children: Nodes that continue this one, by their tokens.
      waiting: Requests that need this node next, with the number of their pieces up to it.
      holders: Number of requests that need this node's row: they wait for a child, or have no
        further piece.
    """

    parent: "Node | None"
    tokens: bytes
    row: int | None = None
    children: dict[bytes, "Node"] = field(default_factory=dict)
    waiting: list[tuple[Prompted, int]] = field(default_factory=list)
    holders: int = 0


class PromptTrie:
    """Assigns the rows of a pool to the pieces of prompts, and says which piece to read next.

    Args:
      rows: Number of rows of the pool besides row 0, which has the state before all prompts. At
        most this number of requests may be in the trie: from `add` to `release`.

    Attributes:
      ready: Requests whose prompt has been read, with its last node.
      tokens_read: Number of tokens read so far.
    """

    def __init__(self, rows: int):
        self.ready: deque[tuple[Any, Node]] = deque()
        self.tokens_read = 0
        self._root = Node(None, b"", row=0)
        self._free = list(range(rows, 0, -1))
        self._kept: dict[Node, None] = {}  # with a row that no request needs; the oldest first
        self._unread: dict[Node, None] = {}  # with waiting requests

    def add(self, request: Prompted) -> None:
        """Adds a request, which begins after the longest prefix that is in the pool."""
        self._place(request, self._root, 0)

    def next_nodes(self, most: int) -> list[Node]:
        """The unread nodes of the requests that came first."""
        return heapq.nsmallest(most, self._unread, key=lambda node: node.waiting[0][0].order)

    def read(self, node: Node) -> tuple[int, int]:
        """Moves the requests that wait for a node to it.

        Returns:
          The row with the state before the node, and the row for the state after it. The latter may
          be the former, or that before another node of the same batch: all rows must be read before
          one is written.
        """
        parent = node.parent
        assert parent is not None
        assert parent.row is not None
        source = parent.row
        del self._unread[node]
        self.tokens_read += len(node.tokens) // 4
        for _ in node.waiting:
            self._let_go(parent)
        node.row = self._new_row()  # while the node has waiting requests, which keep it in the trie
        waiting, node.waiting = node.waiting, []
        for request, number in waiting:
            self._place(request, node, number)
        return source, node.row

    def release(self) -> None:
        """Removes the first ready request, whose state has been copied."""
        _, node = self.ready.popleft()
        self._let_go(node)

    def _place(self, request: Prompted, node: Node, number: int) -> None:
        """Places a request at the last node on its way that has a row.

        Args:
          request: The request.
          node: A node on its way, with a row.
          number: Number of its pieces up to this node.
        """
        way, pieces = node, -(-len(request.ids) // PIECE)
        for later in range(number + 1, pieces + 1):
            child = way.children.get(_piece(request.ids, later))
            if child is None:
                break
            way = child
            if way.row is not None:
                node, number = way, later
        node.holders += 1
        self._kept.pop(node, None)
        if number == pieces:
            self.ready.append((request, node))
            return
        piece = _piece(request.ids, number + 1)
        if piece not in node.children:
            node.children[piece] = Node(node, piece)
        child = node.children[piece]
        child.waiting.append((request, number + 1))
        self._unread[child] = None

    def _let_go(self, node: Node) -> None:
        node.holders -= 1
        if not node.holders and node is not self._root:
            self._kept[node] = None

    def _new_row(self) -> int:
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._kept))
        del self._kept[oldest]
        row, oldest.row = oldest.row, None
        assert row is not None
        _forget(oldest)
        return row


def _piece(ids: np.ndarray, number: int) -> bytes:
    """A piece of a prompt; the first has number 1."""
    return ids[(number - 1) * PIECE : number * PIECE].tobytes()


def _forget(node: Node) -> None:
    """Removes a node without a row from the trie, and its ancestors, if nothing needs them."""
    while node.parent is not None and node.row is None and not node.children and not node.waiting:
        parent = node.parent
        del parent.children[node.tokens]
        node = parent
