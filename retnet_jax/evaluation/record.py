"""The JSON record of an evaluation: its results, and everything needed to repeat them."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from retnet_jax.config import ModelConfig
from retnet_jax.data import Tokenizer
from retnet_jax.evaluation.held_out_texts import Text
from retnet_jax.evaluation.measure import TaskRows
from retnet_jax.evaluation.plan import Plan
from retnet_jax.evaluation.results import Differences, Results, TokensRead
from retnet_jax.evaluation.statistics import Difference
from retnet_jax.evaluation.tables import Table
from retnet_jax.evaluation.task_requests import TaskResult
from retnet_jax.files.hub import cached_name
from retnet_jax.files.paths import is_remote
from retnet_jax.provenance import versions


def evaluation_record(
    models: Sequence[dict[str, Any]],
    differences: Differences | None,
    *,
    text: Text | None,
    tasks: Sequence[TaskRows],
    plan: Plan,
    compressed: dict[str, float],
    compressed_apart: dict[str, float],
    mesh: jax.sharding.Mesh,
    fsdp: bool,
) -> dict[str, Any]:
    """The record of the results of one model, or of two.

    Args:
      models: The `model_record` of each model.
      differences: Differences of the two models; None for one model.
      text: Documents of perplexity and recall.
      tasks: Rows of the tasks.
      plan: Options of the evaluation.
      compressed: Bits per byte by compressor.
      compressed_apart: The same for the documents that are reported apart.
      mesh: Mesh of the first model.
      fsdp: Whether the parameters were sharded over its devices.
    """
    first, against = models[0], None if differences is None else models[1]
    return {
        **first,
        "against": against,
        "first_less_second": None if differences is None else differences_as_json(differences),
        "data": text.record if text else None,
        "task_data": [_rows_record(task) for task in tasks],
        "plan": dataclasses.asdict(plan),
        "form": "chunkwise",
        "compressors": compressed,
        "compressors_apart": compressed_apart,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "fsdp": fsdp,
        "versions": versions("jax", "jaxlib", "flax", "numpy", "tokenizers", "retnet-jax"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def model_record(
    checkpoint: epath.Path | None,
    sha256: str | None,
    step: int | None,
    config: ModelConfig,
    tokenizer: Tokenizer,
    results: Results,
) -> dict[str, Any]:
    """The record of one model and its results.

    Args:
      checkpoint: Directory of the model; None for a model in memory. One in the cache of the
        Hugging Face hub is recorded as hf://OWNER/NAME@COMMIT.
      sha256: SHA-256 of the checkpoint's files.
      step: Step of a training run's checkpoint.
      config: Config of the model.
      tokenizer: Tokenizer of the model.
      results: Results of the model.
    """
    place = checkpoint
    if checkpoint is not None and not is_remote(checkpoint):
        place = cached_name(checkpoint) or checkpoint.absolute()
    return {
        "checkpoint": None if place is None else str(place),
        "checkpoint_sha256": sha256,
        "step": step,
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer.fingerprint,
        **results_as_json(results),
    }


def results_as_json(results: Results) -> dict[str, Any]:
    """The results of a model; None replaces NaN and infinity, which JSON does not have."""
    record: dict[str, Any] = {}
    if results.nll:
        record["protocols"] = {
            protocol: _finite(reports[""])
            | {"sources": {name: _finite(x) for name, x in reports.items() if name}}
            | {"apart": _finite(results.apart.perplexity[protocol][""]) if results.apart else None}
            for protocol, reports in results.perplexity.items()
        }
    if "stateful" in results.nll:
        record["positions"] = [_finite(x) for x in results.positions]
    if results.contexts:
        record["last_tokens"] = [
            {name: _number(x) for name, x in context._asdict().items()}
            for context in results.contexts
        ]
    if results.tasks:
        record["tasks"] = [
            _task(name, shots, result, results.read[name, shots])
            for (name, shots), result in results.tasks.items()
        ]
        record["truncated_requests"] = results.total_read.truncated
    if results.recall:
        record["recall"] = [
            {
                "probe": probe.probe,
                "distance": probe.distance,
                "accuracy": probe.accuracy,
                "standard_error": _number(probe.standard_error),
                "nll_per_token": _number(probe.nll_per_token),
                "random": probe.random,
                "trials": len(probe.correct),
            }
            for probe in results.recall
        ]
    return record


def _task(name: str, shots: int, result: TaskResult, read: TokensRead) -> dict[str, Any]:
    metrics = {
        metric: {
            "mean": result.accuracy(metric),
            "standard_error": _number(result.standard_error(metric)),
            "correct": correct.astype(int).tolist(),
        }
        for metric, correct in result.correct.items()
    }
    return {
        "task": name,
        "shots": shots,
        "rows": result.rows,
        "random": result.random,
        "majority": result.majority,
        "tokens_read": read.tokens,
        "tokens_without_sharing": read.without_sharing,
        **metrics,
    }


def differences_as_json(differences: Differences) -> dict[str, Any]:
    """The first model's results minus the second's, by protocol and by task."""
    record: dict[str, Any] = {
        protocol: _difference(found) for protocol, found in differences.bits_per_byte.items()
    }
    for (task, shots), metrics in differences.tasks.items():
        record[f"{task}, {shots} shots"] = {
            metric: _difference(found) for metric, found in metrics.items()
        }
    return record


def _difference(found: Difference) -> dict[str, float | None]:
    return _finite(found) | {"z": _number(found.z)}


def _rows_record(found: TaskRows) -> dict[str, Any]:
    """The SHA-256 of a task's rows."""
    return {
        "task": found.task.name,
        "rows_sha256": found.rows.sha256,
        "shots_sha256": None if found.pool is None else found.pool.sha256,
    }


def _finite(found) -> dict[str, Any]:
    return {name: _number(value) for name, value in dataclasses.asdict(found).items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_report(path: Path, record: dict[str, Any], tables: Sequence[Table]) -> None:
    """Writes the record as JSON, and the tables as Markdown beside it; neither file may exist."""
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
    lines += [table.markdown + "\n" for table in tables]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
