"""The documents that a model is evaluated on: held-out documents of its run, files, or strings."""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from retnet_jax.config import Config, DataConfig
from retnet_jax.data import Tokenizer, open_store
from retnet_jax.data.sources import Skipped, read_documents
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.runs.workdir import check_store


@dataclass(frozen=True)
class Text:
    """Documents to evaluate on.

    Attributes:
      tokens: Token ids of each document, BOS first.
      texts: The documents as strings.
      byte_counts: Number of UTF-8 bytes of each document before it was tokenized.
      sources: Store of each document, or "".
      description: Description to print.
      origin: Description for the JSON record.
      apart: Documents that are reported apart from these (`data.apart`); None: there are none.
    """

    tokens: list[np.ndarray]
    texts: list[str]
    byte_counts: np.ndarray
    sources: list[str]
    description: str
    origin: dict[str, Any]
    apart: "Text | None" = None

    @property
    def joined(self) -> bytes:
        """All documents joined, as UTF-8."""
        return "".join(self.texts).encode("utf-8")

    @property
    def record(self) -> dict[str, Any]:
        """The origin of the documents, and the SHA-256 that identifies them."""
        record = self.origin | {"sha256": hashlib.sha256(self.joined).hexdigest()}
        return record | ({"apart": self.apart.record} if self.apart else {})


def encoded(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each document, BOS first."""
    return [np.array([tokenizer.bos_id, *ids], np.int32) for ids in tokenizer.encode_batch(texts)]


def held_out_text(config: Config, tokenizer: Tokenizer, workdir: epath.Path) -> Text:
    """The held-out documents of the stores that a run was trained on.

    Raises:
      ConfigError: if a store is missing, is damaged, or has another tokenizer; if `data.apart`
        matches all documents.
    """
    directories = list(config.data.mixture) or [config.data.store]
    tokens, byte_counts, sources, names, stores = [], [], [], [], []
    for directory in directories:
        if not files.exists(directory):
            raise ConfigError(
                f"data.store={directory!r} of {workdir / 'config.json'} does not exist in "
                f"{Path.cwd()}: start where the run was trained, or give text with --data"
            )
        store = open_store(directory)
        check_store(workdir, store)
        if store.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"data.store={directory!r} has another tokenizer "
                f"({store.tokenizer.fingerprint[:12]}) than {workdir} "
                f"({tokenizer.fingerprint[:12]}), so the run was not trained on it; give text with "
                "--data"
            )
        tokens += [store.held_out.document(i) for i in range(len(store.held_out))]
        byte_counts.append(store.held_out.byte_counts)
        sources += [directory] * len(store.held_out)
        names += store.held_out.names
        stores.append({"store": directory, "options": store.manifest["options"]})
    text = Text(
        tokens,
        texts=[tokenizer.decode(ids.tolist()) for ids in tokens],
        byte_counts=np.concatenate(byte_counts),
        sources=sources,
        description=f"held-out documents of {', '.join(directories)}",
        origin={"split": "held_out", "stores": stores},
    )
    return _divided(text, names, config.data.apart) if config.data.apart else text


def _divided(text: Text, names: Sequence[str], pattern: str) -> Text:
    """The text, with the documents whose name a regular expression matches in its `apart`."""
    matches = np.array([re.search(pattern, name) is not None for name in names], bool)
    if matches.all():
        raise ConfigError(f"data.apart={pattern!r} matches the names of all held-out documents")
    apart = _part(text, matches, f"documents that data.apart={pattern!r} matches", "apart")
    others = _part(text, ~matches, text.description, "others")
    if not matches.any():
        return dataclasses.replace(
            others, description=f"{text.description} (data.apart={pattern!r} matches none)"
        )
    return dataclasses.replace(
        others,
        description=f"{text.description}, {matches.sum():,} of {len(names):,} apart",
        apart=apart,
    )


def _part(text: Text, which: np.ndarray, description: str, name: str) -> Text:
    """The documents where `which` [documents] is True."""
    chosen = np.flatnonzero(which).tolist()
    return Text(
        tokens=[text.tokens[i] for i in chosen],
        texts=[text.texts[i] for i in chosen],
        byte_counts=text.byte_counts[chosen],
        sources=[text.sources[i] for i in chosen],
        description=description,
        origin=text.origin | {"part": name},
    )


def given_text(pattern: str, text_field: str, tokenizer: Tokenizer) -> Text:
    """The documents in files; unusable ones are skipped and listed on stderr.

    Raises:
      ConfigError: if no file matches, or no file has a document.
    """
    source = _source_of(pattern)
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
        tokens=encoded(texts, tokenizer),
        texts=texts,
        byte_counts=np.array([document.byte_count for document in documents]),
        sources=[""] * len(documents),
        description=f"documents of {pattern}",
        origin={"files": pattern, "source": source, "skipped": skipped.as_dict()},
    )


def text_of_documents(texts: Sequence[str], tokenizer: Tokenizer) -> Text:
    """Documents given as strings.

    Raises:
      ConfigError: if there is none, or one is empty or not valid Unicode.
    """
    if not texts:
        raise ConfigError("texts is empty: give at least one document, or None for held-out ones")
    for number, text in enumerate(texts):
        if not text:
            raise ConfigError(f"texts[{number}] is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(f"texts[{number}] cannot be written as UTF-8: {error}") from None
    texts = list(texts)
    return Text(
        tokens=encoded(texts, tokenizer),
        texts=texts,
        byte_counts=np.array([len(text.encode("utf-8")) for text in texts]),
        sources=[""] * len(texts),
        description=f"{len(texts)} given documents",
        origin={"documents": len(texts)},
    )


def _source_of(pattern: str) -> str:
    """The value of `data.source` that reads the files of a glob."""
    if pattern.endswith(".parquet"):
        return "parquet"
    lines = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
    return "jsonl" if pattern.endswith(lines) else "text"
