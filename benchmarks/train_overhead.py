"""Overhead of train.py's loop over its compiled step: input, metrics and logging.

    python -m benchmarks.train_overhead [--config=configs/quickstart.py] [--segments=6] [--steps=40]

Segments of the real loop and of a bare loop over the same compiled step take turns. The batches of
the bare loop are on the device from the start, and it waits only for its last step.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from benchmarks.measure import write_results
from retnet_jax.data import open_stores
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.processes import StopRequest
from retnet_jax.programs import command_line
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.log import MetricsLog
from retnet_jax.training.loop import Run
from retnet_jax.training.start import start_or_restore
from retnet_jax.training.step import abstract_state, make_step

flags.DEFINE_integer("segments", 6, "Number of timed segments of each loop")
flags.DEFINE_integer("steps", 40, "Number of steps in a segment")


def main() -> None:
    config, steps = command_line.given_config(), flags.FLAGS.steps
    segments = flags.FLAGS.segments + 1  # the first one compiles, and is not counted
    config.train.eval_every = config.train.checkpoint_every = 10**9
    mesh = make_mesh(config.mesh)
    stores = open_stores(config.data, config.model.vocab_size)
    state_shape = abstract_state(config, mesh)
    looped, bare = [], []
    with tempfile.TemporaryDirectory() as directory, jax.set_mesh(mesh):
        checkpoints = Checkpoints(Path(directory) / "checkpoints", keep=1)
        log = MetricsLog(Path(directory), 0, 10**9)
        with contextlib.closing(checkpoints), contextlib.closing(log):
            step = make_step(config, state_shape)
            run = Run(config, Path(directory), mesh, stores, step, checkpoints, log)
            state, progress, _ = start_or_restore(
                config, mesh, state_shape, checkpoints, Path(directory)
            )
            run.begin(state, progress)
            for segment in range(segments):
                start = time.perf_counter()
                run.advance((segment + 1) * steps, StopRequest())
                looped.append((time.perf_counter() - start) / steps)

                # Batches of their own: after steps on the same ones, others would be spikes.
                first = 10**6 + segment * steps
                batches = [run.batches[number] for number in range(first, first + steps)]
                start = time.perf_counter()
                state = run.state
                for batch in batches:
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                run.state = state
                bare.append((time.perf_counter() - start) / steps)
    ratios = [a / b for a, b in zip(looped[1:], bare[1:], strict=True)]
    results = {
        "config": flags.FLAGS["config"].value and str(flags.FLAGS["config"].config_filename),
        "steps_in_a_segment": steps,
        "loop_ms": [1000 * x for x in looped[1:]],
        "bare_ms": [1000 * x for x in bare[1:]],
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }
    print(
        f"loop {statistics.median(results['loop_ms']):.1f} ms per step, bare "
        f"{statistics.median(results['bare_ms']):.1f} ms; median of {len(ratios)} ratios "
        f"{results['median_ratio']:.4f} (lowest {min(ratios):.4f}, highest {max(ratios):.4f})"
    )
    print(f"written to {write_results(f'train_overhead_{jax.default_backend()}', results)}")


if __name__ == "__main__":
    command_line.define_config()
    flags.FLAGS.set_default("config", "configs/quickstart.py")
    command_line.run(main)
