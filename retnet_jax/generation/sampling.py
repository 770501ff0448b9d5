"""Sampling: how the next token of each row of a batch is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.errors import ConfigError
from retnet_jax.shapes import Array, Float, Int


@dataclass(frozen=True)
class Sampler:
    """Options of sampling.

    Attributes:
      temperature: 0: greedy decoding, the most likely token. Otherwise a token is sampled from the
        softmax of logits / temperature.
      top_k: Number of most likely tokens to sample from (arXiv 1805.04833); None: all.
      top_p: Probability of the smallest set of most likely tokens to sample from
        (arXiv 1904.09751), after `top_k`; None: all.

    Raises:
      ConfigError: for a value out of range, and for `top_k` or `top_p` with temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(
                f"temperature={self.temperature} is not >= 0; 0 is greedy decoding, 1 samples from "
                "the model's own distribution"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to sample; it must be >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]; 0.9 is usual")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0 (greedy "
                    "decoding); also set the temperature, for example to 1"
                )


GREEDY = Sampler()


FEW = 64  # candidates that are sorted for a row with a top_k up to this; more: all tokens are
ALL_TOKENS = int(np.iinfo(np.int32).max)  # top_k of a row without one
# How a row is sampled: the most likely token, from all tokens, from the FEW most likely, or from
# all sorted tokens. What a row gets depends on its own kind only.
_GREEDY, _UNSORTED, _FEW, _SORTED = range(4)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p"],
    meta_fields=["kinds"],
)
@dataclass(frozen=True)
class Samplers:
    """The samplers of the rows of a batch, as arrays.

    Attributes:
      temperature: Temperature; 0 for greedy rows.
      top_k: Number of tokens to sample from; the largest int32 for all.
      top_p: Probability of the tokens to sample from; 1 for all.
      kinds: Kinds of sampling that may occur beside greedy decoding; others are not compiled.
    """

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    kinds: tuple[int, ...] = (_UNSORTED, _FEW, _SORTED)

    @staticmethod
    def of(samplers: Sampler | Sequence[Sampler], rows: int) -> "Samplers":
        """Makes arrays from one sampler for all rows, or from one for each row.

        Raises:
          ConfigError: if the number of samplers is not `rows`.
        """
        each = [samplers] * rows if isinstance(samplers, Sampler) else list(samplers)
        if len(each) != rows:
            raise ConfigError(f"there are {len(each)} samplers for {rows} prompts")
        kinds = {_kind(sampler) for sampler in each} - {_GREEDY}
        temperature, top_k, top_p = (jnp.asarray(column) for column in sampler_columns(each))
        return Samplers(temperature, top_k, top_p, tuple(sorted(kinds)))

    def sample(self, keys: Array, logits: Float[Array, "b w"]) -> Int[Array, " b"]:
        """Samples one token of each row; of equal logits the lower id counts as more likely.

        A sample is the argmax of logits plus Gumbel noise. The noise belongs to token ids, not to
        ranks, and a row's sample does not depend on the samplers of other rows.

        Args:
          keys: Random key of each row [b].
          logits: Logits of all allowed tokens.
        """
        tokens = logits.argmax(-1).astype(jnp.int32)
        if not self.kinds:
            return tokens
        greedy, sorts = self.temperature == 0, (self.top_k < ALL_TOKENS) | (self.top_p < 1)
        kind = jnp.where(sorts, jnp.where(self.top_k <= FEW, _FEW, _SORTED), _UNSORTED)
        kind = jnp.where(greedy, _GREEDY, kind)
        warm = logits / jnp.where(greedy, 1.0, self.temperature)[:, None]
        w = logits.shape[-1]
        for each in self.kinds:
            candidates = {_UNSORTED: None, _FEW: min(FEW, w), _SORTED: w}[each]
            drawn = jax.lax.cond(
                (kind == each).any(),
                partial(self._draw, candidates),
                lambda keys, logits: jnp.zeros(len(logits), jnp.int32),
                keys,
                warm,
            )
            tokens = jnp.where(kind == each, drawn, tokens)
        return tokens

    def _draw(
        self, candidates: int | None, keys: Array, logits: Float[Array, "b w"]
    ) -> Int[Array, " b"]:
        """Samples from the `candidates` most likely tokens; None: from all, without top_p."""
        w = logits.shape[-1]
        noise = jax.vmap(partial(jax.random.gumbel, shape=(w,), dtype=logits.dtype))(keys)
        if candidates is None:
            return (logits + noise).argmax(-1).astype(jnp.int32)
        logits, tokens = jax.lax.top_k(logits, candidates)  # in falling order
        places = jnp.arange(candidates)
        logits = jnp.where(places < self.top_k[:, None], logits, -jnp.inf)
        probability = jax.nn.softmax(logits)
        likelier = probability.cumsum(-1) - probability
        # top_p = 1 keeps all tokens explicitly, because the cumulative sum is rounded.
        kept = (likelier < self.top_p[:, None]) | (self.top_p[:, None] == 1)
        noisy = jnp.where(kept, logits, -jnp.inf) + jnp.take_along_axis(noise, tokens, axis=1)
        return jnp.take_along_axis(tokens, noisy.argmax(-1)[:, None], axis=1)[:, 0].astype(
            jnp.int32
        )


def sampler_columns(samplers: Sequence[Sampler]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The temperature, top_k and top_p of samplers, as in `Samplers`."""
    return (
        np.array([_divisor(sampler.temperature) for sampler in samplers], np.float32),
        np.array([min(x.top_k or ALL_TOKENS, ALL_TOKENS) for x in samplers], np.int32),
        np.array([1.0 if x.top_p is None else x.top_p for x in samplers], np.float32),
    )


def _kind(sampler: Sampler) -> int:
    """The kind of sampling, as `Samplers.sample` finds it in the arrays."""
    if sampler.temperature == 0:
        return _GREEDY
    _, top_k, top_p = (column[0] for column in sampler_columns([sampler]))
    if top_k == ALL_TOKENS and top_p == 1:
        return _UNSORTED
    return _FEW if top_k <= FEW else _SORTED


def _divisor(temperature: float) -> float:
    """The temperature as a float32 divisor of logits that cannot overflow.

    At 1e-30 and below, any difference between logits already exceeds the noise.
    """
    return max(temperature, 1e-30) if temperature else 0.0
