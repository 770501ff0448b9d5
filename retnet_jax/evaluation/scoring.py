"""Log-likelihoods of continuations. What requests begin with alike is read once.

    score(model, [(context_ids, continuation_ids), ...])  ->  [(log-likelihood, is_greedy), ...]

The requests' tokens are a trie (`prefix_trie.py`). Its nodes are read in chunkwise form, many at
once, each from the state that its parent left: a RetNet's state is one array, so a prompt is read
once for all questions, and a question once for all its answers. A Transformer does the same with
its cache. States wait in a pool of slots until all children have been read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation.prefix_trie import LONGEST_NODE, Node, PrefixTrie, Request
from retnet_jax.model import LanguageModel, State
from retnet_jax.model.parameters import why_not_finite
from retnet_jax.ops.cross_entropy import logits_at_once
from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Array, Bool, Float, Int, power_of_two

# Few shapes are compiled: tokens and queries of nodes are padded to these sizes (a request can ask
# for more than a node has tokens: see `_padded`), and batches to powers of two. With powers of two
# alone half of what is read is padding where questions have 50 to 120 tokens; with these a fifth.
_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, LONGEST_NODE)
_FEWEST_QUERIES = 8


class Score(NamedTuple):
    """What a model thinks of a continuation."""

    log_likelihood: float  # log p(continuation | context), in nats
    is_greedy: bool  # whether each of its tokens is the likeliest


def score(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """The log-likelihood of each continuation after its context, in the order of the requests.

    The log-softmax is float32, sums are float64. On a mesh (`jax.set_mesh`) rows are split.

    Args:
      model: RetNet or Transformer.
      requests: token ids of context and continuation; the model reads nothing before a context, so
        it opens with BOS where texts do.
      batch_size: nodes of the trie that are read at once. There are states of about three times as
        many.
      max_length: as in `PrefixTrie`.
      progress: called with the number of tokens read since the last call, of those that
        `PrefixTrie(requests).tokens` says.

    Raises:
      ConfigError: as `PrefixTrie`, and for an id that the model does not know.
      CheckpointError: for a model whose probabilities are not finite.
    """
    for number, request in enumerate(requests):
        if not isinstance(request, Sequence) or len(request) != 2:
            raise ConfigError(
                f"request {number} is {str(request)[:40]!r}, no pair of a context and a "
                "continuation such as ([256, 72], [101])"
            )
    trie = PrefixTrie([Request(*request) for request in requests], max_length)
    return score_trie(model, trie, batch_size=batch_size, progress=progress)


def score_trie(
    model: LanguageModel,
    trie: PrefixTrie,
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """As `score`, of requests that are a trie already."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is less than 1")
    _check_ids(trie, model.config.vocab_size)
    log_likelihood = np.zeros(trie.requests)
    is_greedy = np.ones(trie.requests, bool)

    def collect(batch: list[Node], answers: tuple[Array, Array]) -> None:
        log_p, greedy = (np.asarray(x) for x in answers)
        for row, node in enumerate(batch):
            for request, first, last in node.asked:
                log_likelihood[request] += log_p[row, first : node.inner].sum(dtype=np.float64)
                log_likelihood[request] += log_p[row, last]
                is_greedy[request] &= greedy[row, first : node.inner].all() & greedy[row, last]
        progress(sum(len(node.tokens) for node in batch))

    pool = _Pool(model, batch_size, _capacity(trie))
    # One batch is awaited while the next is computed.
    waiting = None
    for batch in _schedule(trie, batch_size):
        answers = pool.read(batch)
        if waiting is not None:
            collect(*waiting)
        waiting = batch, answers
    if waiting is not None:
        collect(*waiting)
    wrong = np.flatnonzero(~np.isfinite(log_likelihood))
    if len(wrong):
        raise CheckpointError(
            f"{len(wrong)} of {trie.requests} requests, the first of them request {wrong[0]}, "
            f"have no finite log-likelihood from this model: {why_not_finite(model)}"
        )
    return [
        Score(float(x), bool(greedy)) for x, greedy in zip(log_likelihood, is_greedy, strict=True)
    ]


