"""The surveys of a corpus, and whether a store can be built from it.

A survey is made for each shard before its documents are encoded. It has the number of documents in
each split, the skipped documents, two different names, samples of text, and a digest of each text.
If the ends of documents are held out, the two parts of a document count as two documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from retnet_jax.config import DataConfig
from retnet_jax.data.bpe_sample import Sample
from retnet_jax.data.sources import Document, Skipped
from retnet_jax.data.token_store import SPLITS
from retnet_jax.data.workers import advance
from retnet_jax.errors import ConfigError
from retnet_jax.files.digests import sha256_of

_TRIED_CHARACTERS = 400_000
_TRIED_OF_DOCUMENT = 4_000  # so that the sample has at least a hundred documents


class ShardSurvey(NamedTuple):
    """What is known of a shard before its documents are encoded."""

    found: dict[str, Any]  # as JSON
    digests: np.ndarray  # "digest": of each document's text, "held_out": its split


def survey_documents(
    config: DataConfig, documents: Iterable[tuple[str, Document]], skipped: Skipped
) -> ShardSurvey:
    """Reads the documents of a shard to count and sample them, and to find duplicates.

    Args:
      config: The data options.
      documents: The split of each document, and the document.
      skipped: The skipped documents, complete when all documents are read.
    """
    digests, held_out = bytearray(), bytearray()
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    sample, tried = Sample(), sample_to_try()
    names: list[str] = []
    for split, document in documents:
        counts[split] += 1
        if len(names) < 2 and document.name not in names:
            names.append(document.name)
        digests += digest_of(document)
        held_out.append(split == "held_out")
        if split == "train" and config.tokenizer == "bpe":
            sample.add(document)
        tried.add(document)
        advance(len(document.text))
    table = np.empty(len(held_out), [("digest", "V16"), ("held_out", bool)])
    table["digest"] = np.frombuffer(digests, "V16")
    table["held_out"] = np.frombuffer(held_out, bool)
    found = {
        "documents": counts,
        "names": names,
        "content": sha256_of(digests),
        "skipped": skipped.as_dict(),
        "sample": sample.items(),
        "tried": tried.items(),
    }
    return ShardSurvey(found, table)


def digest_of(document: Document) -> bytes:
    """The digest by which documents with the same text are found."""
    return hashlib.blake2b(document.text.encode(), digest_size=16).digest()


def check_documents(config: DataConfig, surveys: list[dict], held_out_by: str) -> None:
    """Raises `ConfigError` if there are no documents, or if all have one name.

    Args:
      config: The data options.
      surveys: Surveys of all shards.
      held_out_by: What is held out in them, "document" or "tail".
    """
    counts = documents_of(surveys)
    documents = sum(counts.values())
    if not documents:
        skipped = skipped_of(surveys)
        raise ConfigError(
            f"data.source={config.source!r} with data.path={config.path!r} gives no documents; "
            f"{skipped.count} skipped{f': {skipped}' if skipped.count else ''}"
        )
    if held_out_by == "tail":
        return
    names = {name for survey in surveys for name in survey["names"]}
    if not all(counts.values()) and len(names) == 1 and documents > 1:
        raise ConfigError(
            f"all {documents} documents have one name, {names.pop()!r}, but names decide which "
            f"documents are held out; set data.id_field={config.id_field!r} to a field that "
            "differs, or to a field that no record has: then documents are named by their number"
        )


def check_splits(config: DataConfig, surveys: list[dict], held_out_by: str) -> None:
    """Raises `ConfigError` for a corpus without documents in one of the splits.

    Args:
      config: The data options.
      surveys: Surveys of all shards.
      held_out_by: What is held out in them, "document" or "tail".
    """
    counts = documents_of(surveys)
    if all(counts.values()):
        return
    documents = sum(counts.values())  # also by "tail": if a split is empty, none was divided
    noun, they_are = ("document", "it is") if documents == 1 else ("documents", "they are")
    why, more = "", "documents, or hold out their ends with data.held_out_by='tail'"
    if held_out_by == "tail":
        why, more = f", because {they_are} too short to divide", "text"
    if not counts["held_out"]:
        raise ConfigError(
            f"data.held_out={config.held_out} holds out none of {documents} {noun}{why}; raise it, "
            f"or give more {more}"
        )
    raise ConfigError(
        f"data.held_out={config.held_out} leaves none of {documents} {noun} to train on{why}; "
        f"lower it, or give more {more}"
    )


def kept_documents(
    tables: list[np.ndarray], deduplicate: bool
) -> tuple[list[np.ndarray], dict[str, int], int]:
    """Which documents are kept.

    Of documents with the same text the first is kept, in the order of the shards. Without
    deduplication all are kept, except copies in `train` of a held-out text. So no text is in both
    splits. All digests are in memory at once, 16 bytes for each document. If the ends of documents
    are held out, the two parts of each count as documents.

    Args:
      tables: The digests of each shard (`ShardSurvey.digests`).
      deduplicate: `data.deduplicate`.

    Returns:
      A mask for each shard, the number of documents kept in each split, and the number of different
      texts in both.
    """
    words = np.concatenate([x["digest"] for x in tables]).view("<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal texts stay in their order
    ordered = words[order]
    first = np.ones(len(words), bool)  # whether a document is the first with its text, in `order`
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    kept, held_out = np.ones(len(words), bool), np.concatenate([x["held_out"] for x in tables])
    if deduplicate:
        kept[order] = first
    else:
        text = np.cumsum(first) - 1
        kept[order] = held_out[order] | ~np.isin(text, text[held_out[order]])
    masks = np.split(kept, np.cumsum([len(x) for x in tables])[:-1])
    counts = {"train": int((kept & ~held_out).sum()), "held_out": int((kept & held_out).sum())}
    return masks, counts, int(first.sum())


def check_kept(
    config: DataConfig, surveys: list[dict], kept: dict[str, int], texts: int, held_out_by: str
) -> None:
    """Raises `ConfigError` if a split has no documents after duplicates are removed.

    Args:
      config: The data options.
      surveys: Surveys of all shards.
      kept: Number of documents in each split without duplicates.
      texts: Number of different texts in both splits.
      held_out_by: What is held out in the surveys, "document" or "tail".
    """
    counts = documents_of(surveys)
    documents = sum(counts.values())
    if all(kept.values()):
        return
    if held_out_by == "tail":
        raise ConfigError(
            f"data.held_out={config.held_out} holds out the ends of documents, but their texts are "
            "so much alike that a split has none of its own; give more text"
        )
    if texts == 1:
        raise ConfigError(
            f"all {documents} documents have the same text, and one text cannot be in both splits; "
            "give other documents"
        )
    if not kept["held_out"]:
        raise ConfigError(
            f"data.held_out={config.held_out} holds out {counts['held_out']} of {documents} "
            "documents, and each has the same text as an earlier training document; raise it, or "
            "give more documents, or hold out their ends with data.held_out_by='tail'"
        )
    raise ConfigError(
        f"data.held_out={config.held_out} leaves {counts['train']} of {documents} documents to "
        "train on, and each has the same text as a held-out document; lower it, or give more "
        "documents, or hold out their ends with data.held_out_by='tail'"
    )


def documents_of(surveys: list[dict]) -> dict[str, int]:
    """Number of documents in each split, including duplicates."""
    return {split: sum(survey["documents"][split] for survey in surveys) for split in SPLITS}


def skipped_of(surveys: list[dict]) -> Skipped:
    """The skipped documents of all shards."""
    skipped = Skipped()
    for survey in surveys:
        skipped.merge(Skipped.from_dict(survey["skipped"]))
    return skipped


def sample_to_try() -> Sample:
    """An empty sample for the texts on which a tokenizer is tested."""
    return Sample(_TRIED_CHARACTERS, _TRIED_OF_DOCUMENT)


def texts_to_try(surveys: list[dict]) -> list[str]:
    """The texts on which a tokenizer is tested."""
    sample = sample_to_try()
    for survey in surveys:
        for item in survey["tried"]:
            sample.push(*item)
    return sample.texts()
