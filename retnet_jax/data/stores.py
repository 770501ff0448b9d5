"""Opens the stores that a run is trained on, and builds a store that does not exist."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from retnet_jax.config import TOKENIZERS, DataConfig
from retnet_jax.data.build import DEFAULT_COMMAND, build_or_wait, is_to_be_built
from retnet_jax.data.store_options import (
    default_store,
    differences,
    pretrained_tokenizer,
    stored_options,
)
from retnet_jax.data.token_store import TokenStore, open_store
from retnet_jax.data.tokenizers import ByteTokenizer, Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files

__all__ = [
    "Stores",
    "check_tokenizer",
    "default_store",
    "open_or_build",
    "open_stores",
    "repetition_notes",
]

_MANY_TIMES = 20


class Stores(NamedTuple):
    """The stores that a run is trained on."""

    stores: dict[str, TokenStore]  # by the last part of their directories
    weights: np.ndarray  # share of each store in the windows
    tokenizer: Tokenizer  # the same for all of them


def open_stores(config: DataConfig, vocab_size: int, command: str = DEFAULT_COMMAND) -> Stores:
    """The stores of `config.mixture`, or else `config.store`, which is built if it does not exist.

    Args:
      config: The data options, checked.
      vocab_size: `model.vocab_size`, which must include all tokens.
      command: As in `open_or_build`.

    Raises:
      ConfigError: as `open_or_build`; if stores of a mixture do not exist, have the same name, or
        have different tokenizers.
    """
    if not config.mixture:
        store = open_or_build(config, vocab_size, command)
        return Stores({_name(config.store): store}, np.ones(1), store.tokenizer)
    stores: dict[str, TokenStore] = {}
    for directory in config.mixture:
        store = open_store(directory)
        if _name(directory) in stores:
            raise ConfigError(
                f"data.mixture has two stores with the name {_name(directory)!r}: rename one"
            )
        stores[_name(directory)] = store
    (first, *others) = stores.values()
    for store in others:
        if store.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(
                f"data.mixture: {store.directory} has another tokenizer than {first.directory}; "
                f"build it with data.tokenizer={first.directory!r}"
            )
    _check_vocabulary(first, vocab_size)
    return Stores(stores, np.array(list(config.mixture.values())), first.tokenizer)


def repetition_notes(stores: Stores, steps: int, tokens_of_step: int) -> list[str]:
    """A message for each store whose text a run reads more than 20 times.

    Args:
      stores: The stores of the run.
      steps: `train.steps`.
      tokens_of_step: Number of tokens in a batch.
    """
    shares = stores.weights / stores.weights.sum()
    notes = []
    for share, store in zip(shares, stores.stores.values(), strict=True):
        times = share * steps * tokens_of_step / store.train.token_count
        if times > _MANY_TIMES:
            notes.append(
                f"this run reads the {store.train.token_count:,} training tokens of "
                f"{store.directory} {times:,.0f} times; with --config.train.steps="
                f"{max(1, int(steps * _MANY_TIMES / times))} it would read them {_MANY_TIMES} times"
            )
    return notes


def open_or_build(
    config: DataConfig, vocab_size: int, command: str = DEFAULT_COMMAND
) -> TokenStore:
    """The store in `config.store`, which is built if the directory does not exist.

    If another process is building it, this one waits until it is complete.

    Args:
      config: The data options, checked.
      vocab_size: `model.vocab_size`. A BPE is trained to this size; other tokenizers must not have
        more tokens.
      command: Command that builds or finishes the store, for error messages and the manifest.

    Raises:
      ConfigError: if the store is unfinished or was built with other options, and as `build_store`
        and `open_store`.
    """
    check_tokenizer(config, vocab_size)
    if is_to_be_built(config, vocab_size):
        store = build_or_wait(config, vocab_size, command=command)
    else:
        store = open_store(config.store)
    built, asked = store.manifest["options"], stored_options(config, vocab_size)
    if asked["data.tokenizer"] is None:  # its directory is gone, but the store has the tokenizer
        if built.get("data.tokenizer") in TOKENIZERS:  # or data.tokenizer is a typing error
            pretrained_tokenizer(config)
        asked["data.tokenizer"] = built.get("data.tokenizer")
    held_out_by = store.manifest.get("held_out_by", "document")
    if asked["data.held_out_by"] in _ways_of(held_out_by):
        asked["data.held_out_by"] = built.get("data.held_out_by", "auto")
    changes = differences(built, asked)
    if changes:
        raise ConfigError(
            f"data.store={config.store!r} was built with other options:{changes}\n"
            "give another directory in data.store, or delete this one and build it again with: "
            f"{command}"
        )
    _check_vocabulary(store, vocab_size)
    return store


def _ways_of(held_out_by: str) -> tuple[str, ...]:
    """The values of `data.held_out_by` with which a store holds out whole documents, or tails.

    If whole documents can be held out, "auto" does so. But a store of tails may have been built
    with "tail" from documents of which "auto" would hold out whole ones.
    """
    return ("document", "auto") if held_out_by == "document" else ("tail",)


def check_tokenizer(config: DataConfig, vocab_size: int) -> None:
    """Checks the tokenizer of a store before the store is built.

    Args:
      config: The data options, checked.
      vocab_size: `model.vocab_size`.

    Raises:
      ConfigError: if there is no tokenizer, or documents can have ids that the model does not have.
    """
    if files.exists(files.expanded(f"{config.store}/manifest.json")) or config.tokenizer == "bpe":
        return
    tokenizer = ByteTokenizer() if config.tokenizer == "byte" else pretrained_tokenizer(config)
    tokenizer.check_fits(f"data.tokenizer={config.tokenizer!r}", vocab_size)


def _check_vocabulary(store: TokenStore, vocab_size: int) -> None:
    store.tokenizer.check_fits(f"the tokenizer in {store.directory}", vocab_size)


def _name(directory: str) -> str:
    return directory.rstrip("/").rpartition("/")[2]
