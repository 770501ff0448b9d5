"""Evaluation of a model, for programs and notebooks."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding

from retnet_jax.config import Config, MeshConfig
from retnet_jax.data import Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.compressors import compressed_bits_per_byte
from retnet_jax.evaluation.held_out_texts import (
    Text,
    encoded,
    given_text,
    held_out_text,
    text_of_documents,
)
from retnet_jax.evaluation.measure import TaskRows, evaluate_model, read_tasks
from retnet_jax.evaluation.plan import Plan, make_plan
from retnet_jax.evaluation.record import evaluation_record, model_record
from retnet_jax.evaluation.results import Results, differences
from retnet_jax.evaluation.tables import Table, result_tables
from retnet_jax.files.hub import cached_name, model_directory
from retnet_jax.model import LanguageModel
from retnet_jax.parallel import processes
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.pretrained import checkpoint_sha256, is_run, load_checkpoint, read_pretrained


def evaluate(
    model_or_directory: LanguageModel | str | Path,
    texts: str | Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    fsdp: bool = False,
    compressors: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model and returns the record that eval.py writes as JSON.

        record = evaluate("runs/quickstart")
        record = evaluate(model, ["a text", "another"], tokenizer=tokenizer)
        record["protocols"]["window"]["bits_per_byte"]

    Nothing is printed to stdout; progress bars go to stderr if it is a terminal.

    Args:
      model_or_directory: Model, evaluated on the devices of its parameters; or directory of a
        training run or a checkpoint, or name on the Hugging Face hub, loaded onto a number of
        devices that divides `batch_size`.
      texts: Glob of text files, as --data of eval.py, or a list of documents; None: the held-out
        documents of the run.
      tokenizer: Tokenizer of a model; not for a directory, which has its own.
      dtype: Dtype of activations; None: that of the directory.
      fsdp: Whether to shard the parameters of a directory over the devices.
      compressors: Whether to compress the texts with gzip and xz as a baseline.
      options: Options of `make_plan` and `Plan`, such as parts=("perplexity", "tasks", "recall"),
        protocols=("window", "sliding", "stateful"), window_length, stride, tasks, task_data, shots,
        distances, batch_size, with the defaults of eval.py. The training length of a model in
        memory is unknown, so its default `window_length` is 2048.

    Returns:
      The record, which json.dumps accepts. With several processes each returns it, but
      `checkpoint_sha256` and `compressors` are only in that of the first process.

    Raises:
      ConfigError, CheckpointError: for unusable input, before anything is computed.
    """
    evaluation = evaluate_models(
        [subject(model_or_directory, tokenizer)],
        texts,
        dtype=dtype,
        fsdp=fsdp,
        compressors=compressors,
        **options,
    )
    return evaluation.record


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
      source: The model, or its directory.
      config: Config of its run; for a checkpoint or a model in memory, the known part of it.
      tokenizer: Tokenizer of the model.
    """

    source: LanguageModel | epath.Path
    config: Config
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """The results of one model, or of two.

    Attributes:
      record: Results for JSON.
      tables: Results as tables.
    """

    record: dict[str, Any]
    tables: list[Table]


def subject(source: LanguageModel | str | Path, tokenizer: Tokenizer | None = None) -> Subject:
    """A model with its config and tokenizer; the weights of a directory are not loaded yet.

    Raises:
      ConfigError: as `read_pretrained`; for a model with no tokenizer or an unsuitable one, and for
        a directory with a `tokenizer` argument.
    """
    if not isinstance(source, LanguageModel):
        if tokenizer is not None:
            raise ConfigError(f"{source} has its own tokenizer: leave out `tokenizer`")
        directory = model_directory(source)
        return Subject(directory, *read_pretrained(directory))
    if tokenizer is None:
        raise ConfigError("a model in memory needs its tokenizer: give `tokenizer`")
    tokenizer.check_fits("the tokenizer", source.config.vocab_size)
    return Subject(source, Config(model=source.config), tokenizer)


def evaluate_models(
    subjects: Sequence[Subject],
    texts: str | Sequence[str] | None = None,
    *,
    dtype: str | None = None,
    fsdp: bool = False,
    compressors: bool = False,
    hashed: bool = True,
    say: Callable[[str], object] = lambda description: None,
    **options: Any,
) -> Evaluation:
    """Evaluates one model, or two on the same texts and tasks.

    Args:
      subjects: The models. The config of the first gives the held-out texts and the window length.
      texts: As in `evaluate`.
      dtype: As in `evaluate`.
      fsdp: As in `evaluate`.
      compressors: As in `evaluate`.
      hashed: Whether the record has `checkpoint_sha256`, which takes reading every file again.
      say: Called in the first process with a description of each model before it is evaluated.
      options: As in `evaluate`.

    Raises:
      As `evaluate`.
    """
    first = subjects[0]
    plan = make_plan(first.config.data.sequence_length, **options)
    if texts is not None and not plan.needs_text:
        raise ConfigError(f"texts have no effect with parts={','.join(plan.parts)}: leave them out")
    in_memory = any(isinstance(each.source, LanguageModel) for each in subjects)
    if in_memory and (fsdp or dtype is not None):
        raise ConfigError("fsdp and dtype are for directories: a model in memory is not changed")
    text = _read_text(first, texts) if plan.needs_text else None
    tasks = read_tasks(plan)
    meshes = [_mesh(each.source, plan.batch_size, fsdp) for each in subjects]
    results, models = [], []
    for each, mesh in zip(subjects, meshes, strict=True):
        own = _text_for(each.tokenizer, first.tokenizer, text)
        found, record = _evaluate_one(each, own, tasks, plan, mesh, dtype, hashed, say)
        results.append(found)
        models.append(record)
    compressed, compressed_apart = {}, {}
    if compressors and text and processes.is_first():
        compressed = compressed_bits_per_byte(text.joined)
        compressed_apart = compressed_bits_per_byte(text.apart.joined) if text.apart else {}
    differ = differences(*results) if len(results) == 2 else None
    return Evaluation(
        evaluation_record(
            models,
            differ,
            text=text,
            tasks=tasks,
            plan=plan,
            compressed=compressed,
            compressed_apart=compressed_apart,
            mesh=meshes[0],
            fsdp=fsdp,
        ),
        result_tables(_names(subjects), results, differ, plan, compressed, compressed_apart),
    )


def _evaluate_one(
    of: Subject,
    text: Text | None,
    tasks: Sequence[TaskRows],
    plan: Plan,
    mesh: Mesh,
    dtype: str | None,
    hashed: bool,
    say: Callable[[str], object],
) -> tuple[Results, dict[str, Any]]:
    """The results of one model, and its part of the record; its weights are freed."""
    directory = model = step = None
    if isinstance(of.source, LanguageModel):
        model = of.source
    else:
        directory = of.source
        model, step = load_checkpoint(directory, mesh, **({"dtype": dtype} if dtype else {}))
    first = processes.is_first()
    if first:
        place = (cached_name(directory) or directory) if directory else "in memory"
        say(
            f"{place}{'' if step is None else f', step {step}'}: "
            f"{type(model).__name__} of {model.config.parameter_count():,} parameters, "
            f"{model.config.dtype}\n{text.description if text else f'tasks of {plan.task_data}'}"
        )
    # With the mesh set from the start; otherwise the first piece would be compiled separately.
    with jax.set_mesh(mesh):
        results = evaluate_model(model, of.tokenizer, text, tasks, plan)
    # Only the first process, which writes the record, computes the hash.
    sha256 = checkpoint_sha256(directory, step) if directory and hashed and first else None
    return results, model_record(directory, sha256, step, model.config, of.tokenizer, results)


def _read_text(of: Subject, texts: str | Sequence[str] | None) -> Text:
    """The documents to evaluate on."""
    if isinstance(texts, str):
        return given_text(texts, of.config.data.text_field, of.tokenizer)
    if texts is not None:
        return text_of_documents(texts, of.tokenizer)
    if isinstance(of.source, LanguageModel) or not is_run(of.source):
        raise ConfigError(
            "only a training run has held-out documents: give texts such as 'corpus/**/*.txt'"
        )
    return held_out_text(of.config, of.tokenizer, of.source)


def _text_for(tokenizer: Tokenizer, of_text: Tokenizer, text: Text | None) -> Text | None:
    """The same documents, encoded by the tokenizer of this model if it is another one."""
    if text is None or tokenizer.fingerprint == of_text.fingerprint:
        return text
    return dataclasses.replace(
        text,
        tokens=encoded(text.texts, tokenizer),
        apart=_text_for(tokenizer, of_text, text.apart),
    )


def _mesh(source: LanguageModel | epath.Path, batch_size: int, fsdp: bool) -> Mesh:
    """The mesh of a model, or the mesh onto which a directory is loaded."""
    if not isinstance(source, LanguageModel):
        return evaluation_mesh(batch_size, fsdp)
    sharding = jax.tree.leaves(source)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return make_mesh(MeshConfig(), list(sharding.device_set))


def evaluation_mesh(batch_size: int, fsdp: bool) -> Mesh:
    """A mesh of the most devices that divide `batch_size`; of all, with several processes."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), batch_size)]
    axes = {"data": 1, "fsdp": -1} if fsdp else {"data": -1}
    return make_mesh(MeshConfig(**axes), devices)


def _names(subjects: Sequence[Subject]) -> list[str]:
    """A short name for each model, or the whole path if short names are not unique.

    A model on the Hugging Face hub has its name there, and the commit instead of the path.
    """
    directories = [x.source for x in subjects if not isinstance(x.source, LanguageModel)]
    if len(directories) < len(subjects):
        return [f"model {number}" for number in range(1, len(subjects) + 1)]
    on_hub = [cached_name(directory) for directory in directories]
    names = [
        directory.name if name is None else name.repository
        for directory, name in zip(directories, on_hub, strict=True)
    ]
    if len(set(names)) == len(names) and "" not in names:
        return names
    return [str(name or path) for name, path in zip(on_hub, directories, strict=True)]
