"""Trains a language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=FILE[:ARGUMENT] --workdir=DIR --config.train.steps=100 ...
    python train.py ... --config.init_from=DIR          begins with a trained model, own or foreign
    python train.py ... --compiled=FILE                 with what tools/compile_ahead.py saved

The same command again resumes from the newest checkpoint, or says that the run is finished. Ctrl-C
and SIGTERM save and end with status 0.

Many processes train one model: TPU pods, SLURM and MPI are recognised; elsewhere each process gets

    --coordinator_address=HOST:PORT --num_processes=N --process_id=I
"""

import signal
from pathlib import Path

from absl import flags
from jax.sharding import Mesh
from jax.stages import Compiled

from retnet_jax.aot.compile_step import load
from retnet_jax.config import Config
from retnet_jax.parallel import processes
from retnet_jax.programs import command_line
from retnet_jax.training.loop import train
from retnet_jax.training.step import TrainState


def main() -> None:
    """The program."""
    define_flags()
    # Who has seen enough of a run ends it as with Ctrl-C, and it is saved.
    command_line.run(_main, when_output_ends=lambda: signal.raise_signal(signal.SIGINT))


def define_flags() -> None:
    """Not at import, so that a process can import this program along with others."""
    command_line.group("The run")
    command_line.define_config()
    flags.DEFINE_string("workdir", None, "directory of the run, made if it does not exist")
    flags.mark_flag_as_required("workdir")
    flags.DEFINE_string("compiled", None, "step that tools/compile_ahead.py --save wrote")
    command_line.define_processes()


def _main() -> int:
    """Trains as the flags say; 1 after too many skipped steps or a last checkpoint that failed."""
    given = flags.FLAGS
    config = command_line.given_config()
    processes.connect(
        given.coordinator_address, given.num_processes, given.process_id, given.connect_seconds
    )

    def load_step(config: Config, mesh: Mesh, state_shape: TrainState) -> Compiled:
        return load(Path(given.compiled), config, mesh, state_shape)

    step = None if given.compiled is None else load_step
    with processes.ending_with_the_others("The same command resumes from the newest checkpoint."):
        result = train(config, given.workdir, step=step, command=command_line.prepare_command())
    return 0 if result.status in ("finished", "stopped") else 1
