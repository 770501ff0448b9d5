"""Time in which the programs start, with an empty and a filled cache of compiled programs.

    python -m benchmarks.start_up --directory=SCRATCH [--rounds=5]

The model is the quickstart's. The first call builds its store and trains a few steps, in
SCRATCH/store and SCRATCH/run. In every round each program starts with an empty cache, and again
with the cache of that start:

    train     until the first step of a new run is logged
    eval      until the end, on a text of a few windows
    generate  until the end, of 16 tokens

`import retnet_jax` takes turns with `import jax, flax.nnx`.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.measure import write_results
from retnet_jax.programs import command_line

ROOT = Path(__file__).parent.parent
PROGRAMS = ("train", "eval", "generate")
IMPORTS = {"jax, flax.nnx": "import jax, flax.nnx", "retnet_jax": "import retnet_jax"}
# The face of the package is lazy, so this is what a notebook waits for.
IMPORTS["retnet_jax, used"] = "from retnet_jax import RetNet, generate, load_pretrained"

flags.DEFINE_string("directory", None, "Scratch directory; used again by later calls")
flags.mark_flag_as_required("directory")
flags.DEFINE_integer("rounds", 5, "Number of starts of each kind")


def main() -> None:
    directory = Path(flags.FLAGS.directory).absolute()
    prepare(directory)
    seconds: dict[str, dict[str, list[float]]] = {
        **{name: {"first": [], "second": []} for name in PROGRAMS},
        "import": {name: [] for name in IMPORTS},
    }
    for _ in range(flags.FLAGS.rounds):
        for name in PROGRAMS:
            shutil.rmtree(directory / "cache", ignore_errors=True)
            for start in ("first", "second"):
                seconds[name][start].append(seconds_to_start(name, directory))
        for name, program in IMPORTS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
            seconds["import"][name].append(time.perf_counter() - begin)
    results = summary(seconds)
    print(json.dumps(results["median_seconds"], indent=2))
    print(f"second start / first start: {json.dumps(results['second_to_first'])}")
    print(f"written to {write_results('start_up', results)}")


def prepare(directory: Path) -> None:
    """Trains the model that is evaluated and generates, if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "text.txt").write_text((ROOT / "train.py").read_text())
    if not (directory / "run" / "config.json").exists():
        subprocess.run(train_command(directory, "run"), cwd=ROOT, check=True)


def train_command(directory: Path, run: str) -> list[str]:
    """The command that trains the quickstart's model for two steps and logs each."""
    changed = {
        "data.store": directory / "store",
        "train.steps": 2,
        "train.log_every": 1,
        "train.eval_batches": 1,
        "optimizer.warmup_steps": 1,
    }
    return [
        *command("train", directory),
        f"--workdir={directory / run}",
        "--config=quickstart",
        *(f"--config.{name}={value}" for name, value in changed.items()),
    ]


def command(program: str, directory: Path) -> list[str]:
    return [sys.executable, f"{program}.py", f"--compilation_cache={directory / 'cache'}"]


def seconds_to_start(program: str, directory: Path) -> float:
    """Seconds from the start of a program to the event that this benchmark's text names."""
    if program == "train":
        shutil.rmtree(directory / "new", ignore_errors=True)
        return seconds_to_first_step(train_command(directory, "new"))
    options = {
        "eval": [f"--data={directory / 'text.txt'}"],
        "generate": ["--prompt=def read_lines(path):", "--max_tokens=16"],
    }
    arguments = [f"--workdir={directory / 'run'}", *options[program]]
    begin = time.perf_counter()
    subprocess.run(
        [*command(program, directory), *arguments], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - begin


def seconds_to_first_step(arguments: list[str]) -> float:
    """Seconds until a training run logs its first step; it then runs to its end."""
    begin, found = time.perf_counter(), 0.0
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if not found and "step 1/" in line:
                found = time.perf_counter() - begin
    if process.returncode or not found:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}")
    return found


def summary(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The times, their medians, and the medians of the ratios of each round."""
    return {
        "seconds": seconds,
        "median_seconds": {
            name: {what: statistics.median(times) for what, times in of_program.items()}
            for name, of_program in seconds.items()
        },
        "second_to_first": {
            name: statistics.median(
                second / first for first, second in zip(*seconds[name].values(), strict=True)
            )
            for name in PROGRAMS
        },
    }


if __name__ == "__main__":
    command_line.run(main)
