"""Generation of tokens and texts from prompts.

decode.py       token ids: `generate` returns all at once, `Stream` a few tokens at a time
checks.py       checks of the arguments, and of the model's probabilities
sampling.py     how the next token is chosen
texts.py        `Writer`: texts and stop strings
requests.py     files of prompts, each with its own options
continuous.py   any number of requests in a fixed number of rows: `generate_requests`
decoding_rows.py  its two compiled programs
prompt_trie.py  which pieces of prompts it reads, and where their states are
answers.py      answers in a file, which a killed run resumes
saved_state.py  a model's state saved in a file, to continue a text later
"""

from retnet_jax.generation.continuous import Answer, TokenRequest, generate_requests
from retnet_jax.generation.decode import Generated, Stream, generate
from retnet_jax.generation.requests import Request
from retnet_jax.generation.sampling import Sampler
from retnet_jax.generation.texts import Continuation, Writer, answer_requests

__all__ = [
    "Answer",
    "Continuation",
    "Generated",
    "Request",
    "Sampler",
    "Stream",
    "TokenRequest",
    "Writer",
    "answer_requests",
    "generate",
    "generate_requests",
]