def _check_ids(trie: PrefixTrie, vocab_size: int) -> None:
    for node in trie.nodes():
        ids = [*node.tokens[[node.tokens.argmin(), node.tokens.argmax()]].tolist()]
        ids += [target for _, target in node.queries[node.inner :]]
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"a request has the token id {token}, but the model knows ids from 0 to "
                    f"{vocab_size - 1}; is the tokenizer another model's?"
                )


def _schedule(trie: PrefixTrie, batch_size: int) -> Iterator[list[Node]]:
    """All nodes in batches of about one length, parents before their children.

    A batch is full where it can be, and of the full ones the deepest comes first: it frees states.
    Otherwise shallower nodes are read until there are more children. So a length has less than a
    batch of nodes waiting, and what waits has states of a few batches.
    """
    ready, order = defaultdict(list), count()

    def add(node):
        heappush(ready[_padded(len(node.tokens))], (-node.level, next(order), node))

    for node in trie.roots:
        add(node)
    while waiting := [length for length, heap in ready.items() if heap]:
        length = max(waiting, key=lambda x: (len(ready[x]) >= batch_size, -ready[x][0][0], x))
        batch = [heappop(ready[length])[-1] for _ in range(min(batch_size, len(ready[length])))]
        # Rows that would be padding are filled with shorter nodes.
        for shorter in sorted((x for x in waiting if x < length), reverse=True):
            while ready[shorter] and len(batch) < _rows(len(batch), batch_size):
                batch.append(heappop(ready[shorter])[-1])
        yield batch
        for node in batch:
            for child in node.children:
                add(child)


class _Slots:
    """Which row of the pool has the state of which node.

    A node has a slot from when it is read until its last child is. Two more belong to no node.

    Attributes:
      free: slots that no node has.
      used: of each slot, places of a Transformer's cache that are in use.
    """

    START = 0  # the state before the first token, from which roots are read; never written
    UNUSED = 1  # takes the states that nobody reads: of leaves, and of rows that are padding

    def __init__(self, nodes: int):
        self.free = list(range(nodes + 1, self.UNUSED, -1))
        self.used = [0] * (nodes + 2)
        self._of: dict[Node, int] = {}
        self._unread: dict[Node, int] = {}  # children of the nodes that have a slot

    def __len__(self) -> int:
        return len(self.used)

    def before(self, node: Node) -> int:
        """The slot with the state that a node is read from."""
        return self._of.get(node.parent, self.START)

    def has_read(self, node: Node) -> None:
        """Frees the slot of a node's parent, if this was its last child."""
        if node.parent is None:
            return
        self._unread[node.parent] -= 1
        if not self._unread[node.parent]:
            del self._unread[node.parent]
            self.free.append(self._of.pop(node.parent))

    def give(self, node: Node, used: int) -> int:
        """A free slot for a node with children."""
        slot = self._of[node] = self.free.pop()
        self._unread[node] = len(node.children)
        self.used[slot] = used
        return slot

    def double(self) -> None:
        """As many slots again, all free."""
        count = len(self)
        self.free += range(2 * count - 1, count - 1, -1)
        self.used += [0] * count


