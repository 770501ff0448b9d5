"""Evaluates a language model: its perplexity and bits per byte on text it was not trained on.

    python eval.py --workdir=runs/quickstart                     the run's held-out documents
    python eval.py --checkpoint=DIR --data='corpus/**/*.txt'     any checkpoint, other text
    python eval.py ... --protocol=stateful --compressors --output=result.json

A table goes to stdout; --output has the same and all that it takes to repeat it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from retnet_jax import command_line, processes
from retnet_jax.config import Config, ConfigError, DataConfig, MeshConfig
from retnet_jax.data import Skipped, Tokenizer, files, open_store, read_documents
from retnet_jax.evaluation import (
    PerplexityReport,
    compressed_bits_per_byte,
    document_nll_stateful,
    document_nll_window,
    perplexity_report,
)
from retnet_jax.model import LanguageModel
from retnet_jax.pretrained import load_checkpoint, read_pretrained
from retnet_jax.sharding import make_mesh

PROTOCOLS = ("window", "stateful")


def main() -> None:
    """Evaluates as the flags say."""
    given = flags.FLAGS
    processes.connect(
        given.coordinator_address, given.num_processes, given.process_id, given.connect_seconds
    )
    with processes.ending_with_the_others("Nothing was written."):
        evaluate(
            Path(given.workdir or given.checkpoint),
            data=given.data,
            protocols=PROTOCOLS if given.protocol == "both" else (given.protocol,),
            window_length=given.window_length,
            changes=command_line.given_dtype(),
            batch_size=given.batch_size,
            fsdp=given.fsdp,
            compressors=given.compressors,
            output=None if given.output is None else Path(given.output),
        )


def define_flags() -> None:
    """Not at import, so that a process can import this program along with others."""
    flags.DEFINE_string("workdir", None, "training run, evaluated on what it held out, or --data")
    flags.DEFINE_string("checkpoint", None, "directory of a trained model, evaluated on --data")
    flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint"], required=True)
    flags.DEFINE_string(
        "data",
        None,
        "files by glob: one document a file or, if the glob ends in .jsonl, .json.gz or the like, "
        "one a line, in the field that the model's config.json names in data.text_field; .parquet",
    )
    flags.register_multi_flags_validator(
        ["checkpoint", "data"],
        lambda given: given["checkpoint"] is None or given["data"] is not None,
        message="--checkpoint is evaluated on --data: give files, such as 'corpus/**/*.txt'",
    )
    flags.DEFINE_enum(
        "protocol",
        "both",
        [*PROTOCOLS, "both"],
        "what a token is predicted from: what its window has before it, or its whole document",
    )
    flags.DEFINE_integer("window_length", None, "tokens; if not given as in training", 1)
    command_line.define_dtype()
    flags.DEFINE_integer(
        "batch_size",
        4,
        "windows or documents at once, shared out among as many devices as divide it; "
        "accelerators are faster with more",
        1,
    )
    flags.DEFINE_bool("fsdp", False, "split the parameters over these devices too")
    command_line.define_processes()
    flags.DEFINE_bool("compressors", False, "also compress the text, with gzip -9 and xz -9")
    flags.DEFINE_string("output", None, "JSON file to write; it must not exist")


def evaluate(
    directory: Path,
    *,
    data: str | None,
    protocols: Iterable[str],
    window_length: int | None,
    batch_size: int,
    compressors: bool,
    output: Path | None,
    changes: dict[str, str] | None = None,
    fsdp: bool = False,
) -> None:
    """Evaluates the model in a directory; the arguments are the flags of those names,
    and `changes` fields of its `ModelConfig`, such as dtype.

    Raises:
      ConfigError, CheckpointError: before anything is computed, for input that does not fit.
    """
    if output is not None and output.exists():
        raise ConfigError(f"--output={output} exists already: name another file, or delete it")
    config, tokenizer = read_pretrained(directory)
    text = (
        held_out_text(config, tokenizer, directory)
        if data is None
        else given_text(data, config.data.text_field, tokenizer)
    )
    mesh = evaluation_mesh(batch_size, fsdp)
    model, step = load_checkpoint(directory, mesh, **(changes or {}))
    window_length = window_length or config.data.sequence_length

    title = (
        f"{directory}{'' if step is None else f', step {step}'}: {type(model).__name__} of "
        f"{model.config.parameter_count():,} parameters, {model.config.dtype}\n"
        f"{text.description}"
    )
    if processes.is_first():
        print(title, end="\n\n", flush=True)
    # On the mesh from the start, or the first piece's state would have a compilation of its own.
    with jax.set_mesh(mesh):
        reports = {
            protocol: report(model, text, protocol, window_length, batch_size)
            for protocol in protocols
        }
    if not processes.is_first():
        return
    compressed = compressed_bits_per_byte(text.joined) if compressors else {}
    print(table(reports, window_length, compressed))
    if output is not None:
        record = {
            "checkpoint": str(directory.absolute()),
            "step": step,
            "model": dataclasses.asdict(model.config),
            "tokenizer": tokenizer.fingerprint,
            "data": text.origin | {"sha256": hashlib.sha256(text.joined).hexdigest()},
            "window_length": window_length,
            "batch_size": batch_size,
            "protocols": {
                name: as_json(found[""])
                | {"sources": {k: as_json(v) for k, v in found.items() if k}}
                for name, found in reports.items()
            },
            "compressors": compressed,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }
        write_json(output, record)


def evaluation_mesh(batch_size: int, fsdp: bool) -> jax.sharding.Mesh:
    """A mesh of as many devices as divide the rows of a batch; of several processes, of all."""
    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), batch_size)]
    axes = {"data": 1, "fsdp": -1} if fsdp else {"data": -1}
    return make_mesh(MeshConfig(**axes), devices)


class Text(NamedTuple):
    """Documents to evaluate on."""

    tokens: list[np.ndarray]  # ids of each, BOS first
    texts: list[str]
    byte_counts: np.ndarray  # of each as it was before it became tokens
    sources: list[str]  # the store of each, or nothing
    description: str  # for people
    origin: dict[str, Any]  # for the JSON

    @property
    def joined(self) -> bytes:
        """All documents in one."""
        return "".join(self.texts).encode("utf-8")


def held_out_text(config: Config, tokenizer: Tokenizer, workdir: Path) -> Text:
    """The held-out documents of the store that a run was trained on.

    Raises:
      ConfigError: if the store is not there, is damaged, or has another tokenizer.
    """
    directories = list(config.data.mixture) or [config.data.store]
    tokens, byte_counts, sources, stores = [], [], [], []
    for directory in directories:
        if not files.exists(directory):
            raise ConfigError(
                f"data.store={directory!r} of {workdir / 'config.json'} does not exist (from "
                f"{Path.cwd()}): start where the run was trained, or give other text with --data"
            )
        store = open_store(directory)
        if store.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"data.store={directory!r} has another tokenizer "
                f"({store.tokenizer.fingerprint[:12]}) than {workdir} "
                f"({tokenizer.fingerprint[:12]}): it is not the store that the run was trained on; "
                "give text with --data"
            )
        tokens += [store.held_out.document(i) for i in range(len(store.held_out))]
        byte_counts.append(store.held_out.byte_counts)
        sources += [directory] * len(store.held_out)
        stores.append({"store": directory, "options": store.manifest["options"]})
    return Text(
        tokens,
        texts=[tokenizer.decode(ids.tolist()) for ids in tokens],
        byte_counts=np.concatenate(byte_counts),
        sources=sources,
        description=f"held-out documents of {', '.join(directories)}",
        origin={"split": "held_out", "stores": stores},
    )


def given_text(pattern: str, text_field: str, tokenizer: Tokenizer) -> Text:
    """The documents in files; what cannot be used is left out, and said on stderr.

    Raises:
      ConfigError: if no file matches or none has a document.
    """
    source = source_of(pattern)
    skipped = Skipped()
    try:
        config = DataConfig(source=source, path=pattern, text_field=text_field)
        documents = list(read_documents(config, skipped))
    except ConfigError as error:
        raise ConfigError(f"--data: {error}") from None
    if not documents:
        raise ConfigError(f"--data={pattern} has no documents; {skipped.count} skipped: {skipped}")
    if skipped.count:
        rest = [f"and {skipped.count - 20} more"] if skipped.count > 20 else []
        print(f"skipped {skipped.count}:", *skipped.first[:20], *rest, sep="\n  ", file=sys.stderr)
    texts = [document.text for document in documents]
    return Text(
        tokens=[
            np.array([tokenizer.bos_id, *ids], np.int32) for ids in tokenizer.encode_batch(texts)
        ],
        texts=texts,
        byte_counts=np.array([document.byte_count for document in documents]),
        sources=[""] * len(documents),
        description=f"documents of {pattern}",
        origin={"files": pattern, "source": source, "skipped": skipped.as_dict()},
    )


def source_of(pattern: str) -> str:
    """The source that reads the files of a glob."""
    if pattern.endswith(".parquet"):
        return "parquet"
    lines = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
    return "jsonl" if pattern.endswith(lines) else "text"


def report(
    model: LanguageModel, text: Text, protocol: str, window_length: int, batch_size: int
) -> dict[str, PerplexityReport]:
    """Evaluates by one protocol, with a bar if stderr is a terminal.

    Returns:
      The report of all documents under "", and those of each source, if there are several.
    """
    from tqdm import tqdm

    bar = tqdm(
        desc=protocol,
        total=sum(len(tokens) - 1 for tokens in text.tokens),
        unit="token",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=None,
    )
    with bar:
        if protocol == "window":
            nll = document_nll_window(
                model,
                text.tokens,
                window_length=window_length,
                batch_size=batch_size,
                progress=bar.update,
            )
        else:
            nll = document_nll_stateful(
                model, text.tokens, batch_size=batch_size, progress=bar.update
            )
    reports = {"": perplexity_report(nll, text.tokens, text.texts, text.byte_counts)}
    sources = list(dict.fromkeys(text.sources))
    for source in sources if len(sources) > 1 else []:
        of_source = np.flatnonzero(np.array(text.sources) == source)
        tokens, texts = ([x[i] for i in of_source] for x in (text.tokens, text.texts))
        reports[source] = perplexity_report(
            nll[of_source], tokens, texts, text.byte_counts[of_source]
        )
    return reports


def table(
    reports: dict[str, dict[str, PerplexityReport]],
    window_length: int,
    compressed: dict[str, float],
) -> str:
    """A row for each protocol, those of each source below it, and each compressor."""
    rows = [
        ("", "bits/byte", "std. error", "token ppl", "word ppl", "documents", "tokens", "bytes")
    ]
    for protocol, by_source in reports.items():
        label = f"window of {window_length}" if protocol == "window" else protocol
        for source, found in by_source.items():
            rows.append(
                (
                    f"  {source}" if source else label,
                    f"{found.bits_per_byte:.4f}",
                    "-" if math.isnan(found.standard_error) else f"± {found.standard_error:.4f}",
                    f"{found.token_perplexity:,.6g}",
                    f"{found.word_perplexity:,.6g}",
                    f"{found.documents:,}",
                    f"{found.tokens:,}",
                    f"{found.bytes:,}",
                )
            )
    rows += [(name, f"{bits:.4f}", *[""] * 6) for name, bits in compressed.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def as_json(found: PerplexityReport) -> dict[str, float | None]:
    """The fields of a report, None for what is no number: JSON has neither infinity nor NaN."""
    return {
        name: value if math.isfinite(value) else None
        for name, value in dataclasses.asdict(found).items()
    }


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("jax", "retnet-jax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a file that does not exist yet, and its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        json.dump(record, file, indent=2, allow_nan=False)
        file.write("\n")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
