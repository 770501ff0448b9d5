"""Trains a language model.

    python train.py                                     the quickstart, in runs/quickstart
    python train.py --config=FILE[:ARGUMENT] --config.train.steps=100 ...
    python train.py ... --config.init_from=DIR          starts from a trained model
    python train.py ... --compiled=FILE                 runs the step of tools/compile_ahead.py

The same command resumes from the newest checkpoint; if the run is finished, it says so. Ctrl-C and
SIGTERM save a checkpoint and exit with status 0.

Several processes can train one model. TPU pods, SLURM and MPI are recognised; elsewhere start each
process with

    --coordinator_address=HOST:PORT --num_processes=N --process_id=I
"""

import shlex
import signal
import sys
from pathlib import Path

from absl import flags
from jax.sharding import Mesh
from jax.stages import Compiled

from retnet_jax.aot.compile_step import load
from retnet_jax.config import Config
from retnet_jax.parallel import processes
from retnet_jax.programs import command_line, compilation_cache
from retnet_jax.programs.host_memory import keep_freed_memory
from retnet_jax.programs.missing_corpus import check_corpus
from retnet_jax.programs.run_directories import default_workdir
from retnet_jax.training.loop import train
from retnet_jax.training.step import TrainState


def main() -> None:
    """The program."""
    define_flags()
    # `train.py | head` stops the run as Ctrl-C does: it is saved.
    command_line.run(_main, when_output_ends=lambda: signal.raise_signal(signal.SIGINT))


def define_flags() -> None:
    """Defines the flags; not at import, so that a process can import several programs."""
    command_line.group("The run")
    command_line.define_config(default="quickstart")
    flags.DEFINE_string(
        "workdir",
        None,
        "directory of the run, created if it does not exist; default: runs/ and the config's name, "
        "with the options that are changed",
    )
    flags.DEFINE_string("compiled", None, "compiled step from tools/compile_ahead.py --save=FILE")
    compilation_cache.define_flag()
    command_line.define_processes()


def _main() -> int:
    """Trains; returns 1 if the run diverged or its last checkpoint could not be written."""
    keep_freed_memory()
    given = flags.FLAGS
    config = command_line.given_config()
    processes.connect(
        given.coordinator_address, given.num_processes, given.process_id, given.connect_seconds
    )
    compilation_cache.use(given.compilation_cache)
    command = command_line.prepare_command()
    processes.once(lambda: check_corpus(config))
    workdir = given.workdir
    if workdir is None:
        workdir = default_workdir(command_line.config_name(), command_line.config_changes())

    def load_step(config: Config, mesh: Mesh, state_shape: TrainState) -> Compiled:
        return load(Path(given.compiled), config, mesh, state_shape)

    step = None if given.compiled is None else load_step
    with processes.ending_with_the_others("The same command resumes from the newest checkpoint."):
        result = train(config, workdir, step=step, command=command)
    if result.status == "finished" and processes.is_first():
        print(_next_commands(str(workdir)), file=sys.stderr)
    return 0 if result.status in ("finished", "stopped") else 1


def _next_commands(workdir: str) -> str:
    """The commands that use a trained model, one in a line."""
    installed = Path(sys.argv[0]).name.startswith("retnet-")
    evaluate = "retnet-eval" if installed else "python eval.py"
    generate = "retnet-generate" if installed else "python generate.py"
    run = shlex.quote(workdir)
    return f'evaluate:   {evaluate} {run}\ngenerate:   {generate} {run} "..."'
