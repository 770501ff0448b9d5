"""The compiled programs of continuous batching: pieces of prompts are read, and rows decoded.

The shapes depend on the number of rows only. A row's numbers do not depend on its place in the
batch, nor on the other rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.generation.decode import NewTokens, Progress, next_token
from retnet_jax.generation.sampling import Samplers
from retnet_jax.model import LanguageModel
from retnet_jax.shapes import Array, Bool, Float, Int


class Slots(NamedTuple):
    """The rows that are decoded. A row whose `progress.ended` is True is free."""

    progress: Progress
    keys: Array  # random key of each row's request [b]
    left: Int[Array, " b"]  # number of tokens that may still be generated
    temperature: Float[Array, " b"]  # this and the next two as in `Samplers`
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]


class Ready(NamedTuple):
    """Requests whose prompts have been read, in the order in which they get free rows."""

    count: Int[Array, ""]  # the others are padding
    pool_row: Int[Array, " s"]  # row of the pool with the progress after the prompt
    number: Int[Array, " s"]  # of the request; uint32
    max_tokens: Int[Array, " s"]
    temperature: Float[Array, " s"]
    top_k: Int[Array, " s"]
    top_p: Float[Array, " s"]


class Decoded(NamedTuple):
    """What a call of `decode_slots` did."""

    tokens: Int[Array, "n b"]
    log_probabilities: Float[Array, "n b"]
    steps: Int[Array, ""]  # number of tokens decoded of each row; the rest of the n is unused
    slot: Int[Array, " s"]  # row that each ready request got; -1: none
    first: Int[Array, " s"]  # step of its first token


def empty_slots(model: LanguageModel, rows: int) -> Slots:
    """Free rows."""
    progress = empty_progress(model, rows)
    zeros = jnp.zeros(rows, jnp.int32)
    keys = jax.vmap(jax.random.key)(zeros)
    slots = Slots(
        progress._replace(ended=jnp.ones(rows, bool)),
        keys,
        zeros,
        jnp.zeros(rows, jnp.float32),
        zeros,
        jnp.ones(rows, jnp.float32),
    )
    return jax.device_put(jax.tree.map(jnp.copy, slots), model.sharding)


def empty_progress(model: LanguageModel, rows: int) -> Progress:
    """The progress of rows that have read nothing."""
    logits = jnp.zeros((rows, model.config.vocab_size), model.config.accumulation_dtype)
    return Progress(logits, model.init_state(rows, capacity=1), jnp.zeros(rows, bool))


@partial(jax.jit, donate_argnames="pool")
def read_pieces(
    model: LanguageModel,
    pool: Progress,
    sources: Int[Array, " r"],
    targets: Int[Array, " r"],
    tokens: Int[Array, "r t"],
    counts: Int[Array, " r"],
) -> Progress:
    """Reads a piece of a prompt from each row `sources` of the pool, and writes rows `targets`.

    Args:
      model: RetNet or Transformer.
      pool: Progress after pieces of prompts; its arrays are donated.
      sources: Rows with the progress before the pieces.
      targets: Rows for the progress after them; a row beyond the last is not written.
      tokens: The pieces, padded at the end.
      counts: Number of tokens of each piece.
    """
    segment_ids = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)
    hidden, state = model.hidden(tokens, pool.state.take(sources), segment_ids)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    logits = model.logits(jnp.take_along_axis(hidden, last, axis=1))[:, 0]
    return Progress(
        pool.logits.at[targets].set(logits),
        pool.state.put(targets, state),
        pool.ended.at[targets].set(False),
    )


@partial(
    jax.jit,
    static_argnames=("steps", "end_ids", "vocab_size"),
    donate_argnames="slots",
)
def decode_slots(
    model: LanguageModel,
    slots: Slots,
    pool: Progress,
    ready: Ready,
    stopped: Bool[Array, " b"],
    key: Array,
    steps: int,
    end_ids: tuple[int, ...],
    vocab_size: int | None,
) -> tuple[Decoded, Slots]:
    """Decodes up to `steps` tokens of each row; a row that ends goes to the next ready request.

    Args:
      model: RetNet or Transformer.
      slots: The rows; their arrays are donated.
      pool: Progress after prompts.
      ready: Requests that wait for a row.
      stopped: Rows that are free because their text ended with a stop string.
      key: Random key of the seed. A token is sampled with the number of its request and its
        position, as in `decode`.
      steps: Number of tokens after which the call ends; it ends earlier when all rows are free.
      end_ids: Ids that end a row.
      vocab_size: Ids >= this are never generated.
    """
    rows = stopped.shape[0]
    slots = _ended(slots, stopped)

    def unfinished(carry):
        n, given, slots, *_ = carry
        return (n < steps) & ((given < ready.count) | ~slots.progress.ended.all())

    def fill_and_decode(carry):
        n, given, slots, new, slot, first = carry
        given, slots, slot, first = jax.lax.while_loop(
            lambda x: (x[0] < ready.count) & x[1].progress.ended.any(),
            lambda x: _give_row(n, pool, ready, key, *x),
            (given, slots, slot, first),
        )

        def keep_decoding(carry):
            n, slots, _ = carry
            ended = slots.progress.ended
            return (n < steps) & ~ended.all() & ~(ended.any() & (given < ready.count))

        def decode(carry):
            n, slots, new = carry
            slots, tokens = _decode(model, slots, end_ids, vocab_size)
            put = partial(jax.lax.dynamic_update_index_in_dim, index=n, axis=0)
            return n + 1, slots, jax.tree.map(put, new, tokens)

        n, slots, new = jax.lax.while_loop(keep_decoding, decode, (n, slots, new))
        return n, given, slots, new, slot, first

    zero = jnp.int32(0)
    new = NewTokens(
        jnp.zeros((steps, rows), jnp.int32), jnp.zeros((steps, rows), slots.progress.logits.dtype)
    )
    unused = jnp.full(ready.pool_row.shape, -1, jnp.int32)
    n, _, slots, new, slot, first = jax.lax.while_loop(
        unfinished, fill_and_decode, (zero, zero, slots, new, unused, unused)
    )
    return Decoded(*new, n, slot, first), slots


def _give_row(n, pool: Progress, ready: Ready, key: Array, given, slots: Slots, slot, first) -> Any:
    """Gives the first free row to the next ready request."""
    row = slots.progress.ended.argmax().astype(jnp.int32)
    source = jax.lax.dynamic_slice_in_dim(ready.pool_row, given, 1)
    progress = Progress(
        slots.progress.logits.at[row].set(pool.logits[source[0]]),
        slots.progress.state.put(row[None], pool.state.take(source)),
        slots.progress.ended.at[row].set(False),
    )
    slots = Slots(
        progress,
        slots.keys.at[row].set(jax.random.fold_in(key, ready.number[given])),
        slots.left.at[row].set(ready.max_tokens[given]),
        *(
            of_rows.at[row].set(of_ready[given])
            for of_rows, of_ready in zip(slots[3:], ready[4:], strict=True)
        ),
    )
    return given + 1, slots, slot.at[given].set(row), first.at[given].set(n)


def _decode(
    model: LanguageModel, slots: Slots, end_ids: tuple[int, ...], vocab_size: int | None
) -> tuple[Slots, NewTokens]:
    """Decodes one token of each row."""
    samplers = Samplers(slots.temperature, slots.top_k, slots.top_p)
    progress, new = next_token(model, slots.keys, samplers, end_ids, vocab_size, slots.progress)
    left = slots.left - 1
    return _ended(slots._replace(progress=progress, left=left), left <= 0), new


def _ended(slots: Slots, rows: Bool[Array, " b"]) -> Slots:
    """The slots with some rows ended."""
    progress = slots.progress
    return slots._replace(progress=progress._replace(ended=progress.ended | rows))
