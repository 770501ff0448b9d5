"""The compiled programs of continuous batching: pieces of prompts are read, and rows decoded.

The shapes depend on the number of rows only. A row's numbers do not depend on its place in the
batch, nor on the other rows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.generation.decode import NewTokens, Progress, empty_progress, next_token
from retnet_jax.generation.sampling import Samplers
from retnet_jax.model import LanguageModel
from retnet_jax.shapes import Array, Bool, Float, Int


class DecodingRows(NamedTuple):
    """The rows that are decoded. A row whose `progress.ended` is True is free."""

    progress: Progress
    keys: Array  # random key of each row's request [b]
    left: Int[Array, " b"]  # number of tokens that may still be generated
    temperature: Float[Array, " b"]  # this and the next two as in `Samplers`
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]


class Ready(NamedTuple):
    """Requests whose prompts have been read, in the order in which they get free rows."""

    count: Int[Array | np.integer, ""]  # the others are padding
    pool_row: Int[Array | np.ndarray, " s"]  # row of the pool with the progress after the prompt
    number: Int[Array | np.ndarray, " s"]  # of the request; uint32
    max_tokens: Int[Array | np.ndarray, " s"]
    temperature: Float[Array | np.ndarray, " s"]
    top_k: Int[Array | np.ndarray, " s"]
    top_p: Float[Array | np.ndarray, " s"]


class Decoded(NamedTuple):
    """What a call of `decode_rows` did."""

    new: NewTokens  # [n b]
    steps: Int[Array, ""]  # number of tokens decoded of each row; the rest of the n is unused
    row: Int[Array, " s"]  # that each ready request got; -1: none
    first: Int[Array, " s"]  # step of its first token


@partial(jax.jit, static_argnames="count")
def empty_rows(model: LanguageModel, count: int) -> DecodingRows:
    """Free rows."""
    zeros = jnp.zeros(count, jnp.int32)
    return DecodingRows(
        progress=empty_progress(model, count, capacity=1)._replace(ended=jnp.ones(count, bool)),
        keys=jax.vmap(jax.random.key)(zeros),
        left=zeros,
        temperature=jnp.zeros(count, jnp.float32),
        top_k=jnp.zeros(count, jnp.int32),
        top_p=jnp.ones(count, jnp.float32),
    )


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
    return pool.put(targets, Progress(logits, state, counts < 0))


@partial(
    jax.jit,
    static_argnames=("steps", "end_ids", "vocab_size"),
    donate_argnames="rows",
)
def decode_rows(
    model: LanguageModel,
    rows: DecodingRows,
    pool: Progress,
    ready: Ready,
    stopped: Bool[Array, " b"],
    key: Array,
    steps: int,
    end_ids: tuple[int, ...],
    vocab_size: int | None,
) -> tuple[Decoded, DecodingRows]:
    """Decodes up to `steps` tokens of each row; a row that ends goes to the next ready request.

    Args:
      model: RetNet or Transformer.
      rows: The rows; their arrays are donated.
      pool: Progress after prompts.
      ready: Requests that wait for a row.
      stopped: Rows that are free because their text ended with a stop string.
      key: Random key of the seed. A token is sampled with the number of its request and its
        position, as in `decode`.
      steps: Number of tokens after which the call ends; it ends earlier when all rows are free.
      end_ids: Ids that end a row.
      vocab_size: Ids >= this are never generated.
    """
    n = stopped.shape[0]
    log_p = jnp.zeros((steps, n), rows.progress.logits.dtype)
    none = jnp.full(ready.pool_row.shape, -1, jnp.int32)
    loop = _Loop(
        step=jnp.int32(0),
        given=jnp.int32(0),
        rows=_ended(rows, stopped),
        new=NewTokens(jnp.zeros((steps, n), jnp.int32), log_p),
        row=none,
        first=none,
    )

    def unfinished(loop: _Loop):
        free = loop.rows.progress.ended
        return (loop.step < steps) & ((loop.given < ready.count) | ~free.all())

    def can_give(loop: _Loop):
        return (loop.given < ready.count) & loop.rows.progress.ended.any()

    def decode(loop: _Loop) -> _Loop:
        rows, tokens = _decode(model, loop.rows, end_ids, vocab_size)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=loop.step, axis=0)
        new = jax.tree.map(put, loop.new, tokens)
        return loop._replace(step=loop.step + 1, rows=rows, new=new)

    def give_and_decode(loop: _Loop) -> _Loop:
        # Loops, because the branches of a condition would copy the states.
        loop = jax.lax.while_loop(can_give, partial(_give_row, pool, ready, key), loop)
        return jax.lax.while_loop(lambda x: unfinished(x) & ~can_give(x), decode, loop)

    loop = jax.lax.while_loop(unfinished, give_and_decode, loop)
    return Decoded(loop.new, loop.step, loop.row, loop.first), loop.rows


class _Loop(NamedTuple):
    """What `decode_rows` carries from token to token."""

    step: Int[Array, ""]
    given: Int[Array, ""]  # number of ready requests that have got a row
    rows: DecodingRows
    new: NewTokens  # [n b]
    row: Int[Array, " s"]  # this and the next as in `Decoded`
    first: Int[Array, " s"]


def _give_row(pool: Progress, ready: Ready, key: Array, loop: _Loop) -> _Loop:
    """Gives the first free row to the next ready request."""
    given, rows = loop.given, loop.rows
    row = rows.progress.ended.argmax().astype(jnp.int32)
    source = jax.lax.dynamic_slice_in_dim(ready.pool_row, given, 1)
    rows = DecodingRows(
        progress=rows.progress.put(row[None], pool.take(source)),
        keys=rows.keys.at[row].set(jax.random.fold_in(key, ready.number[given])),
        left=rows.left.at[row].set(ready.max_tokens[given]),
        temperature=rows.temperature.at[row].set(ready.temperature[given]),
        top_k=rows.top_k.at[row].set(ready.top_k[given]),
        top_p=rows.top_p.at[row].set(ready.top_p[given]),
    )
    return loop._replace(
        given=given + 1,
        rows=rows,
        row=loop.row.at[given].set(row),
        first=loop.first.at[given].set(loop.step),
    )


def _decode(
    model: LanguageModel, rows: DecodingRows, end_ids: tuple[int, ...], vocab_size: int | None
) -> tuple[DecodingRows, NewTokens]:
    """Decodes one token of each row."""
    samplers = Samplers(rows.temperature, rows.top_k, rows.top_p)
    progress, new = next_token(model, rows.keys, samplers, end_ids, vocab_size, rows.progress)
    left = rows.left - 1
    return _ended(rows._replace(progress=progress, left=left), left <= 0), new


def _ended(rows: DecodingRows, ended: Bool[Array, " b"]) -> DecodingRows:
    """The rows, with those ended that are True in `ended`."""
    progress = rows.progress
    return rows._replace(progress=progress._replace(ended=progress.ended | ended))
