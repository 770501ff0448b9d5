"""Evaluates a language model: perplexity, the seven tasks of the paper, recall.

    python eval.py                                  the newest run, on its held-out documents
    python eval.py RUN                              this run
    python eval.py MODEL --data='corpus/**/*.txt'   a run or another trained model, on other text
    python eval.py MODEL --suite=paper --data=TASKS --output=result.json
    python eval.py MODEL --against=OTHER            two models and their difference

The results are printed as tables. --output also writes them to a JSON file, together with
everything needed to repeat the evaluation, and to a Markdown file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.plan import PARTS, PROTOCOLS, Plan, check_names, expanded
from retnet_jax.evaluation.record import write_report
from retnet_jax.evaluation.run import evaluate_models, subject
from retnet_jax.evaluation.task_requests import SHOT_MODES
from retnet_jax.evaluation.task_rows import HUBS
from retnet_jax.evaluation.tasks import TASKS, VARIANTS
from retnet_jax.files.paths import is_remote, local
from retnet_jax.parallel import processes
from retnet_jax.programs import command_line, compilation_cache
from retnet_jax.programs.host_memory import keep_freed_memory


def main() -> None:
    """The program."""
    define_flags()
    command_line.run(_main, positional=("workdir",))


def _main() -> None:
    """Evaluates as the flags say."""
    keep_freed_memory()
    given = flags.FLAGS
    processes.connect(
        given.coordinator_address, given.num_processes, given.process_id, given.connect_seconds
    )
    command_line.find_model()
    compilation_cache.use(given.compilation_cache)
    with processes.ending_with_the_others("Nothing was written."):
        text, task_data = divided(given.data or [])
        options = given_options(given, task_data)
        check_use(given, text, task_data)
        print_evaluation(
            given.workdir or given.checkpoint,
            data=text,
            against=given.against,
            dtype=given.dtype,
            fsdp=given.fsdp,
            compressors=given.compressors,
            output=None if given.output is None else local(given.output),
            **options,
        )


def define_flags() -> None:
    """Defines the flags; not at import, so that one process can import several programs."""
    _define_models()
    _define_data()
    _define_perplexity()
    _define_tasks_and_recall()
    command_line.group("Devices and output")
    flags.DEFINE_integer(
        "batch_size",
        Plan.batch_size,
        "Rows in a batch: windows, documents or parts of requests. Only a number of devices that "
        "divides it is used. Accelerators are faster with a larger one",
        1,
    )
    flags.DEFINE_bool("fsdp", False, "Also shard the parameters over the devices")
    flags.DEFINE_string(
        "output", None, "JSON file to write, with a Markdown file beside it; neither may exist"
    )
    compilation_cache.define_flag()
    command_line.define_processes()


def _define_models() -> None:
    command_line.group("Models")
    command_line.define_model_directory()
    flags.DEFINE_string("against", None, "Directory or hub name of a second model to compare with")
    command_line.define_dtype()


def _define_data() -> None:
    command_line.group("Suites and data")
    flags.DEFINE_list(
        "suite",
        list(Plan.parts),
        f"Parts of the evaluation: {', '.join(PARTS)}. paper: perplexity, and tasks at 0 and 4 "
        "shots",
    )
    flags.DEFINE_multi_string(
        "data",
        None,
        "Text files as a glob: one document per file. In .jsonl, .json.gz and the like each line "
        "is a document, in .parquet each row: its field is data.text_field of the model's "
        "config.json. For tasks: a directory with TASK/SPLIT.jsonl, or hf, or tfds. Give the flag "
        "twice for text and tasks",
    )


def _define_perplexity() -> None:
    command_line.group("Perplexity")
    flags.DEFINE_list(
        "protocol",
        list(Plan.protocols),
        "Context that a token is predicted from. window: the tokens before it in its window. "
        "sliding: at least the last (window_length - stride) tokens. stateful: its whole document",
    )
    flags.DEFINE_integer(
        "window_length", None, "Tokens in a window; default: the model's training length", 1
    )
    flags.DEFINE_integer(
        "stride", None, "Tokens scored in each sliding window; default: half of its length", 1
    )
    flags.DEFINE_list(
        "context_lengths",
        [],
        "Context lengths, in tokens, at which the same last 128 tokens are scored as well",
    )
    flags.DEFINE_bool(
        "compressors", False, "Also report the bits per byte of gzip -9 and xz -9 on the text"
    )


def _define_tasks_and_recall() -> None:
    command_line.group("Tasks and recall")
    flags.DEFINE_list("tasks", list(TASKS), "Names of the tasks")
    flags.DEFINE_list(
        "shots", None, "Numbers of examples before a question; default: 0, for paper 0,4"
    )
    flags.DEFINE_enum(
        "shot_mode",
        Plan.shot_mode,
        SHOT_MODES,
        "per-document: new examples for each question; fixed: the same examples for all",
    )
    flags.DEFINE_enum(
        "variant",
        Plan.variant,
        VARIANTS,
        "lm_eval: exactly the texts of lm-evaluation-harness; clean: the same with single spaces",
    )
    flags.DEFINE_integer("seed", Plan.seed, "Seed of the examples and of the recall probes", 0)
    flags.DEFINE_integer(
        "max_length", None, "Longest request in tokens; longer ones lose their beginning", 1
    )
    flags.DEFINE_list(
        "distances",
        list(map(str, Plan.distances)),
        "Distances of the recall probes: tokens between the text to remember and the question",
    )
    flags.DEFINE_integer("trials", Plan.trials, "Number of trials of each probe and distance", 2)


def given_options(given, task_data: str | None) -> dict[str, Any]:
    """The options of `make_plan` that the flags give; None where a flag is not given.

    Raises:
      ConfigError: for an unknown name, and for a value that should be a number and is not.
    """
    check_names("--suite", expanded(given.suite), PARTS)
    check_names("--protocol", given.protocol, PROTOCOLS)
    check_names("--tasks", given.tasks, TASKS)
    return {
        "parts": given.suite,
        "protocols": given.protocol,
        "window_length": given.window_length,
        "stride": given.stride,
        "context_lengths": numbers("context_lengths", given.context_lengths, least=128),
        "tasks": given.tasks,
        "task_data": task_data,
        "shots": numbers("shots", given.shots, least=0) if given.shots else None,
        "shot_mode": given.shot_mode,
        "variant": given.variant,
        "seed": given.seed,
        "max_length": given.max_length,
        "distances": numbers("distances", given.distances, least=1),
        "trials": given.trials,
        "batch_size": given.batch_size,
    }


def check_use(given, text: str | None, task_data: str | None) -> None:
    """Raises `ConfigError` for missing data, and for data and flags that have no effect."""
    parts = expanded(given.suite)
    perplexity, tasks, recall = (part in parts for part in PARTS)
    needs_text = perplexity or recall
    suite, protocols = ",".join(dict.fromkeys(parts)), ",".join(dict.fromkeys(given.protocol))
    if given.checkpoint is not None and text is None and needs_text:
        raise ConfigError(
            f"{given.checkpoint} is read as a checkpoint without documents of its own, so it needs "
            "--data: give text files, such as --data='corpus/**/*.txt', or a training run, whose "
            "held-out documents are read, as --workdir=RUN"
        )
    if task_data is not None and not tasks:
        raise ConfigError(
            f"--data={task_data} gives the rows of tasks, but --suite={suite} has no tasks; "
            f"for text give files, such as '{task_data}/*.txt'"
        )
    if text is not None and not needs_text:
        raise ConfigError(
            f"--data={text} is no directory; the tasks need one with TASK/SPLIT.jsonl, or hf, tfds"
        )
    used = {
        "protocol": perplexity,
        "context_lengths": perplexity,
        "window_length": perplexity and {"window", "sliding"} & set(given.protocol),
        "stride": perplexity and "sliding" in given.protocol,
        "compressors": perplexity,
        **dict.fromkeys(("tasks", "shots", "shot_mode", "variant", "max_length"), tasks),
        **dict.fromkeys(("distances", "trials"), recall),
        "seed": tasks or recall,
    }
    for flag, use in used.items():
        if given[flag].present and not use:
            raise ConfigError(
                f"--{flag} has no effect with --suite={suite} and --protocol={protocols}: "
                "leave it out"
            )


def numbers(flag: str, values: Sequence[str], least: int) -> tuple[int, ...]:
    """The values of a flag as integers, each once."""
    if any(not value.isdecimal() or int(value) < least for value in values):
        raise ConfigError(f"--{flag}={','.join(values)}: each must be an integer >= {least}")
    return tuple(dict.fromkeys(map(int, values)))


def divided(data: Sequence[str]) -> tuple[str | None, str | None]:
    """The values of --data: the glob of text files, and the place of the tasks' rows."""
    places = [value for value in data if value in HUBS or _is_local_directory(value)]
    globs = [value for value in data if value not in places]
    for values, meaning in ((places, "place of task rows"), (globs, "set of text files")):
        if len(values) > 1:
            raise ConfigError(f"--data names more than one {meaning}: {', '.join(values)}")
    return globs[0] if globs else None, places[0] if places else None


