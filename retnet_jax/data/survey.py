"""The surveys of a corpus, and whether a store can be built from it.

A survey is made by `build.py` for each shard before its documents are encoded. It has the number
of documents in each split, the skipped documents, two different names, and samples of text.
"""

from __future__ import annotations

from retnet_jax.config import DataConfig
from retnet_jax.data.bpe_sample import Sample
from retnet_jax.data.sources import Skipped
from retnet_jax.data.token_store import SPLITS
from retnet_jax.errors import ConfigError

_TRIED_CHARACTERS = 400_000
_TRIED_OF_DOCUMENT = 4_000  # so that the sample has at least a hundred documents


def check_splits(config: DataConfig, surveys: list[dict]) -> None:
    """Raises `ConfigError` for a corpus without documents in one of the splits."""
    counts = documents_of(surveys)
    documents = sum(counts.values())
    if not documents:
        skipped = skipped_of(surveys)
        raise ConfigError(
            f"data.source={config.source!r} with data.path={config.path!r} gives no documents; "
            f"{skipped.count} skipped{f': {skipped}' if skipped.count else ''}"
        )
    names = {name for survey in surveys for name in survey["names"]}
    if not all(counts.values()) and len(names) == 1 and documents > 1:
        raise ConfigError(
            f"all {documents} documents have one name, {names.pop()!r}, but names decide which "
            f"documents are held out; set data.id_field={config.id_field!r} to a field that "
            "differs, or to a field that no record has: then documents are named by their number"
        )
    if not counts["held_out"]:
        raise ConfigError(
            f"data.held_out={config.held_out} holds out none of {documents} documents; raise it, "
            "or give more documents"
        )
    if not counts["train"]:
        raise ConfigError(
            f"data.held_out={config.held_out} leaves none of {documents} documents to train on; "
            "lower it, or give more documents"
        )


def check_kept(config: DataConfig, surveys: list[dict], kept: dict[str, int], texts: int) -> None:
    """Raises `ConfigError` if a split has no documents after duplicates are removed.

    Args:
      config: The data options.
      surveys: Surveys of all shards.
      kept: Number of documents in each split without duplicates.
      texts: Number of different texts in both splits.
    """
    counts = documents_of(surveys)
    documents = sum(counts.values())
    if texts == 1:
        raise ConfigError(
            f"all {documents} documents have the same text, and one text cannot be in both splits; "
            "give other documents"
        )
    if not kept["held_out"]:
        raise ConfigError(
            f"data.held_out={config.held_out} holds out {counts['held_out']} of {documents} "
            "documents, and each has the same text as an earlier training document; raise it, or "
            "give more documents"
        )
    if not kept["train"]:
        raise ConfigError(
            f"data.held_out={config.held_out} leaves {counts['train']} of {documents} documents to "
            "train on, and each has the same text as a held-out document; lower it, or give more "
            "documents"
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
