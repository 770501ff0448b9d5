"""Evaluates a language model: perplexity, the seven tasks of the paper, recall.

    python eval.py --workdir=runs/quickstart                     the run's held-out documents
    python eval.py --checkpoint=DIR --data='corpus/**/*.txt'     any checkpoint, other text
    python eval.py --workdir=DIR --suite=paper --data=TASKS --output=result.json
    python eval.py --workdir=DIR --against=OTHER ...             two models, and their difference

Tables go to stdout; --output has them as Markdown too, and as JSON with all that it takes to repeat
the evaluation.
"""

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
from retnet_jax.files.paths import local
from retnet_jax.parallel import processes
from retnet_jax.programs import command_line


def main() -> None:
    """The program."""
    define_flags()
    command_line.run(_main)


def _main() -> None:
    """Evaluates as the flags say."""
    given = flags.FLAGS
    processes.connect(
        given.coordinator_address, given.num_processes, given.process_id, given.connect_seconds
    )
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
    """Not at import, so that a process can import this program along with others."""
    command_line.group("Models")
    flags.DEFINE_string("workdir", None, "training run, evaluated on what it held out, or --data")
    flags.DEFINE_string("checkpoint", None, "directory of a trained model, evaluated on --data")
    flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint"], required=True)
    flags.DEFINE_string("against", None, "another run or checkpoint, to compare with")
    command_line.define_dtype()
    command_line.group("Text and suites")
    flags.DEFINE_multi_string(
        "data",
        None,
        "text files by glob: one document a file or, if the glob ends in .jsonl, .json.gz or the "
        "like, one a line, in the field that the model's config.json names in data.text_field; "
        ".parquet. For tasks a directory with TASK/SPLIT.jsonl, or hf, or tfds. May be given twice",
    )
    flags.DEFINE_list(
        "suite",
        list(Plan.parts),
        f"of {', '.join(PARTS)}; paper: perplexity, tasks at 0 and 4 shots",
    )
    command_line.group("Perplexity")
    flags.DEFINE_list(
        "protocol",
        list(Plan.protocols),
        "what a token is predicted from: what its window has before it (window), at least the last "
        "--window_length - --stride tokens (sliding), its whole document (stateful)",
    )
    flags.DEFINE_integer("window_length", None, "tokens; if not given as in training", 1)
    flags.DEFINE_integer("stride", None, "tokens scored in a sliding window; if not given half", 1)
    flags.DEFINE_list(
        "context_lengths", [], "also the perplexity of the same 128 tokens after these contexts"
    )
    flags.DEFINE_bool("compressors", False, "also compress the text, with gzip -9 and xz -9")
    command_line.group("Tasks and recall")
    flags.DEFINE_list("tasks", list(TASKS), "names of tasks")
    flags.DEFINE_list("shots", None, "examples before a question; if not given 0, for paper 0,4")
    flags.DEFINE_enum(
        "shot_mode", Plan.shot_mode, SHOT_MODES, "drawn for each row anew, or once for all"
    )
    flags.DEFINE_enum(
        "variant", Plan.variant, VARIANTS, "texts of lm-evaluation-harness, or with clean spaces"
    )
    flags.DEFINE_integer("seed", Plan.seed, "of the examples and of the recall probes", 0)
    flags.DEFINE_integer("max_length", None, "tokens of a request, cut at its beginning", 1)
    flags.DEFINE_list("distances", list(map(str, Plan.distances)), "of the recall probes")
    flags.DEFINE_integer("trials", Plan.trials, "of each recall probe and distance", 2)
    command_line.group("How it is run")
    flags.DEFINE_integer(
        "batch_size",
        Plan.batch_size,
        "windows, documents or parts of requests at once, shared out among as many devices as "
        "divide it; accelerators are faster with more",
        1,
    )
    flags.DEFINE_bool("fsdp", False, "split the parameters over these devices too")
    flags.DEFINE_string("output", None, "JSON file to write, and Markdown beside it: new ones")
    command_line.define_processes()


def given_options(given, task_data: str | None) -> dict[str, Any]:
    """What the flags ask for, as the options of `make_plan`; None where they do not say.

    Raises:
      ConfigError: for a name that is not known, and for what should be a number and is not.
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
    """Raises `ConfigError` for data that is missing, and for data and flags that nothing uses."""
    parts = expanded(given.suite)
    perplexity, tasks, recall = (part in parts for part in PARTS)
    needs_text = perplexity or recall
    suite, protocols = ",".join(dict.fromkeys(parts)), ",".join(dict.fromkeys(given.protocol))
    if given.checkpoint is not None and text is None and needs_text:
        raise ConfigError(
            "--checkpoint is evaluated on --data: give text files, such as 'corpus/**/*.txt'"
        )
    if task_data is not None and not tasks:
        raise ConfigError(
            f"--data={task_data} is a place for tasks' rows, which --suite={suite} "
            f"does not use: for text give files, such as '{task_data}/*.txt'"
        )
    if text is not None and not needs_text:
        raise ConfigError(
            f"--data={text} is no directory; the tasks need one with TASK/SPLIT.jsonl (or hf, tfds)"
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
    """The integers of a flag."""
    if any(not value.isdecimal() or int(value) < least for value in values):
        raise ConfigError(f"--{flag}={','.join(values)}: numbers of {least} or more are needed")
    return tuple(dict.fromkeys(map(int, values)))


def divided(data: Sequence[str]) -> tuple[str | None, str | None]:
    """--data as the glob of text files and the place of the tasks' rows."""
    places = [value for value in data if value in HUBS or local(value).is_dir()]
    globs = [value for value in data if value not in places]
    for values, meaning in ((places, "for tasks"), (globs, "of text files")):
        if len(values) > 1:
            raise ConfigError(f"--data names {meaning} more than one: {', '.join(values)}")
    return globs[0] if globs else None, places[0] if places else None


def print_evaluation(
    directory: str | Path,
    *,
    data: str | None = None,
    against: str | Path | None = None,
    output: Path | None = None,
    **options: Any,
) -> None:
    """Evaluates the model in a directory, and one to compare it with; prints and writes tables.

    Args:
      directory: a run or a checkpoint.
      data: text files by glob; None: what the run held out.
      against: another run or checkpoint.
      output: JSON file; Markdown goes beside it.
      options: of `evaluate_models`.

    Raises:
      ConfigError, CheckpointError: before anything is computed, for input that does not fit.
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
