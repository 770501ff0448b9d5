"""Generation of tokens and texts from prompts.

decode.py       token ids: `generate` returns all at once, `Stream` a few tokens at a time
checks.py       checks of the arguments, and of the model's probabilities
sampling.py     how the next token is chosen
texts.py        `Writer`: texts and stop strings
requests.py     files of prompts, each with its own sampler
saved_state.py  a model's state saved in a file, to continue a text later
"""

from retnet_jax.generation.decode import Generated, Stream, generate
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.texts import Continuation, Writer

__all__ = ["Continuation", "Generated", "Sampler", "Stream", "Writer", "generate"]
