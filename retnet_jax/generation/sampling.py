"""How the next token is chosen: settings for each row of a batch, and the choice itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from retnet_jax.errors import ConfigError
from retnet_jax.shapes import Array, Float, Int


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
      temperature: 0 where the likeliest token is taken.
      top_k: as many as there are tokens where all may be drawn.
      top_p: 1 where all may be drawn.
      candidates: how many of the likeliest tokens have to be looked at in order; 0: only the first,
        in all rows; None: no row asks for an order.
    """

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    candidates: int | None

    @staticmethod
    def of(samplers: Sampler | Sequence[Sampler], rows: int) -> "Samplers":
        """One sampler for all rows, or one for each.

        Raises:
          ConfigError: if there are others than `rows`.
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
        """One token of each row. Of equal logits the lower id counts as the likelier.

        A draw is the argmax of logits plus Gumbel noise, which belongs to tokens and not to places
        in an order: what a row gets does not depend on the settings of others.

        Args:
          keys: a random key for each row [b].
          logits: of all tokens that may be drawn.
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
            # All, where top_p is 1: sums of all may round to less or more.
            kept = (likelier < self.top_p[:, None]) | (self.top_p[:, None] == 1)
            noisy = jnp.where(kept, logits, -jnp.inf) + jnp.take_along_axis(noise, tokens, axis=1)
            drawn = jnp.take_along_axis(tokens, noisy.argmax(-1)[:, None], axis=1)[:, 0]
        return jnp.where(greedy, likeliest, drawn)


def _divisor(temperature: float) -> float:
    """The temperature that logits are divided by in float32, without overflow.

    From 1e-30 down the two closest of different logits are further apart than any noise.
    """
    return max(temperature, 1e-30) if temperature else 0.0
