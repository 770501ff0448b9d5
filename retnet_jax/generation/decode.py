"""Generation: prompts are read in chunkwise form and continued in recurrent form.

    generate(model, [[256, 72, 101], [256, 33]], max_tokens=100, sampler=Sampler(temperature=0.8))

`Stream` yields the same tokens a few at a time. Both prepare the model for decoding and read the
prompts (`prefill`). Then `generate` decodes to the end in one compiled loop (`complete`); `Stream`
calls a loop of a few tokens repeatedly (`decode`). The size of a RetNet's state does not depend on
the position.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.errors import ConfigError
from retnet_jax.generation.checks import (
    check_ends,
    check_finite,
    check_lengths,
    check_prompts,
    check_seed,
)
from retnet_jax.generation.sampling import GREEDY, Sampler, Samplers
from retnet_jax.model import LanguageModel, State, for_decoding
from retnet_jax.model.lm import check_state
from retnet_jax.model.mixer import RetentionState
from retnet_jax.shapes import Array, Bool, Float, Int, power_of_two

# Numbers of prompt tokens that are read at once. Longer prompts are read in pieces, which bounds
# the memory; shorter ones are padded to a power of two, so that few lengths are compiled.
LONGEST_PIECE = 512
SHORTEST_PIECE = 64


class Progress(NamedTuple):
    """The progress of each row of a batch: everything needed to continue decoding."""

    logits: Float[Array, "b w"]  # for the next token
    state: State  # the model's, after all tokens so far
    ended: Bool[Array, " b"]  # whether a row has generated an end id

    def take(self, rows: Int[Array, " r"]) -> "Progress":
        """The progress of the selected rows; a row may be selected several times."""
        return Progress(self.logits[rows], self.state.take(rows), self.ended[rows])

    def put(self, rows: Int[Array, " r"], progress: "Progress") -> "Progress":
        """This progress with the rows `rows` replaced; a row beyond the last is not written."""
        state: Any = self.state  # of the same kind as the other
        return Progress(
            self.logits.at[rows].set(progress.logits),
            state.put(rows, progress.state),
            self.ended.at[rows].set(progress.ended),
        )


def empty_progress(model: LanguageModel, rows: int, capacity: int) -> Progress:
    """The progress of rows that have read nothing; `capacity` as in `init_state`."""
    logits = jnp.zeros((rows, model.config.vocab_size), model.config.accumulation_dtype)
    return Progress(logits, model.init_state(rows, capacity), jnp.zeros(rows, bool))


class NewTokens(NamedTuple):
    """The next tokens generated for each row: on devices, or on the host from a `Stream`."""

    tokens: Int[Array | np.ndarray, "b n"]  # after its end, a row is filled with `end_id`
    # Under the model's distribution over the allowed ids, without temperature, top_k and top_p.
    log_probabilities: Float[Array | np.ndarray, "b n"]


class Generated(NamedTuple):
    """The tokens generated for a prompt."""

    tokens: list[int]  # without the end id
    log_probabilities: list[float]  # of each token, as in `NewTokens`


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampler: Sampler | Sequence[Sampler] = GREEDY,
    seed: int = 0,
    end_id: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> list[Generated]:
    """Continues prompts of any lengths in one batch; `generate_requests` takes any number of them.

    The tokens of a row depend on its prompt, its sampler, the seed and its index in the batch, not
    on other rows. Between the prompts and the last token no data moves between host and device.

    Args:
      model: RetNet or Transformer, best from `for_decoding`; others are converted in each call.
      prompts: Token ids of each prompt.
      max_tokens: Largest number of tokens to generate for each prompt.
      sampler: Sampler for all prompts, or one for each; the default decodes greedily.
      seed: Seed of the sampling.
      end_id: Token id that ends a row, such as the BOS of a next document, or several such ids;
        None: no id ends a row.
      vocab_size: Ids >= this are never generated, for models whose vocabulary is larger than their
        tokenizer's; None: all ids are allowed.

    Returns:
      The new tokens of each prompt, without `end_id`, and their log-probabilities.

    Raises:
      ConfigError: if there is no prompt, or one is empty or has an id unknown to the model; for
        `max_tokens`, `seed`, `end_id` or `vocab_size` out of range; for a wrong number of samplers.
      CheckpointError: for a model whose probabilities are not finite.
    """
    max_tokens = check_lengths(model, max_tokens, vocab_size)
    ends = check_ends(model, end_id, vocab_size)
    checked = check_prompts(prompts, model.config.vocab_size)
    keys = row_keys(check_seed(seed), len(checked))
    samplers = Samplers.of(sampler, len(checked))
    model = for_decoding(model)
    # Loops are compiled for powers of two, which are few; they stop after `max_tokens`.
    room = max(16, power_of_two(max_tokens))
    progress = prefill(model, checked, room)
    new, _ = complete(
        model, progress, keys, jnp.int32(max_tokens), room, samplers, ends, vocab_size
    )
    tokens, log_p = (np.asarray(x)[:, :max_tokens].tolist() for x in new)
    lengths = [
        next((place for place, token in enumerate(row) if token in ends), len(row))
        for row in tokens
    ]
    check_finite(model, [each[: n + 1] for each, n in zip(log_p, lengths, strict=True)])
    rows = zip(tokens, log_p, lengths, strict=True)
    return [Generated(ids[:length], each[:length]) for ids, each, length in rows]


class Stream:
    """Yields the tokens of `generate` in pieces, `tokens_at_once` of each row at a time.

        for tokens, log_probabilities in Stream(model, prompts, max_tokens=100):
            ...

    Each item is `NewTokens` of numpy arrays [b n], where n is `tokens_at_once` except perhaps in
    the last piece. Iteration ends when all rows have ended or have been stopped.

    Args:
      model: As in `generate`.
      prompts: Token ids of each prompt; with `progress` a prompt may be empty.
      max_tokens: As in `generate`; with 0 the prompts are only read.
      sampler: As in `generate`.
      seed: As in `generate`.
      end_id: As in `generate`.
      vocab_size: As in `generate`.
      tokens_at_once: Number of tokens of each row in a piece.
      progress: Progress of the texts that the prompts continue, as in `prefill`.

    Attributes:
      progress: Progress of the rows after the pieces taken so far. It includes all
        `tokens_at_once` tokens of each piece, also if the last piece was cut to `max_tokens`.

    Raises:
      As `generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampler: Sampler | Sequence[Sampler] = GREEDY,
        seed: int = 0,
        end_id: int | Sequence[int] | None = None,
        vocab_size: int | None = None,
        tokens_at_once: int = 16,
        progress: Progress | None = None,
    ):
        max_tokens = check_lengths(model, max_tokens, vocab_size, least=0)
        if tokens_at_once < 1:
            raise ConfigError(f"tokens_at_once={tokens_at_once} is less than 1")
        self._samplers = Samplers.of(sampler, len(prompts))
        self._ends = check_ends(model, end_id, vocab_size)
        keys = row_keys(check_seed(seed), len(prompts))
        self._model = for_decoding(model)
        # All pieces have the same length, so that one loop is compiled; the last is cut afterwards.
        self._starts = range(0, max_tokens, tokens_at_once)
        self._max_tokens = max_tokens
        room = len(self._starts) * tokens_at_once
        self.progress = prefill(self._model, prompts, room, progress)
        self._decode = partial(
            decode,
            self._model,
            keys=keys,
            length=tokens_at_once,
            samplers=self._samplers,
            end_id=self._ends,
            vocab_size=vocab_size,
        )

    def __iter__(self) -> Iterator[NewTokens]:
        for start in self._starts:
            ended = np.asarray(self.progress.ended)
            if ended.all():
                return
            new, self.progress = self._decode(self.progress)
            new = NewTokens(*(np.asarray(x)[:, : self._max_tokens - start] for x in new))
            log_p = [[] if over else row for over, row in zip(ended, new[1], strict=True)]
            check_finite(self._model, log_p)
            yield new

    def stop(self, rows: Sequence[bool]) -> None:
        """Ends the rows that are True in `rows`; they generate no further tokens."""
        self.progress = self.progress._replace(ended=self.progress.ended | np.array(rows))


def row_keys(seed: int, batch_size: int) -> Array:
    """The random key of each row [b]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch_size))


def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    room: int,
    progress: Progress | None = None,
) -> Progress:
    """Reads prompts in chunkwise form.

    Args:
      model: RetNet or Transformer.
      prompts: Token ids of each prompt. Shorter ones are padded on the left, without any effect.
      room: Number of tokens that will be decoded for each row; a Transformer's cache has slots for
        them.
      progress: Progress of the texts that the prompts continue, one row for each prompt; a prompt
        may then be empty. None: the prompts begin new texts.

    Raises:
      ConfigError: if there is no prompt, or one is empty or has an id unknown to the model; for
        progress of another model or of another number of texts.
    """
    prompts = check_prompts(prompts, model.config.vocab_size, may_be_empty=progress is not None)
    longest = max(map(len, prompts))
    piece = min(LONGEST_PIECE, max(SHORTEST_PIECE, power_of_two(longest)))
    length = -(-longest // piece) * piece
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros_like(tokens)  # 0: padding
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    if progress is not None:
        check_progress(model, progress, len(prompts), longest + room)
    after = _room_for(model, progress, len(prompts), length + room)
    for start in range(0, length, piece):
        here = np.s_[:, start : start + piece]
        after = _read(model, after, tokens[here], segment_ids[here])
    return after


def _room_for(model: LanguageModel, progress: Progress | None, rows: int, tokens: int) -> Progress:
    """The progress before the prompts, with room for `tokens` more tokens."""
    if progress is None:
        logits = jnp.zeros((rows, model.config.vocab_size), model.config.accumulation_dtype)
        state = model.init_state(rows, capacity=tokens)
        if isinstance(state, RetentionState) and model.config.short_conv is not None:
            # Without a state, convolutions are faster where padding precedes the prompts.
            state = state._replace(layers=None)
        progress = Progress(logits, state, jnp.zeros(rows, bool))
    else:
        # A copy, because the next call donates its arrays and the caller may use them again.
        roomy = progress._replace(state=progress.state.with_room(tokens))
        progress = jax.tree.map(jnp.copy, roomy)
    # Replicated on all of the model's devices. Uncommitted arrays would be committed by the first
    # call, and the second call would compile again.
    return jax.device_put(progress, model.sharding)


@partial(
    jax.jit,
    static_argnames=("length", "end_id", "vocab_size"),
    donate_argnames="progress",
)
def decode(
    model: LanguageModel,
    progress: Progress,
    keys: Array,
    length: int,
    samplers: Samplers | None = None,
    end_id: int | tuple[int, ...] | None = None,
    vocab_size: int | None = None,
) -> tuple[NewTokens, Progress]:
    """Decodes the next `length` tokens of each row in recurrent form, in one compiled loop.

    Args:
      model: Model that made `progress`.
      progress: Progress from `prefill` or an earlier call; its arrays are donated.
      keys: Random keys [b] as from `row_keys`. A token is sampled with its row's key and its
        position, so the result does not depend on how the tokens are divided into calls.
      length: Number of tokens to generate.
      samplers: Samplers of the rows; None: greedy decoding.
      end_id: Id, or ids, that end a row; the rest of the row is filled with the first of them.
      vocab_size: Ids >= this are never generated.

    Returns:
      The tokens, and the progress after them.
    """
    step = partial(next_token, model, keys, samplers, end_id, vocab_size)
    progress, new = jax.lax.scan(lambda x, _: step(x), progress, length=length)
    return jax.tree.map(jnp.transpose, new), progress


@partial(
    jax.jit,
    static_argnames=("room", "end_id", "vocab_size"),
    donate_argnames="progress",
)
def complete(
    model: LanguageModel,
    progress: Progress,
    keys: Array,
    max_tokens: Int[Array, ""],
    room: int,
    samplers: Samplers | None = None,
    end_id: int | tuple[int, ...] | None = None,
    vocab_size: int | None = None,
) -> tuple[NewTokens, Progress]:
    """Decodes until each row has ended or has `max_tokens`, in one compiled loop.

    Args:
      model: As in `decode`.
      progress: As in `decode`.
      keys: As in `decode`.
      max_tokens: Largest number of tokens of a row; at most `room`.
      room: Length of the returned rows; unused places hold `end_id`, or 0.
      samplers: As in `decode`.
      end_id: As in `decode`.
      vocab_size: As in `decode`.

    Returns:
      The tokens, and the progress after them, whose arrays are those donated.
    """

    def unfinished(carry):
        n, progress, _ = carry
        return (n < max_tokens) & ~progress.ended.all()

    def step(carry):
        n, progress, rows = carry
        progress, new = next_token(model, keys, samplers, end_id, vocab_size, progress)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=n, axis=0)
        return n + 1, progress, jax.tree.map(put, rows, new)

    shape = (room, len(keys))
    log_p = jnp.zeros(shape, progress.logits.dtype)
    rows = NewTokens(jnp.full(shape, (*_tuple(end_id), 0)[0], jnp.int32), log_p)
    _, progress, rows = jax.lax.while_loop(unfinished, step, (jnp.int32(0), progress, rows))
    return jax.tree.map(jnp.transpose, rows), progress


def next_token(
    model: LanguageModel,
    keys: Array,
    samplers: Samplers | None,
    end_id: int | tuple[int, ...] | None,
    vocab_size: int | None,
    progress: Progress,
) -> tuple[Progress, NewTokens]:
    """The progress after one more token of each row; the tokens [b] and their log p [b]."""
    logits, state, ended = progress
    allowed = logits[:, :vocab_size]  # [b, allowed ids]
    if samplers is None:
        tokens = allowed.argmax(-1)
    else:
        tokens = samplers.sample(jax.vmap(jax.random.fold_in)(keys, state.position), allowed)
    tokens = tokens.astype(jnp.int32)
    log_p = jnp.take_along_axis(allowed, tokens[:, None], axis=1)[:, 0]
    log_p -= jax.nn.logsumexp(allowed, axis=1)
    ends = _tuple(end_id)
    if ends:
        tokens = jnp.where(ended, ends[0], tokens)
    for end in ends:
        ended |= tokens == end
    logits, state = model(tokens[:, None], state, form="recurrent")
    return Progress(logits[:, 0], state, ended), NewTokens(tokens, log_p)


@partial(jax.jit, donate_argnames="progress")
def _read(
    model: LanguageModel,
    progress: Progress,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
) -> Progress:
    """The progress after more tokens; a row that is all padding does not change."""
    hidden, state = model.hidden(tokens, progress.state, segment_ids)
    # Rows are padded on the left, so the last column is padding only if the whole row is.
    read = segment_ids[:, -1] != 0
    logits = jnp.where(read[:, None], model.logits(hidden[:, -1:])[:, 0], progress.logits)
    return Progress(logits, state, progress.ended & ~read)


def _tuple(end_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if end_id is None:
        return ()
    return end_id if isinstance(end_id, tuple) else (end_id,)


# The last position of a token in its document; rotations and normalisers use int32 positions.
LAST_POSITION = 2**31 - 1


def check_progress(model: LanguageModel, progress: Progress, rows: int, tokens: int) -> None:
    """Raises `ConfigError` unless `model` can continue `rows` rows by `tokens` tokens from here."""
    found = progress.logits.shape
    if found != (rows, model.config.vocab_size):
        raise ConfigError(
            f"progress is of {found[0]} texts and {found[1]} token ids, but there are {rows} "
            f"prompts and {model.config.vocab_size} ids; `Progress.take` selects a row for each "
            "prompt"
        )
    check_state(model, progress.state, rows)
    position = int(np.asarray(progress.state.position).max(initial=0))
    if position + tokens > LAST_POSITION:
        raise ConfigError(
            f"the text has {position} tokens, and {tokens} more would exceed the last position "
            f"{LAST_POSITION}; begin a new text"
        )
