"""Generation: prompts are read in chunkwise form, continued in recurrent form.

    generate(model, [[256, 72, 101], [256, 33]], max_tokens=100, sampler=Sampler(temperature=0.8))

`stream` gives the same tokens while they come. Both lay the model out for decoding and read the
prompts (`prefill`). Then `generate` is one compiled loop to the end (`complete`), and `stream` one
of a few tokens again and again (`decode`). A RetNet's state has one size at every position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.config import ConfigError
from retnet_jax.model import LanguageModel, State, for_decoding
from retnet_jax.shapes import Array, Bool, Float, Int

# Tokens of a prompt that are read at once. Longer prompts are read in pieces, so that memory does
# not grow with them; shorter ones are padded to a power of two, so that few lengths are compiled.
LONGEST_PIECE = 512
SHORTEST_PIECE = 64


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the likeliest token. Otherwise one is drawn from the softmax of
        logits / temperature.
      top_k: draws among this many likeliest tokens (arXiv 1805.04833); None: among all.
      top_p: draws among the likeliest tokens, as few as together have this probability
        (arXiv 1904.09751), after `top_k`; None: among all.

    Raises:
      ConfigError: for a value out of range, or `top_k` or `top_p` where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(
                f"temperature={self.temperature} is not 0 (the likeliest token) or more; "
                "1 draws from the model's own distribution"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to draw; 1 or more would do")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]; 0.9 is usual")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0, which takes the "
                    "likeliest token; set temperature as well, such as 1"
                )

    def sample(self, keys: Array, logits: Float[Array, "b w"]) -> Int[Array, " b"]:
        """One token of each row. Of equal logits the lower id counts as the likelier.

        Args:
          keys: a random key for each row [b].
          logits: of all tokens that may be drawn.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        draw = jax.vmap(jax.random.categorical)
        logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return draw(keys, logits)
        w = logits.shape[-1]
        logits, tokens = jax.lax.top_k(logits, min(self.top_k or w, w))  # in falling order
        if self.top_p is not None:
            probability = jax.nn.softmax(logits)
            likelier = probability.cumsum(-1) - probability
            logits = jnp.where(likelier < self.top_p, logits, -jnp.inf)
        return jnp.take_along_axis(tokens, draw(keys, logits)[:, None], axis=1)[:, 0]


GREEDY = Sampler()


