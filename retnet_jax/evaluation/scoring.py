"""Log-likelihoods of continuations; shared prefixes of the requests are read once.

    score(model, [(context_ids, continuation_ids), ...])  ->  [(log-likelihood, is_greedy), ...]

The tokens of the requests form a trie (`prefix_trie.py`). Its nodes are read in chunkwise form, in
batches (`reading_order.py`), each from the state after its parent. A RetNet's state is one array,
so a prompt is read once for all questions, and a question once for all its answers. The state after
a node is kept in a slot of a pool until all children have been read. A Transformer does the same
with its cache; but what fits into a row is read as a row of branches (`rows_of_branches.py`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation.prefix_trie import Node, PrefixTrie, Request, nodes_from
from retnet_jax.evaluation.reading_order import Schedule
from retnet_jax.evaluation.rows_of_branches import with_branches
from retnet_jax.model import LanguageModel, State, Transformer
from retnet_jax.model.parameters import why_not_finite
from retnet_jax.model.places import Branches
from retnet_jax.ops.cross_entropy import logits_at_once
from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Array, Bool, Float, Int, power_of_two

# Numbers of queries are padded to these sizes, larger ones to powers of two.
_QUERIES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Answers(NamedTuple):
    """The answers to the queries of a batch of nodes; padding where a node has fewer."""

    log_p: Float[Array, "b s"]  # of each query's next token
    is_argmax: Bool[Array, "b s"]  # whether that token is the most likely one


class Score(NamedTuple):
    """The score of a continuation."""

    log_likelihood: float  # log p(continuation | context), in nats
    is_greedy: bool  # whether greedy decoding would give the continuation


def score(
    model: LanguageModel,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """The log-likelihood of each continuation after its context, in the order of the requests.

    The log-softmax is float32, sums are float64. On a mesh (`jax.set_mesh`) batches are split over
    the devices.

    Args:
      model: RetNet or Transformer.
      requests: Token ids of contexts and continuations. Nothing is added before a context, so it
        should begin with BOS.
      batch_size: Number of nodes of the trie read at once. About three times this number of states
        is kept.
      max_length: As in `PrefixTrie`.
      progress: Called with the number of tokens read since the last call; in total
        `PrefixTrie(requests).tokens`.

    Raises:
      ConfigError: as `PrefixTrie`, and for an id unknown to the model.
      CheckpointError: for a model whose probabilities are not finite.
    """
    for number, request in enumerate(requests):
        if not isinstance(request, Sequence) or len(request) != 2:
            raise ConfigError(
                f"request {number} is {str(request)[:40]!r}, not a pair of context and "
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
    """As `score`, for a given trie of requests."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is less than 1")
    _check_ids(trie, model.config.vocab_size)
    log_likelihood = np.zeros(trie.requests)
    is_greedy = np.ones(trie.requests, bool)

    def collect(batch: list[Node], answers: Answers) -> None:
        log_p, greedy = (np.asarray(x) for x in answers)
        for row, node in enumerate(batch):
            for request, first, stop, last in node.asked:
                log_likelihood[request] += log_p[row, first:stop].sum(dtype=np.float64)
                log_likelihood[request] += log_p[row, last]
                is_greedy[request] &= greedy[row, first:stop].all() & greedy[row, last]
        progress(sum(len(node.tokens) - node.repeated for node in batch))

    roots = with_branches(trie) if isinstance(model, Transformer) else trie.roots
    schedule = Schedule(roots, batch_size)
    pool = _Pool(model, schedule, batch_size, _capacity(roots, schedule))
    # The results of a batch are fetched while the next batch is computed.
    waiting = None
    for batch in schedule:
        answers = pool.read(batch)
        if waiting is not None:
            collect(*waiting)
        waiting = batch, answers
    if waiting is not None:
        collect(*waiting)
    wrong = np.flatnonzero(~np.isfinite(log_likelihood))
    if len(wrong):
        raise CheckpointError(
            f"the model's probabilities are not finite for {len(wrong)} of {trie.requests} "
            f"requests (first: request {wrong[0]}): {why_not_finite(model)}"
        )
    return [
        Score(float(x), bool(greedy)) for x, greedy in zip(log_likelihood, is_greedy, strict=True)
    ]