class _Pool:
    """The states of nodes whose children are still to be read, a row of one batch for each."""

    def __init__(self, model: LanguageModel, batch_size: int, capacity: int):
        self._model = model
        self._batch_size = batch_size
        self._capacity = capacity  # of a Transformer's cache
        self.slots = _Slots(2 * batch_size)
        self._state = model.init_state(len(self.slots), capacity)

    def read(self, batch: Sequence[Node]) -> tuple[Float[Array, "b s"], Bool[Array, "b s"]]:
        """Reads nodes, and answers their queries: log p of the target, whether it is likeliest."""
        rows = _rows(len(batch), self._batch_size)
        length = _padded(max(len(node.tokens) for node in batch))
        asked = max(len(node.queries) for node in batch)
        asked = _FEWEST_QUERIES if asked <= _FEWEST_QUERIES else _padded(asked)
        tokens = np.zeros((rows, length), np.int32)
        counts = np.zeros(rows, np.int32)
        queries = np.zeros((rows, asked, 2), np.int32)
        for row, node in enumerate(batch):
            tokens[row, : len(node.tokens)] = node.tokens
            counts[row] = len(node.tokens)
            queries[row, : len(node.queries)] = np.reshape(node.queries, (-1, 2))
        sources, targets = self._places(batch, length)
        rest = rows - len(batch)
        self._state, answers = _read(
            self._model,
            self._state,
            np.array(sources + [_Slots.START] * rest),
            np.array(targets + [_Slots.UNUSED] * rest) if set(targets) != {_Slots.UNUSED} else None,
            tokens,
            counts,
            queries,
        )
        return answers

    def _places(self, batch: Sequence[Node], length: int) -> tuple[list[int], list[int]]:
        """The slots that nodes start from, and those that their states go to."""
        sources = [self.slots.before(node) for node in batch]
        for node in batch:
            self.slots.has_read(node)
        after = max(self.slots.used[source] for source in sources) + length
        if after > self._capacity:
            self._capacity = power_of_two(after)
            self._state = self._state.with_capacity(self._capacity)
        return sources, [self._target(node, after) for node in batch]

    def _target(self, node: Node, used: int) -> int:
        if not node.children:
            return _Slots.UNUSED
        if not self.slots.free:
            count = len(self.slots)
            more = self._model.init_state(2 * count, self._capacity)
            self._state = more.put(jnp.arange(count), self._state)
            self.slots.double()
        return self.slots.give(node, used)


@partial(jax.jit, donate_argnames="pool")
def _read(
    model: LanguageModel,
    pool: State,
    sources: Int[Array, " b"],
    targets: Int[Array, " b"] | None,
    tokens: Int[Array, "b t"],
    counts: Int[Array, " b"],
    queries: Int[Array, "b s 2"],
) -> tuple[State, tuple[Float[Array, "b s"], Bool[Array, "b s"]]]:
    """The pool after reading tokens from the slots `sources` on into `targets`; and the answers."""
    segment_ids = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)
    hidden, state = model.hidden(constrain(tokens, "bt"), pool.take(sources), segment_ids)
    if targets is not None:
        pool = pool.put(targets, state)
    offsets, ids = queries[..., 0], queries[..., 1]
    asked = jnp.take_along_axis(hidden, offsets[..., None], axis=1)
    answers = _answers(model, asked, ids)
    return pool, jax.tree.map(lambda x: constrain(x, "  "), answers)  # whole, for every process


def _answers(
    model: LanguageModel, hidden: Float[Array, "b s d"], ids: Int[Array, "b s"]
) -> tuple[Float[Array, "b s"], Bool[Array, "b s"]]:
    """The log p of ids, and whether each is the likeliest, with the logits of a part at a time."""
    b, s, d = hidden.shape
    part = s
    while part % 2 == 0 and b * part * model.config.vocab_size > logits_at_once():
        part //= 2

    def of_part(inputs):
        hidden, ids = inputs
        logits = model.logits(hidden)
        log_p = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        log_p -= jax.nn.logsumexp(logits, axis=-1)
        return log_p, logits.argmax(-1) == ids

    if part == s:
        return of_part((hidden, ids))
    parts = (
        hidden.reshape(b, s // part, part, d).swapaxes(0, 1),
        ids.reshape(b, s // part, part).swapaxes(0, 1),
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, s), jax.lax.map(of_part, parts))


def _capacity(trie: PrefixTrie) -> int:
    """Slots of a cache for the longest path through a trie, whose nodes are padded."""
    end, longest = {}, 1
    for node in trie.nodes():
        end[node] = end.get(node.parent, 0) + _padded(len(node.tokens))
        longest = max(longest, end[node])
    return -(-longest // 128) * 128


def _padded(size: int) -> int:
    return next((x for x in _SIZES if x >= size), power_of_two(size))


def _rows(nodes: int, batch_size: int) -> int:
    """Rows of a batch of so many nodes: a power of two, or what a full batch has."""
    return min(batch_size, power_of_two(nodes))
