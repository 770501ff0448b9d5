"""Reading prompts and generating, with models of the paper's sizes and random parameters.

Models are prepared by `for_decoding`, with weights and states in bfloat16.

`decode` is timed from a random state at a position. The position does not change the size of a
RetNet's state; a Transformer's cache has that number of filled slots. One call generates `_TOKENS`
tokens in one compiled loop. `weight_bytes` counts all parameters except the embedding, because a
token reads only one of its rows; with the bytes of the state they give the bound
(`bounds.decoding_bytes`). `prefill` is timed on the host, including its work there.
"""

import time
from collections.abc import Iterator
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.cases import Case
from benchmarks.accelerator.timing import (
    REPEATS,
    check_memory,
    kernel_times,
    memory_limit,
    peak_bytes,
    summary,
)
from benchmarks.accelerator.training import tiny_config
from benchmarks.programs import (
    bytes_of,
    decoding_model,
    random_progress,
    state_bytes,
    weight_bytes,
)
from configs import retnet_1p3b, retnet_2p7b, retnet_6p7b
from retnet_jax.generation.decode import decode, prefill, row_keys
from retnet_jax.model import LanguageModel

CONFIGS = {
    "6.7B": retnet_6p7b.get_config,
    "1.3B": retnet_1p3b.get_config,
    "2.7B": retnet_2p7b.get_config,
    "tiny": tiny_config,
}
_TOKENS = 32  # tokens in a timed call
_PROMPT_TOKENS = 16_384  # most prompt tokens of all rows together


def cases(tiny: bool) -> Iterator[Case]:
    """The 6.7B size before the others; in each size the cases of the goals before the others."""
    for size in ("tiny",) if tiny else ("6.7B", "1.3B", "2.7B"):
        for part in (_goals_of, _others_of):
            for architecture in ("retnet", "transformer"):
                yield from part(size, architecture)


def _goals_of(size: str, architecture: str) -> Iterator[Case]:
    near, middle, far = _positions(size)
    yield _decoding(size, architecture, 1, near)
    if architecture == "retnet":
        yield _decoding(size, architecture, 1, far)
        yield from (_decoding(size, architecture, batch, near) for batch in _batches(size)[1:2])
    most = 1 if size == "tiny" else 4096
    name = f"{size} {architecture} best batch position {middle}"
    yield Case(name, partial(best_batch, size, architecture, middle, most))


