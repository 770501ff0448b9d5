"""Generation: prompts are read in chunkwise form, continued in recurrent form.

    generate(model, [[256, 72, 101], [256, 33]], max_tokens=100, sampler=Sampler(temperature=0.8))

`Stream` gives the same tokens as they come. Both prepare the model for decoding and read the
prompts (`prefill`). Then `generate` decodes to the end in one compiled loop (`complete`); `Stream`
calls a loop of a few tokens repeatedly (`decode`). A RetNet's state has one size at every position.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

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
from retnet_jax.shapes import Array, Bool, Float, Int, power_of_two

# Tokens of a prompt that are read at once. Longer prompts are read in pieces, so that memory does
# not grow with them; shorter ones are padded to a power of two, so that few lengths are compiled.
LONGEST_PIECE = 512
SHORTEST_PIECE = 64


class Progress(NamedTuple):
    """Where each row of a batch stands: all that decoding needs to continue."""

    logits: Float[Array, "b w"]  # of the next token
    state: State  # of the model, after all tokens so far
    ended: Bool[Array, " b"]  # rows that have generated the end

    def take(self, rows: Int[Array, " r"]) -> "Progress":
        """Where some rows stand; one may be taken several times."""
        return Progress(self.logits[rows], self.state.take(rows), self.ended[rows])


class NewTokens(NamedTuple):
    """Tokens that were generated for each row, one after the other."""

    tokens: Int[Array, "b n"]  # from its end on, a row is filled with `end_id`
    # Of each token, by the model's own distribution over the ids that are allowed: without
    # temperature, top_k and top_p.
    log_probabilities: Float[Array, "b n"]


class Generated(NamedTuple):
    """What was generated for a prompt."""

    tokens: list[int]  # without the one that ends it
    log_probabilities: list[float]  # of each, as in `NewTokens`


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampler: Sampler | Sequence[Sampler] = GREEDY,
    seed: int = 0,
    end_id: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> list[Generated]:
    """Continues prompts of any lengths, all at once.

    What a row gets depends on its prompt, its sampler, the seed and its number in the batch, not on
    other rows. Between the prompts and the last token nothing passes between host and device.

    Args:
      model: RetNet or Transformer, best from `for_decoding`: others are converted in each call.
      prompts: the token ids of each.
      max_tokens: most tokens to generate for each.
      sampler: how a token is chosen, one for all or one for each prompt; the default takes the
        likeliest.
      seed: of the random choices.
      end_id: the token that ends a row, such as the BOS of a next document, or several of which
        each does; None: none does.
      vocab_size: ids from here on are never generated: those of a model whose vocabulary is larger
        than its tokenizer's. None: all ids may be.

    Returns:
      The new tokens of each prompt, without `end_id`, and their log-probabilities.

    Raises:
      ConfigError: if there is no prompt, one is empty, or one has an id the model does not know;
        for `max_tokens`, `seed`, `end_id` or `vocab_size` out of range, or not a sampler for each
        prompt.
      CheckpointError: for a model whose probabilities are not finite.
    """
    max_tokens = check_lengths(model, max_tokens, vocab_size)
    ends = check_ends(model, end_id, vocab_size)
    prompts = check_prompts(prompts, model.config.vocab_size)
    keys = row_keys(check_seed(seed), len(prompts))
    samplers = Samplers.of(sampler, len(prompts))
    model = for_decoding(model)
    # Lengths are compiled as powers of two, so that they are few; what is too much is not computed.
    room = max(16, power_of_two(max_tokens))
    progress = prefill(model, prompts, room)
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
    """The tokens of `generate` as they come, `tokens_at_once` of each row at a time.

        for tokens, log_probabilities in Stream(model, prompts, max_tokens=100):
            ...

    Iterating gives `NewTokens` of numpy arrays [b n], where n is `tokens_at_once` but perhaps less
    in the last, until all rows have ended or been stopped.

    Args:
      model: as in `generate`, as are the others that are not listed here.
      prompts: the token ids of each; with `progress` they may be empty: then nothing is read.
      max_tokens: see `generate`; 0: the prompts are read, and that is all.
      sampler: see `generate`.
      seed: see `generate`.
      end_id: see `generate`.
      vocab_size: see `generate`.
      tokens_at_once: tokens of each row in a piece of the stream.
      progress: where the texts stood that the prompts continue, as in `prefill`.

    Attributes:
      progress: where the rows stand after the pieces that were taken. It has read `tokens_at_once`
        tokens for each piece, also for a last piece that was cut off.

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
        # All pieces are of one length, so that one loop is compiled; what is too much is cut off.
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
        """Ends rows: what they would still generate is not needed."""
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
    """Reads prompts, in chunkwise form.

    Args:
      model: RetNet or Transformer.
      prompts: the token ids of each. Shorter ones are padded on the left, which leaves no trace.
      room: tokens a row that will be decoded. A Transformer's cache gets slots for them.
      progress: where the texts stand that the prompts continue: a row for each prompt. A prompt may
        then be empty. None: they begin texts.

    Raises:
      ConfigError: if there is no prompt, one is empty, or one has an id the model does not know;
        for progress of another model or of other texts than there are prompts.
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
        _check_progress(model, progress, len(prompts), longest + room)
    progress = _room_for(model, progress, len(prompts), length + room)
    for start in range(0, length, piece):
        here = np.s_[:, start : start + piece]
        progress = _read(model, progress, tokens[here], segment_ids[here])
    return progress


def _room_for(model: LanguageModel, progress: Progress | None, rows: int, tokens: int) -> Progress:
    """The progress to read and decode so many tokens from."""
    if progress is None:
        logits = jnp.zeros((rows, model.config.vocab_size), model.config.accumulation_dtype)
        state = model.init_state(rows, capacity=tokens)
        progress = Progress(logits, state, jnp.zeros(rows, bool))
    else:
        # What is read from here on uses up its arrays; the caller may continue from them again.
        roomy = progress._replace(state=progress.state.with_room(tokens))
        progress = jax.tree.map(jnp.copy, roomy)
    # Whole, on all of the model's devices. What is placed nowhere in particular comes out of the
    # first call with a place, and the second is compiled again for it.
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
    """The next `length` tokens of each row, in recurrent form, in one compiled loop.

    Args:
      model: the model that `progress` is of.
      progress: from `prefill` or an earlier call. Its arrays are used up.
      keys: as from `row_keys`. A token is drawn with its row's key and its position, so what is
        drawn does not depend on how the tokens are divided into calls.
      length: tokens to generate.
      samplers: of the rows; None: the likeliest token in all.
      end_id: a row that has generated it, or one of them, is filled with it, or the first.
      vocab_size: ids from here on are never generated.

    Returns:
      The tokens, and the progress after them.
    """
    next_token = partial(_next_token, model, keys, samplers, end_id, vocab_size)
    progress, new = jax.lax.scan(lambda x, _: next_token(x), progress, length=length)
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
    """All that `decode` gives until each row has ended or has `max_tokens`, in one compiled loop.

    Args:
      model: as in `decode`.
      progress: as in `decode`.
      keys: as in `decode`.
      max_tokens: at most `room`.
      room: places for the tokens of a row; those that are not needed hold `end_id`, or 0.
      samplers: as in `decode`.
      end_id: a row that has generated it, or one of them, is filled with it, or the first.
      vocab_size: ids from here on are never generated.

    Returns:
      The tokens, and the progress after them, in whose memory the loop has worked.
    """

    def goes_on(carry):
        n, progress, _ = carry
        return (n < max_tokens) & ~progress.ended.all()

    def next_token(carry):
        n, progress, rows = carry
        progress, new = _next_token(model, keys, samplers, end_id, vocab_size, progress)
        put = partial(jax.lax.dynamic_update_index_in_dim, index=n, axis=0)
        return n + 1, progress, jax.tree.map(put, rows, new)

    shape = (room, len(keys))
    log_p = jnp.zeros(shape, progress.logits.dtype)
    rows = NewTokens(jnp.full(shape, (*_tuple(end_id), 0)[0], jnp.int32), log_p)
    _, progress, rows = jax.lax.while_loop(goes_on, next_token, (jnp.int32(0), progress, rows))
    return jax.tree.map(jnp.transpose, rows), progress


def _next_token(model, keys, samplers, end_id, vocab_size, progress) -> tuple[Progress, NewTokens]:
    """Progress after one more token of each row, and the tokens [b] with their log p."""
    logits, state, ended = progress
    allowed = logits[:, :vocab_size]
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
def _read(model, progress, tokens, segment_ids) -> Progress:
    """Progress after tokens [b t]; rows that are all padding stay where they are."""
    hidden, state = model.hidden(tokens, progress.state, segment_ids)
    # Rows are padded on the left, so what is real ends with the last column.
    read = segment_ids[:, -1] != 0
    logits = jnp.where(read[:, None], model.logits(hidden[:, -1:])[:, 0], progress.logits)
    return Progress(logits, state, progress.ended & ~read)


def _tuple(end_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if end_id is None:
        return ()
    return end_id if isinstance(end_id, tuple) else (end_id,)


# Of a token in its document; rotations and normalisers are computed of it in int32.
_LAST_POSITION = 2**31 - 1


def _check_progress(model: LanguageModel, progress: Progress, rows: int, tokens: int) -> None:
    """That this model can read so many tokens on from here, for each of the rows."""
    there = progress.logits.shape
    if there != (rows, model.config.vocab_size):
        raise ConfigError(
            f"progress is of {there[0]} texts and {there[1]} ids; there are {rows} prompts, and "
            f"the model knows {model.config.vocab_size} ids: `Progress.take` gives a row for each"
        )
    check_state(model, progress.state, rows)
    position = int(np.asarray(progress.state.position).max(initial=0))
    if position + tokens > _LAST_POSITION:
        raise ConfigError(
            f"the text has {position} tokens, and {tokens} more would pass position "
            f"{_LAST_POSITION}, the last that there is; begin a new text"
        )