def _check_ids(trie: PrefixTrie, vocab_size: int) -> None:
    for node in trie.nodes():
        ids = [*node.tokens[[node.tokens.argmin(), node.tokens.argmax()]].tolist()]
        ids += [target for _, target in node.queries]
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ConfigError(
                    f"a request has the token id {token}, but the model knows ids from 0 to "
                    f"{vocab_size - 1}; does the tokenizer belong to another model?"
                )


class _Slots:
    """Assigns the slots of the pool to nodes.

    A node has a slot from the time it is read until its last child is read. Two slots are special:

      START: The state before the first token, from which roots are read; never written.
      UNUSED: Receives the states that are never read: of leaves, and of padding rows.

    Attributes:
      free: Slots of no node.
      used: For each slot, the number of used places of a Transformer's cache.
    """

    START = 0
    UNUSED = 1

    def __init__(self, nodes: int):
        self.free = list(range(nodes + 1, self.UNUSED, -1))
        self.used = [0] * (nodes + 2)
        self._of: dict[Node, int] = {}
        self._unread: dict[Node, int] = {}  # children of the nodes that have a slot

    def __len__(self) -> int:
        return len(self.used)

    def before(self, node: Node) -> int:
        """The slot with the state from which a node is read."""
        return self.START if node.parent is None else self._of.get(node.parent, self.START)

    def has_read(self, node: Node) -> None:
        """Frees the slot of a node's parent if this was its last unread child."""
        if node.parent is None:
            return
        self._unread[node.parent] -= 1
        if not self._unread[node.parent]:
            del self._unread[node.parent]
            self.free.append(self._of.pop(node.parent))

    def give(self, node: Node, used: int) -> int:
        """Assigns a free slot to a node with children."""
        slot = self._of[node] = self.free.pop()
        self._unread[node] = len(node.children)
        self.used[slot] = used
        return slot

    def double(self) -> None:
        """Doubles the number of slots; the new ones are free."""
        count = len(self)
        self.free += range(2 * count - 1, count - 1, -1)
        self.used += [0] * count


class _Pool:
    """The states of nodes with unread children, each a row of one batched state."""

    def __init__(self, model: LanguageModel, schedule: Schedule, batch_size: int, capacity: int):
        self._model = model
        self._schedule = schedule
        self._capacity = capacity  # of a Transformer's cache
        self.slots = _Slots(2 * batch_size)
        self._state: Any = None  # one kind of `State`

    def read(self, batch: Sequence[Node]) -> Answers:
        """Reads nodes, and answers their queries."""
        length = max(self._schedule.padded(node) for node in batch)
        rows = self._schedule.rows(len(batch), length)
        asked = max(len(node.queries) for node in batch)
        asked = next((x for x in _QUERIES if x >= asked), power_of_two(asked))
        tokens = np.zeros((rows, length), np.int32)
        queries = np.zeros((rows, asked, 2), np.int32)
        for row, node in enumerate(batch):
            tokens[row, : len(node.tokens)] = node.tokens
            queries[row, : len(node.queries)] = np.reshape(node.queries, (-1, 2))
        if batch[0].branches is not None:
            return self._read_branches(batch, tokens, queries)
        counts = np.zeros(rows, np.int32)
        counts[: len(batch)] = [len(node.tokens) for node in batch]
        sources = self._sources(batch, rows)
        targets = self._targets(batch, sources, length)
        self._state, answers = _read(
            self._model, self._state, sources, targets, tokens, counts, queries
        )
        return answers

    def _read_branches(self, batch: Sequence[Node], tokens, queries) -> Answers:
        branches = Branches(*(np.zeros_like(tokens) for _ in Branches._fields))
        for row, node in enumerate(batch):
            assert node.branches is not None
            for padded, array in zip(branches, node.branches, strict=True):
                padded[row, : len(array)] = array
        state = sources = None
        if batch[0].parent is not None:
            sources = self._sources(batch, len(tokens))
            state = self._state
        return _read_branches(self._model, state, sources, tokens, branches, queries)

    def _sources(self, batch: Sequence[Node], rows: int) -> np.ndarray:
        """The slots from which nodes are read; those of read parents become free."""
        if self._state is None:
            self._state = self._model.init_state(len(self.slots), self._capacity)
        sources = np.full(rows, _Slots.START)
        sources[: len(batch)] = [self.slots.before(node) for node in batch]
        for node in batch:
            self.slots.has_read(node)
        return sources

    def _targets(
        self, batch: Sequence[Node], sources: np.ndarray, length: int
    ) -> np.ndarray | None:
        """The slots of the states after nodes; None if no state is read again."""
        after = max(self.slots.used[source] for source in sources) + length
        if after > self._capacity:
            self._capacity = power_of_two(after)
            self._state = self._state.with_capacity(self._capacity)
        if not any(node.children for node in batch):
            return None
        targets = np.full(len(sources), _Slots.UNUSED)
        for row, node in enumerate(batch):
            if node.children:
                targets[row] = self._target(node, after)
        return targets

    def _target(self, node: Node, used: int) -> int:
        if not self.slots.free:
            count = len(self.slots)
            more = self._model.init_state(2 * count, self._capacity)
            self._state = more.put(jnp.arange(count), self._state)
            self.slots.double()
        return self.slots.give(node, used)


