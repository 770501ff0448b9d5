"""From prompts to text.

decode.py       token ids: `generate`, all at once, and `Stream`, as they come
checks.py       prompts, lengths and ends that do not fit; probabilities that are not finite
sampling.py     how a token is chosen
texts.py        `Writer`: texts and stop strings
requests.py     prompts with samplers of their own, from files
saved_state.py  what a model has read, in a file
"""

from retnet_jax.generation.decode import Generated, Stream, generate
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.texts import Continuation, Writer

__all__ = ["Continuation", "Generated", "Sampler", "Stream", "Writer", "generate"]
