"""What the survey of a corpus found, and whether a store can be built of it.

A survey is what `build.py` finds in the documents of a shard before they are encoded: how many
there are of each split, what was skipped, their first two different names, and samples of text.
"""

from __future__ import annotations

from retnet_jax.config import DataConfig
from retnet_jax.data.bpe_sample import Sample
from retnet_jax.data.sources import Skipped
from retnet_jax.data.token_store import SPLITS
from retnet_jax.errors import ConfigError

_TRIED_CHARACTERS = 400_000
_TRIED_OF_DOCUMENT = 4_000  # so that there are a hundred


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
            f"all {documents} documents have one name, {names.pop()!r}, and which are held out "
            f"depends on their names; set data.id_field={config.id_field!r} to a field that "
            "differs, or to one that no record has: then they are numbered"
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
    """Raises `ConfigError` for a corpus that has no documents in one split without duplicates.

    Args:
      config: the data options.
      surveys: of all shards.
      kept: documents of each split, without duplicates.
      texts: different ones in both.
    """
    counts = documents_of(surveys)
    documents = sum(counts.values())
    if texts == 1:
        raise ConfigError(
            f"all {documents} documents have the same text, and one text cannot be in both splits; "
            "give others"
        )
    if not kept["held_out"]:
        raise ConfigError(
            f"data.held_out={config.held_out} holds out {counts['held_out']} of {documents} "
            "documents, and each has the text of one before it that is trained on; raise it, or "
            "give more documents"
        )
    if not kept["train"]:
        raise ConfigError(
            f"data.held_out={config.held_out} leaves {counts['train']} of {documents} documents to "
            "train on, and each has the text of one that is held out; lower it, or give more "
            "documents"
        )


def documents_of(surveys: list[dict]) -> dict[str, int]:
    """Documents of each split, duplicates included."""
    return {split: sum(survey["documents"][split] for survey in surveys) for split in SPLITS}


def skipped_of(surveys: list[dict]) -> Skipped:
    """What was skipped in all shards."""
    skipped = Skipped()
    for survey in surveys:
        skipped.merge(Skipped.from_dict(survey["skipped"]))
    return skipped


def sample_to_try() -> Sample:
    """An empty sample for the texts that a tokenizer is tried on."""
    return Sample(_TRIED_CHARACTERS, _TRIED_OF_DOCUMENT)


def texts_to_try(surveys: list[dict]) -> list[str]:
    """The texts that a tokenizer is tried on."""
    sample = sample_to_try()
    for survey in surveys:
        for item in survey["tried"]:
            sample.push(*item)
    return sample.texts()
