"""Evaluates a language model: perplexity, the seven tasks of the paper, recall.

    python eval.py --workdir=runs/quickstart                     the run's held-out documents
    python eval.py --checkpoint=DIR --data='corpus/**/*.txt'     any checkpoint, other text
    python eval.py --workdir=DIR --suite=paper --data=TASKS --output=result.json
    python eval.py --workdir=DIR --against=OTHER ...             two models, and their difference

Tables go to stdout; --output has them as Markdown too, and as JSON with all that it takes to repeat
the evaluation.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from retnet_jax.config import Config, MeshConfig
from retnet_jax.data import Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation import (
    HUBS,
    PARTS,
    PROTOCOLS,
    SHOT_MODES,
    TASKS,
    VARIANTS,
    Plan,
    Results,
    TaskRows,
    Text,
    as_json,
    compressed_bits_per_byte,
    differences_as_json,
    evaluate_model,
    given_text,
    held_out_text,
    held_out_texts,
    read_tasks,
    tables,
    windows,
)
from retnet_jax.parallel import processes
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.pretrained import checkpoint_sha256, load_checkpoint, read_pretrained
from retnet_jax.programs import command_line
from retnet_jax.provenance import versions


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
        plan = given_plan(given, task_data)
        check_use(given, plan, text, task_data)
        evaluate(
            Path(given.workdir or given.checkpoint),
            plan,
            data=text,
            against=None if given.against is None else Path(given.against),
            changes=command_line.given_dtype(),
            fsdp=given.fsdp,
            compressors=given.compressors,
            output=None if given.output is None else Path(given.output),
        )


def define_flags() -> None:
    """Not at import, so that a process can import this program along with others."""
    flags.DEFINE_string("workdir", None, "training run, evaluated on what it held out, or --data")
    flags.DEFINE_string("checkpoint", None, "directory of a trained model, evaluated on --data")
    flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint"], required=True)
    flags.DEFINE_string("against", None, "another run or checkpoint, to compare with")
    flags.DEFINE_multi_string(
        "data",
        None,
        "text files by glob: one document a file or, if the glob ends in .jsonl, .json.gz or the "
        "like, one a line, in the field that the model's config.json names in data.text_field; "
        ".parquet. For tasks a directory with TASK/SPLIT.jsonl, or hf, or tfds. May be given twice",
    )
    flags.DEFINE_list(
        "suite", ["perplexity"], f"of {', '.join(PARTS)}; paper: perplexity, tasks at 0 and 4 shots"
    )
    flags.DEFINE_list(
        "protocol",
        ["window", "stateful"],
        "what a token is predicted from: what its window has before it (window), at least the last "
        "--window_length - --stride tokens (sliding), its whole document (stateful)",
    )
    flags.DEFINE_integer("window_length", None, "tokens; if not given as in training", 1)
    flags.DEFINE_integer("stride", None, "tokens scored in a sliding window; if not given half", 1)
    flags.DEFINE_list(
        "context_lengths", [], "also the perplexity of the same 128 tokens after these contexts"
    )
    flags.DEFINE_list("tasks", list(TASKS), "names of tasks")
    flags.DEFINE_list("shots", None, "examples before a question; if not given 0, for paper 0,4")
    flags.DEFINE_enum(
        "shot_mode", "per-document", SHOT_MODES, "drawn for each row anew, or once for all"
    )
    flags.DEFINE_enum(
        "variant", "lm_eval", VARIANTS, "texts of lm-evaluation-harness, or with clean spaces"
    )
    flags.DEFINE_integer("seed", 1234, "of the examples and of the recall probes", 0)
    flags.DEFINE_integer("max_length", None, "tokens of a request, cut at its beginning", 1)
    flags.DEFINE_list("distances", ["32", "128", "512", "2048", "8192"], "of the recall probes")
    flags.DEFINE_integer("trials", 64, "of each recall probe and distance", 2)
    command_line.define_dtype()
    flags.DEFINE_integer(
        "batch_size",
        4,
        "windows, documents or parts of requests at once, shared out among as many devices as "
        "divide it; accelerators are faster with more",
        1,
    )
    flags.DEFINE_bool("fsdp", False, "split the parameters over these devices too")
    command_line.define_processes()
    flags.DEFINE_bool("compressors", False, "also compress the text, with gzip -9 and xz -9")
    flags.DEFINE_string("output", None, "JSON file to write, and Markdown beside it: new ones")


def given_plan(given, task_data: str | None) -> Plan:
    """What the flags ask for.

    Raises:
      ConfigError: for a name that is none of those known, and a number that is none.
    """
    parts = []
    for part in given.suite:
        parts += ("perplexity", "tasks") if part == "paper" else (part,)
    for flag, names, known in (
        ("suite", parts, PARTS),
        ("protocol", given.protocol, PROTOCOLS),
        ("tasks", given.tasks, tuple(TASKS)),
    ):
        if not names:
            raise ConfigError(f"--{flag} is empty; it takes some of {', '.join(known)}")
        for name in names:
            if name not in known:
                raise ConfigError(f"--{flag}: {name!r} is none of {', '.join(known)}")
    shots = given.shots or (["0", "4"] if "paper" in given.suite else ["0"])
    return Plan(
        parts=tuple(dict.fromkeys(parts)),
        protocols=tuple(dict.fromkeys(given.protocol)),
        window_length=given.window_length or 0,
        stride=given.stride,
        context_lengths=numbers("context_lengths", given.context_lengths, least=128),
        tasks=tuple(dict.fromkeys(given.tasks)),
        task_data=task_data,
        shots=numbers("shots", shots, least=0),
        shot_mode=given.shot_mode,
        variant=given.variant,
        seed=given.seed,
        max_length=given.max_length,
        distances=numbers("distances", given.distances, least=1),
        trials=given.trials,
        batch_size=given.batch_size,
    )


def check_use(given, plan: Plan, text: str | None, task_data: str | None) -> None:
    """Raises `ConfigError` for data that is missing, and for data and flags that nothing uses."""
    if given.checkpoint is not None and text is None and needs_text(plan):
        raise ConfigError(
            "--checkpoint is evaluated on --data: give text files, such as 'corpus/**/*.txt'"
        )
    if task_data is not None and "tasks" not in plan.parts:
        raise ConfigError(
            f"--data={task_data} is a place for tasks' rows, which --suite={','.join(plan.parts)} "
            f"does not use: for text give files, such as '{task_data}/*.txt'"
        )
    if text is not None and not needs_text(plan):
        raise ConfigError(
            f"--data={text} is no directory; the tasks need one with TASK/SPLIT.jsonl (or hf, tfds)"
        )
    perplexity, tasks, recall = (part in plan.parts for part in PARTS)
    used = {
        "protocol": perplexity,
        "context_lengths": perplexity,
        "window_length": perplexity and {"window", "sliding"} & set(plan.protocols),
        "stride": perplexity and "sliding" in plan.protocols,
        "compressors": perplexity,
        **dict.fromkeys(("tasks", "shots", "shot_mode", "variant", "max_length"), tasks),
        **dict.fromkeys(("distances", "trials"), recall),
        "seed": tasks or recall,
    }
    for flag, use in used.items():
        if given[flag].present and not use:
            raise ConfigError(
                f"--{flag} has no effect with --suite={','.join(plan.parts)} and "
                f"--protocol={','.join(plan.protocols)}: leave it out"
            )


def numbers(flag: str, values: Sequence[str], least: int) -> tuple[int, ...]:
    """The integers of a flag."""
    if any(not value.isdecimal() or int(value) < least for value in values):
        raise ConfigError(f"--{flag}={','.join(values)}: numbers of {least} or more are needed")
    return tuple(dict.fromkeys(map(int, values)))


def divided(data: Sequence[str]) -> tuple[str | None, str | None]:
    """--data as the glob of text files and the place of the tasks' rows."""
    places = [value for value in data if value in HUBS or Path(value).is_dir()]
    globs = [value for value in data if value not in places]
    for values, meaning in ((places, "for tasks"), (globs, "of text files")):
        if len(values) > 1:
            raise ConfigError(f"--data names {meaning} more than one: {', '.join(values)}")
    return globs[0] if globs else None, places[0] if places else None