def _others_of(size: str, architecture: str) -> Iterator[Case]:
    _, middle, far = _positions(size)
    batches = _batches(size)
    for batch in batches:
        length = max(64, min(8192, _PROMPT_TOKENS // batch))
        name = f"{size} {architecture} prefill batch {batch} length {length}"
        yield Case(name, partial(measure_prefill, size, architecture, batch, length))
    if size == "tiny":
        return
    for position in (1000, 10_000, far):
        if (architecture, position) != ("retnet", far):
            yield _decoding(size, architecture, 1, position)
    for batch in batches[2:]:
        yield _decoding(size, architecture, batch, 100)
    for batch in batches[1:]:
        yield _decoding(size, architecture, batch, far if architecture == "retnet" else middle)


def _decoding(size: str, architecture: str, batch: int, position: int) -> Case:
    name = f"{size} {architecture} batch {batch} position {position}"
    return Case(name, partial(measure, size, architecture, batch, position))


def _positions(size: str) -> tuple[int, int, int]:
    return (10, 10, 100) if size == "tiny" else (100, 8192, 100_000)


def _batches(size: str) -> tuple[int, ...]:
    return (1,) if size == "tiny" else (1, 64, 16, 256)


def measure(size: str, architecture: str, batch: int, position: int) -> dict:
    """A record of decoding a batch, all rows at one position."""
    model = random_model(size, architecture)
    # The same for all positions of a RetNet, so that they share a program.
    capacity = 0 if architecture == "retnet" else position + _TOKENS * (REPEATS + 2)
    decoder = _decoder(size, architecture, batch, capacity)
    progress, seconds = random_progress(model, batch, capacity, position), []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        tokens, progress = decoder(model, progress, row_keys(0, batch))
        jax.block_until_ready(tokens)
        seconds.append((time.perf_counter() - begin) / _TOKENS)
    finite = bool(jnp.isfinite(progress.logits).all())
    kernels = kernel_times(lambda: decoder(model, progress, row_keys(0, batch)))
    found = summary(seconds[1:])
    return found | {
        "size": size,
        "architecture": architecture,
        "batch": batch,
        "position": position,
        "tokens_per_second": batch / (found["ms"] / 1000),
        "peak_bytes": peak_bytes(decoder),
        "finite": finite,
        "kernels_ms": {name: ms / _TOKENS for name, ms in kernels.items()},
        **traffic(model, position),
    }


def best_batch(size: str, architecture: str, position: int, most: int) -> dict:
    """The record of the fastest batch size, a power of two, and the tokens/s of all sizes tried.

    The search begins with the largest size that fits, and ends when a smaller one is slower.
    """
    tried, best, batch = {}, None, largest_batch(size, architecture, position, most)
    while batch >= 1:
        try:
            record = measure(size, architecture, batch, position)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tried[str(batch)] = "out of memory"
        else:
            tried[str(batch)] = record["tokens_per_second"]
            if best is not None and record["tokens_per_second"] < best["tokens_per_second"]:
                break
            best = record
        batch //= 2
    if best is None:
        raise MemoryError("not even a batch of one row fits")
    return best | {"tried": tried}


def largest_batch(size: str, architecture: str, position: int, most: int) -> int:
    """The largest power of two for which the weights and the states of all rows fit in memory."""
    limit = memory_limit()
    if limit is None:
        return most
    model = random_model(size, architecture)
    of_row = state_bytes(model, 1, position + _TOKENS * (REPEATS + 2))
    rows = (limit - bytes_of(model)) / of_row
    return min(most, 1 << max(0, int(np.log2(max(rows, 1)))))


def measure_prefill(size: str, architecture: str, batch: int, length: int) -> dict:
    """A record of reading prompts of random tokens."""
    model = random_model(size, architecture)
    vocabulary = model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (batch, length)).tolist()
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(prefill(model, prompts, room=1).logits)
        seconds.append(time.perf_counter() - begin)
    found = summary(seconds[1:])
    speed = batch * length / (found["ms"] / 1000)
    described = {"size": size, "architecture": architecture, "batch": batch, "length": length}
    return found | described | {"tokens_per_second": speed}


_models: dict[tuple[str, str], LanguageModel] = {}  # only the last model


def random_model(size: str, architecture: str) -> LanguageModel:
    """A model with random parameters, kept until another model is asked for."""
    if (size, architecture) not in _models:
        _models.clear()  # frees the last model before the next is made
        config = CONFIGS[size](architecture).model
        state_dtype = "bfloat16" if architecture == "retnet" else None
        _models[size, architecture] = decoding_model(config, "bfloat16", state_dtype)
    return _models[size, architecture]


def traffic(model: LanguageModel, position: int) -> dict[str, int]:
    """Bytes of weights read in a step, and of state read and written for a row."""
    read = state_bytes(model, 1, position)
    written = read if model.config.mixer == "retention" else read // position
    return {
        "weight_bytes": weight_bytes(model),
        "state_read_bytes": read,
        "state_written_bytes": written,
    }


@lru_cache(maxsize=2)
def _decoder(size: str, architecture: str, batch: int, capacity: int) -> jax.stages.Compiled:
    model = random_model(size, architecture)
    progress = jax.eval_shape(lambda: random_progress(model, batch, capacity, 0))
    decoder = decode.lower(model, progress, row_keys(0, batch), length=_TOKENS).compile()
    check_memory(peak_bytes(decoder))
    return decoder
