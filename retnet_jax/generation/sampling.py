"""Sampling: how the next token of each row of a batch is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p"],
    meta_fields=["candidates"],
)
@dataclass(frozen=True)
class Samplers:
    """The samplers of the rows of a batch, as arrays.

    Attributes:
      temperature: Temperature; 0 for greedy rows.
      top_k: Number of tokens to sample from; the largest int32 for all.
      top_p: Probability of the tokens to sample from; 1 for all.
      candidates: Number of most likely tokens that must be sorted, for top_k and top_p; 0: all
        rows are greedy; None: no row needs sorting.
    """

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    candidates: int | None

    @staticmethod
    def of(samplers: Sampler | Sequence[Sampler], rows: int) -> "Samplers":
        """Makes arrays from one sampler for all rows, or from one for each row.

        Raises:
          ConfigError: if the number of samplers is not `rows`.
        """
        each = [samplers] * rows if isinstance(samplers, Sampler) else list(samplers)
        if len(each) != rows:
            raise ConfigError(f"there are {len(each)} samplers for {rows} prompts")
        all_tokens = jnp.iinfo(jnp.int32).max
        if all(sampler.temperature == 0 for sampler in each):
            candidates = 0
        elif all(sampler.top_k is None and sampler.top_p is None for sampler in each):
            candidates = None
        else:
            drawing = [sampler for sampler in each if sampler.temperature > 0]
            candidates = max(sampler.top_k or all_tokens for sampler in drawing)
        return Samplers(
            temperature=jnp.array([_divisor(sampler.temperature) for sampler in each], jnp.float32),
            top_k=jnp.array([min(x.top_k or all_tokens, all_tokens) for x in each], jnp.int32),
            top_p=jnp.array([1.0 if x.top_p is None else x.top_p for x in each], jnp.float32),
            candidates=candidates,
        )

    def sample(self, keys: Array, logits: Float[Array, "b w"]) -> Int[Array, " b"]:
        """Samples one token of each row; of equal logits the lower id counts as more likely.

        A sample is the argmax of logits plus Gumbel noise. The noise belongs to token ids, not to
        ranks, so a row's sample does not depend on the samplers of other rows.

        Args:
          keys: Random key of each row [b].
          logits: Logits of all allowed tokens.
        """
        likeliest = logits.argmax(-1)
        if self.candidates == 0:
            return likeliest
        w = logits.shape[-1]
        noise = jax.vmap(partial(jax.random.gumbel, shape=(w,), dtype=logits.dtype))(keys)
        greedy = self.temperature == 0
        logits = logits / jnp.where(greedy, 1.0, self.temperature)[:, None]
        if self.candidates is None:
            drawn = (logits + noise).argmax(-1)
        else:
            logits, tokens = jax.lax.top_k(logits, min(self.candidates, w))  # in falling order
            places = jnp.arange(logits.shape[-1])
            logits = jnp.where(places < self.top_k[:, None], logits, -jnp.inf)
            probability = jax.nn.softmax(logits)
            likelier = probability.cumsum(-1) - probability
            # top_p = 1 keeps all tokens explicitly, because the cumulative sum is rounded.
            kept = (likelier < self.top_p[:, None]) | (self.top_p[:, None] == 1)
            noisy = jnp.where(kept, logits, -jnp.inf) + jnp.take_along_axis(noise, tokens, axis=1)
            drawn = jnp.take_along_axis(tokens, noisy.argmax(-1)[:, None], axis=1)[:, 0]
        return jnp.where(greedy, likeliest, drawn)


def _divisor(temperature: float) -> float:
    """The temperature as a float32 divisor of logits that cannot overflow.

    At 1e-30 and below, any difference between logits already exceeds the noise.
    """
    return max(temperature, 1e-30) if temperature else 0.0