@partial(jax.jit, donate_argnames="pool")
def _read(
    model: LanguageModel,
    pool: Any,
    sources: Int[Array, " b"],
    targets: Int[Array, " b"] | None,
    tokens: Int[Array, "b t"],
    counts: Int[Array, " b"],
    queries: Int[Array, "b s 2"],
) -> tuple[State, Answers]:
    """Reads tokens from the states in slots `sources`, and puts the new states into `targets`.

    `pool` is a `State` of the model's own kind.
    """
    segment_ids = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)
    hidden, state = model.hidden(constrain(tokens, "bt"), pool.take(sources), segment_ids)
    if targets is not None:
        pool = pool.put(targets, state)
    return pool, _answers(model, hidden, queries)


@jax.jit
def _read_branches(
    model: Transformer,
    pool: Any,
    sources: Int[Array, " b"] | None,
    tokens: Int[Array, "b t"],
    branches: Branches,
    queries: Int[Array, "b s 2"],
) -> Answers:
    """Reads rows of branches, from the states in slots `sources` or from the first token."""
    before = None if sources is None else pool.take(sources)
    branches = jax.tree.map(lambda x: constrain(x, "bt"), branches)
    hidden = model.hidden_of_branches(constrain(tokens, "bt"), branches, before)
    return _answers(model, hidden, queries)


def _answers(
    model: LanguageModel, hidden: Float[Array, "b t d"], queries: Int[Array, "b s 2"]
) -> Answers:
    """The answers to queries, replicated so that every process can read them."""
    offsets, ids = queries[..., 0], queries[..., 1]  # [b s]
    asked = jnp.take_along_axis(hidden, offsets[..., None], axis=1)  # [b s d]
    return jax.tree.map(lambda x: constrain(x, "  "), _probabilities(model, asked, ids))


def _probabilities(
    model: LanguageModel, hidden: Float[Array, "b s d"], ids: Int[Array, "b s"]
) -> Answers:
    """The log p of ids, and whether each is the argmax; logits are computed in parts."""
    b, s, d = hidden.shape
    part = s
    while part % 2 == 0 and b * part * model.config.vocab_size > logits_at_once():
        part //= 2

    def of_part(inputs):
        hidden, ids = inputs
        logits = model.logits(hidden)  # [b part w]
        log_p = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        log_p -= jax.nn.logsumexp(logits, axis=-1)
        return Answers(log_p, logits.argmax(-1) == ids)

    if part == s:
        return of_part((hidden, ids))
    parts = (
        hidden.reshape(b, s // part, part, d).swapaxes(0, 1),  # [s/part b part d]
        ids.reshape(b, s // part, part).swapaxes(0, 1),
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, s), jax.lax.map(of_part, parts))


def _capacity(roots: Sequence[Node], schedule: Schedule) -> int:
    """Capacity of a cache for the longest path of padded nodes; rows of branches are not stored."""
    end, longest = {}, 1
    for node in nodes_from(roots):
        if node.branches is None:
            end[node] = end.get(node.parent, 0) + schedule.padded(node)
            longest = max(longest, end[node])
    return -(-longest // 128) * 128