class Progress(NamedTuple):
    """Where each row of a batch stands: all that decoding needs to go on."""

    logits: Float[Array, "b w"]  # of the next token
    state: State  # of the model, after all tokens so far
    ended: Bool[Array, " b"]  # rows that have generated the end


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampler: Sampler = GREEDY,
    seed: int = 0,
    end_id: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continues prompts of any lengths, all at once.

    What a row gets depends on its prompt, the seed and its number in the batch, not on other rows.
    Between the prompts and the last token nothing passes between host and device.

    Args:
      model: RetNet or Transformer, best from `for_decoding`: others are laid out so in each call.
      prompts: the token ids of each.
      max_tokens: most tokens to generate for each.
      sampler: how a token is chosen; the default takes the likeliest.
      seed: of the random choices.
      end_id: the token that ends a row, such as the BOS of a next document; None: none does.
      vocab_size: ids from here on are never generated: those of a model whose vocabulary is larger
        than its tokenizer's. None: all ids may be.

    Returns:
      The new tokens of each prompt, without `end_id`.

    Raises:
      ValueError: if there is no prompt, one is empty, or one has an id the model does not know.
      ConfigError: for `max_tokens` or `vocab_size` out of range.
    """
    _check_lengths(model, max_tokens, vocab_size)
    model = for_decoding(model)
    # Lengths are compiled as powers of two, so that they are few; what is too much is not computed.
    room = max(16, 1 << (max_tokens - 1).bit_length())
    progress = prefill(model, prompts, room)
    keys = row_keys(seed, len(prompts))
    tokens, _ = complete(
        model, progress, keys, jnp.int32(max_tokens), room, sampler, end_id, vocab_size
    )
    rows = np.asarray(tokens)[:, :max_tokens].tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampler: Sampler = GREEDY,
    seed: int = 0,
    end_id: int | None = None,
    vocab_size: int | None = None,
    block_size: int = 16,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` as they come, `block_size` of each row at a time.

    It takes the arguments of `generate` and raises its errors, at the first block.

    Yields:
      New tokens of each row, int32 [b n], where n is `block_size` but perhaps less in the last
      block, until all rows have ended. From its end on, a row is filled with `end_id`.
    """
    _check_lengths(model, max_tokens, vocab_size)
    model = for_decoding(model)
    n_blocks = -(-max_tokens // block_size)
    # All blocks are of one length, so that one loop is compiled; what is too much is cut off.
    progress = prefill(model, prompts, room=n_blocks * block_size)
    keys = row_keys(seed, len(prompts))
    for start in range(0, n_blocks * block_size, block_size):
        tokens, progress = decode(model, progress, keys, block_size, sampler, end_id, vocab_size)
        yield np.asarray(tokens)[:, : max_tokens - start]
        if np.asarray(progress.ended).all():
            return


def row_keys(seed: int, batch_size: int) -> Array:
    """The random key of each row [b]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch_size))


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], room: int) -> Progress:
    """Reads prompts, in chunkwise form.

    Args:
      model: RetNet or Transformer.
      prompts: the token ids of each. Shorter ones are padded on the left, which leaves no trace.
      room: tokens a row that will be decoded. A Transformer's cache gets slots for them.

    Raises:
      ValueError: if there is no prompt, one is empty, or one has an id the model does not know.
    """
    _check_prompts(prompts, model.config.vocab_size)
    longest = max(map(len, prompts))
    piece = min(LONGEST_PIECE, max(SHORTEST_PIECE, 1 << (longest - 1).bit_length()))
    length = -(-longest // piece) * piece
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros_like(tokens)  # 0: padding
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1
    state = model.init_state(len(prompts), capacity=length + room)
    ended = jnp.zeros(len(prompts), bool)
    # Placed like the norms: whole, on all of the model's devices. What is placed nowhere in
    # particular comes out of the first call with a place, and the second is compiled again for it.
    state, ended = jax.device_put((state, ended), model.first_block.mixer_norm.scale[...].sharding)
    for start in range(0, length, piece):
        here = np.s_[:, start : start + piece]
        logits, state = _read(model, state, tokens[here], segment_ids[here])
    return Progress(logits, state, ended)


@partial(
    jax.jit,
    static_argnames=("length", "sampler", "end_id", "vocab_size"),
    donate_argnames="progress",
)
def decode(
    model: LanguageModel,
    progress: Progress,
    keys: Array,
    length: int,
    sampler: Sampler = GREEDY,
    end_id: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Int[Array, "b n"], Progress]:
    """The next `length` tokens of each row, in recurrent form, in one compiled loop.

    Args:
      model: the model that `progress` is of.
      progress: from `prefill` or an earlier call. Its arrays are used up.
      keys: as from `row_keys`. A token is drawn with its row's key and its position, so what is
        drawn does not depend on how the tokens are divided into calls.
      length: tokens to generate.
      sampler: as in `generate`, as are the others.
      end_id: a row that has generated it goes on with nothing else.
      vocab_size: ids from here on are never generated.

    Returns:
      The tokens, and the progress after them.
    """
    next_token = partial(_next_token, model, keys, sampler, end_id, vocab_size)
    progress, tokens = jax.lax.scan(lambda x, _: next_token(x), progress, length=length)
    return tokens.T, progress


@partial(
    jax.jit,
    static_argnames=("room", "sampler", "end_id", "vocab_size"),
    donate_argnames="progress",
)
def complete(
    model: LanguageModel,
    progress: Progress,
    keys: Array,
    max_tokens: Int[Array, ""],
    room: int,
    sampler: Sampler = GREEDY,
    end_id: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Int[Array, "b n"], Progress]:
    """All that `decode` gives until each row has ended or has `max_tokens`, in one compiled loop.

    Args:
      model: as in `decode`.
      progress: as in `decode`.
      keys: as in `decode`.
      max_tokens: at most `room`.
      room: places for the tokens of a row; those that are not needed hold `end_id`, or 0.
      sampler: as in `generate`, as are the others.
      end_id: a row that has generated it goes on with nothing else.
      vocab_size: ids from here on are never generated.

    Returns:
      The tokens, and the progress after them, in whose memory the loop has worked.
    """

    def goes_on(carry):
        n, progress, _ = carry
        return (n < max_tokens) & ~progress.ended.all()

    def next_token(carry):
        n, progress, rows = carry
        progress, tokens = _next_token(model, keys, sampler, end_id, vocab_size, progress)
        return n + 1, progress, jax.lax.dynamic_update_index_in_dim(rows, tokens, n, axis=0)

    rows = jnp.full((room, len(keys)), end_id or 0, jnp.int32)
    _, progress, rows = jax.lax.while_loop(goes_on, next_token, (jnp.int32(0), progress, rows))
    return rows.T, progress


def _next_token(model, keys, sampler, end_id, vocab_size, progress) -> tuple[Progress, Array]:
    """Progress after one more token of each row, and the tokens [b]."""
    logits, state, ended = progress
    token_keys = jax.vmap(jax.random.fold_in)(keys, state.position)
    tokens = sampler.sample(token_keys, logits[:, :vocab_size]).astype(jnp.int32)
    if end_id is not None:
        tokens = jnp.where(ended, end_id, tokens)
        ended |= tokens == end_id
    logits, state = model(tokens[:, None], state, form="recurrent")
    return Progress(logits[:, 0], state, ended), tokens


@partial(jax.jit, donate_argnames="state")
def _read(model, state, tokens, segment_ids) -> tuple[Float[Array, "b w"], State]:
    """Logits after the last of the tokens [b t], and the state."""
    hidden, state = model.hidden(tokens, state, segment_ids)
    return model.logits(hidden[:, -1:])[:, 0], state


def _check_lengths(model: LanguageModel, max_tokens: int, vocab_size: int | None) -> None:
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} is less than 1")
    if vocab_size is not None and not 1 <= vocab_size <= model.config.vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size} does not fit a model with {model.config.vocab_size} ids; "
            "is the tokenizer another model's?"
        )


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not len(prompts):
        raise ValueError("there are no prompts; at least one is needed")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"prompts[{number}] is empty; a prompt needs a token to begin with, "
                "such as the tokenizer's bos_id"
            )
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompts[{number}] has the token id {token}, but the model knows ids from 0 "
                    f"to {vocab_size - 1}; is the tokenizer another model's?"
                )