def _is_local_directory(value: str) -> bool:
    return not is_remote(value) and local(value).is_dir()


def print_evaluation(
    directory: str | Path,
    *,
    data: str | None = None,
    against: str | Path | None = None,
    output: Path | None = None,
    **options: Any,
) -> None:
    """Evaluates one model or two, prints the tables, and writes them if asked to.

    Args:
      directory: Training run or checkpoint.
      data: Glob of text files; None: the held-out text of the run.
      against: Second training run or checkpoint, compared with the first.
      output: JSON file to write; a Markdown file goes beside it.
      options: Further options of `evaluate_models`.

    Raises:
      ConfigError, CheckpointError: for unusable input, before anything is computed.
    """
    if output is not None and output.suffix == ".md":
        raise ConfigError(f"--output={output}: name the JSON file; the Markdown goes beside it")
    for path in () if output is None else (output, output.with_suffix(".md")):
        if path.exists():
            raise ConfigError(f"--output: {path} exists already: name another file, or delete it")
    directories = [directory] if against is None else [directory, against]
    evaluation = evaluate_models(
        [subject(path) for path in directories],
        data,
        hashed=output is not None,
        say=lambda description: print(description, end="\n\n", flush=True),
        **options,
    )
    if not processes.is_first():
        return
    if output is not None:
        write_report(output, evaluation.record, evaluation.tables)
    print(*evaluation.tables, sep="\n\n")
    if output is not None:
        print(f"written to {output} and {output.with_suffix('.md')}", file=sys.stderr)