def evaluate(
    directory: Path,
    plan: Plan,
    *,
    data: str | None = None,
    against: Path | None = None,
    compressors: bool = False,
    output: Path | None = None,
    changes: dict[str, str] | None = None,
    fsdp: bool = False,
) -> None:
    """Evaluates the model in a directory, and one to compare it with; prints and writes tables.

    Args:
      directory: a run or a checkpoint.
      plan: what to do; a window_length of 0 stands for that of training.
      data: text files by glob; None: what the run held out.
      against: another run or checkpoint.
      compressors: whether to compress the text as well.
      output: JSON file.
      changes: fields of `ModelConfig`, such as dtype.
      fsdp: whether devices share the parameters.

    Raises:
      ConfigError, CheckpointError: before anything is computed, for input that does not fit.
    """
    if output is not None and output.suffix == ".md":
        raise ConfigError(f"--output={output}: name the JSON file; the Markdown goes beside it")
    for path in () if output is None else (output, output.with_suffix(".md")):
        if path.exists():
            raise ConfigError(f"--output: {path} exists already: name another file, or delete it")
    directories = [directory] if against is None else [directory, against]
    pretrained = [read_pretrained(path) for path in directories]
    text = read_text(directory, *pretrained[0], data) if needs_text(plan) else None
    tasks = read_tasks(plan)
    length = plan.window_length or pretrained[0][0].data.sequence_length
    plan = dataclasses.replace(plan, window_length=length, stride=plan.stride or -(-length // 2))
    if "sliding" in plan.protocols:
        windows(1, plan.window_length, plan.stride)  # before anything is computed
    mesh = evaluation_mesh(plan.batch_size, fsdp)

    results, models = [], []
    for path, (_, tokenizer) in zip(directories, pretrained, strict=True):
        own = text_for(tokenizer, pretrained[0][1], text)
        found, record = evaluate_one(path, tokenizer, own, tasks, plan, mesh, changes or {})
        results.append(found)
        models.append(record | as_json(found, own))
    if not processes.is_first():
        return
    compressed = compressed_bits_per_byte(text.joined) if compressors and text else {}
    names = [path.name for path in directories]
    if len(set(names)) < len(names) or "" in names:
        names = list(map(str, directories))
    found = tables(names, results, text, plan, compressed)
    print(*found, sep="\n\n")
    if output is not None:
        record = {
            **models[0],
            "against": models[1] if against else None,
            "first_less_second": differences_as_json(results, text) if against else None,
            "data": text.record if text else None,
            "task_data": [task_record(task) for task in tasks],
            "plan": dataclasses.asdict(plan),
            "form": "chunkwise",
            "compressors": compressed,
            "device": jax.devices()[0].device_kind,
            "devices": mesh.size,
            "processes": jax.process_count(),
            "fsdp": fsdp,
            "versions": versions("jax", "jaxlib", "flax", "numpy", "tokenizers", "retnet-jax"),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        write_report(output, record, found)


def needs_text(plan: Plan) -> bool:
    """Whether documents are read: for perplexity, or to put between in the recall probes."""
    return "perplexity" in plan.parts or "recall" in plan.parts


def read_text(directory: Path, config: Config, tokenizer: Tokenizer, data: str | None) -> Text:
    """The documents to evaluate on."""
    if data is not None:
        return given_text(data, config.data.text_field, tokenizer)
    return held_out_text(config, tokenizer, directory)


def text_for(tokenizer: Tokenizer, of_text: Tokenizer, text: Text | None) -> Text | None:
    """The same documents in the tokens of another model."""
    if text is None or tokenizer.fingerprint == of_text.fingerprint:
        return text
    return dataclasses.replace(text, tokens=held_out_texts.encoded(text.texts, tokenizer))


def evaluate_one(
    directory: Path,
    tokenizer: Tokenizer,
    text: Text | None,
    tasks: Sequence[TaskRows],
    plan: Plan,
    mesh: jax.sharding.Mesh,
    changes: dict[str, str],
) -> tuple[Results, dict[str, Any]]:
    """The results of one model, and what says which it was."""
    model, step = load_checkpoint(directory, mesh, **changes)
    if processes.is_first():
        print(
            f"{directory}{'' if step is None else f', step {step}'}: {type(model).__name__} of "
            f"{model.config.parameter_count():,} parameters, {model.config.dtype}"
        )
        print(text.description if text else f"tasks of {plan.task_data}", end="\n\n", flush=True)
    # On the mesh from the start, or the first piece's state would have a compilation of its own.
    with jax.set_mesh(mesh):
        results = evaluate_model(model, tokenizer, text, tasks, plan)
    return results, {
        "checkpoint": str(directory.absolute()),
        # Read once, where the record is written.
        "checkpoint_sha256": checkpoint_sha256(directory, step) if processes.is_first() else None,
        "step": step,
        "model": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.fingerprint,
    }


def evaluation_mesh(batch_size: int, fsdp: bool) -> jax.sharding.Mesh:
    """A mesh of as many devices as divide the rows of a batch; of several processes, of all."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), batch_size)]
    axes = {"data": 1, "fsdp": -1} if fsdp else {"data": -1}
    return make_mesh(MeshConfig(**axes), devices)


def task_record(found: TaskRows) -> dict[str, Any]:
    """Which rows a task had."""
    return {
        "task": found.task.name,
        "rows_sha256": found.rows.sha256,
        "shots_sha256": None if found.pool is None else found.pool.sha256,
    }


def write_report(path: Path, record: dict[str, Any], found: Sequence) -> None:
    """Writes JSON, and the tables as Markdown beside it; neither exists yet."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    lines = [f"# {record['checkpoint']}", ""]
    lines += [f"- {name}: {record[name]}" for name in ("checkpoint_sha256", "step", "tokenizer")]
    lines += [f"- {name}: {record[name]}" for name in ("form", "device", "devices", "versions")]
    lines += [f"- date: {record['date']}"]
    lines += [f"- dtype: {record['model']['dtype']}", f"- data: {record['data']}"]
    lines += [f"- tasks: {record['task_data']}", f"- plan: {record['plan']}", ""]
    lines += [table.markdown + "\n" for table in found]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
