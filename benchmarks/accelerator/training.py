"""The training step of the paper's configs on one device, with one document in each row.

It is train.py's step, compiled for rows without document borders: with borders, a Transformer on a
GPU cannot use flash attention (`retnet_jax/ops/flash_attention.py`).

A step has 32,768 tokens, in one micro-batch if memory allows, and recomputes only as much as memory
requires: `retnet_jax/aot/fit.py` proposes an arrangement, and the compiler checks
that it fits. Steps run without pauses, because one is always enqueued ahead; the time of a step is
the time between the previous step's metrics and its own. MFU counts
`ModelConfig.training_flops_per_token`, without recomputation.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.accelerator.cases import Case
from benchmarks.accelerator.timing import (
    REPEATS,
    check_memory,
    kernel_times,
    peak_bytes,
    summary,
)
from configs import retnet_1p3b, retnet_2p7b
from retnet_jax.aot.compile_step import CompiledStep, DoesNotFitError, compile_step
from retnet_jax.aot.fit import arrangements
from retnet_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from retnet_jax.data import Batch
from retnet_jax.parallel.chips import chip
from retnet_jax.parallel.sharding import batch_shardings
from retnet_jax.training.step import initial_state

CONFIGS = {"1.3B": retnet_1p3b.get_config, "2.7B": retnet_2p7b.get_config}
_TOKENS = 32_768  # tokens in a step
# Most tokens in a micro-batch that make it faster. Twice as many save the sum of two gradients.
_MICRO_BATCH = 32_768
_TRIES = 3


def cases(tiny: bool) -> Iterator[Case]:
    """The cases of the goals first: 1.3B at 8k, 32k and 2k."""
    if tiny:
        yield Case("tiny retnet t 32", partial(measure, "tiny", "retnet", tiny_config("retnet")))
        return
    order = [("1.3B", "retnet", t) for t in (8192, 32_768, 2048)]
    order += [("1.3B", "transformer", 8192), ("2.7B", "retnet", 8192)]
    order += [("2.7B", "transformer", 8192)]
    order += [("1.3B", "transformer", t) for t in (2048, 32_768)]
    order += [("2.7B", name, t) for name in ("retnet", "transformer") for t in (2048, 32_768)]
    for size, architecture, length in order:
        config = on_one_device(CONFIGS[size](architecture), length)
        name = f"{size} {architecture} t {length}"
        yield Case(name, partial(measure, size, architecture, config))
        if name == "1.3B retnet t 8192":
            written_out = dataclasses.replace(
                config, model=dataclasses.replace(config.model, scan_layers=False)
            )
            function = partial(measure, size, architecture, written_out)
            yield Case(f"{name} layers written out", function)


def tiny_config(architecture: str) -> Config:
    model = ModelConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, dtype="bfloat16")
    return Config(
        model=model.built_as(architecture),
        data=DataConfig(sequence_length=32),
        train=TrainConfig(batch_size=2),
    )


def on_one_device(config: Config, length: int) -> Config:
    """A config with rows of this length, and a step of `_TOKENS` tokens."""
    rows = max(1, _TOKENS // length)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence_length=length),
        train=dataclasses.replace(config.train, batch_size=rows, micro_batches=1),
    )


def measure(size: str, architecture: str, config: Config) -> dict:
    """A record of the step of a config."""
    step = compiled(config)
    config = step.config
    length, rows = config.data.sequence_length, config.train.batch_size
    timed = timed_steps(step)
    return summary(timed.seconds) | {
        "size": size,
        "architecture": architecture,
        "length": length,
        "rows": rows,
        "micro_batches": config.train.micro_batches,
        "remat": config.model.remat,
        "scan_layers": config.model.scan_layers,
        "parameters": config.model.parameter_count(),
        "flops_per_token": config.model.training_flops_per_token(length),
        "tokens_per_second": rows * length / statistics.median(timed.seconds),
        "peak_bytes": peak_bytes(step.compiled),
        "compile_seconds": step.compile_seconds,
        "losses": timed.losses,
        "kernels_ms": timed.kernels_ms,
    }


def compiled(config: Config) -> CompiledStep:
    """The compiled step in the first arrangement that fits.

    Raises:
      MemoryError: if none of the first `_TRIES` fits.
    """
    problems = []
    for candidate in candidates(config)[:_TRIES]:
        try:
            step = compile_step(candidate, jax.devices()[:1], one_document=True)
            check_memory(peak_bytes(step.compiled))
            return step
        except (DoesNotFitError, MemoryError) as error:
            rows = candidate.train.batch_size // candidate.train.micro_batches
            problems.append(f"{rows} rows, remat {candidate.model.remat}: {error}"[:150])
    raise MemoryError("; ".join(problems))


def candidates(config: Config) -> list[Config]:
    """Configs that are expected to fit, each with less memory than the last; the smallest ends."""
    smallest = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="full"),
        train=dataclasses.replace(config.train, micro_batches=config.train.batch_size),
    )
    if chip(jax.devices()[0].device_kind) is None:
        return [config, smallest]

    def badness(one):
        tokens = config.data.sequence_length * config.train.batch_size
        return -min(tokens // one.config.train.micro_batches, _MICRO_BATCH), one.seconds

    ranked = sorted(arrangements(config, jax.devices()[:1]), key=badness)
    chosen = []
    for one in ranked:
        less = not chosen or one.bytes < 0.9 * chosen[-1].bytes
        # Not remat="none", which does not fit for the longest rows; all lengths should be alike.
        if less and one.config.model.remat != "none":
            chosen.append(one)
    return [one.config for one in chosen[: _TRIES - 1]] + [smallest]


class TimedSteps(NamedTuple):
    """Steps on random tokens."""

    seconds: list[float]  # of each timed step
    losses: list[float]  # of all steps
    kernels_ms: dict[str, float]  # of one step, as from `kernel_times`


def timed_steps(step: CompiledStep) -> TimedSteps:
    """Runs steps, with one always enqueued before the last one's metrics are awaited."""
    config, mesh = step.config, step.mesh
    shardings = jax.tree.map(lambda x: x.sharding, step.state)
    batch = random_batch(config)
    with jax.set_mesh(mesh):
        state = jax.jit(partial(initial_state, config), out_shardings=shardings)()
        batch = jax.device_put(batch, batch_shardings(mesh, batch))
        metrics, arrived = [], []
        for i in range(REPEATS + 3):
            state, found = step.compiled(state, batch)
            metrics.append(found)
            if i > 0:
                jax.block_until_ready(metrics[-2])
                arrived.append(time.perf_counter())
        kernels = kernel_times(lambda: step.compiled(state, batch))
    # The first step is a warm-up; the second is timed from its metrics.
    losses = [float(x.loss) for x in metrics]
    return TimedSteps(np.diff(arrived[1:]).tolist(), losses, kernels)


def random_batch(config: Config) -> Batch:
    """A batch of random tokens, with one document in each row."""
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32
    )
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=None,
        weights=np.ones(shape, np.float32),
        continues=np.zeros(shape[0], bool),
    )
