"""Checks of the arguments of generation, and of the model's probabilities."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.model import LanguageModel
from retnet_jax.model.parameters import why_not_finite
from retnet_jax.model.token_ids import checked_ids


def check_lengths(
    model: LanguageModel,
    max_tokens: int,
    vocab_size: int | None,
    least: int = 1,
    name: str = "max_tokens",
) -> int:
    """Checks `max_tokens`, or another number by its name, and `vocab_size`; returns the number."""
    max_tokens = _whole(name, max_tokens)
    if max_tokens < least:
        raise ConfigError(f"{name}={max_tokens} is less than {least}")
    if vocab_size is not None and not 1 <= vocab_size <= model.config.vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size} does not fit a model with {model.config.vocab_size} token "
            "ids; does the tokenizer belong to another model?"
        )
    return max_tokens


def check_seed(seed: int) -> int:
    """`seed` as an int; of a longer one jax would take the lower 32 bits."""
    seed = _whole("seed", seed)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} is not between 0 and {2**32 - 1}")
    return seed


def check_ends(
    model: LanguageModel, end_id: int | Sequence[int] | None, vocab_size: int | None
) -> tuple[int, ...]:
    """Checks `end_id`, and returns all ids that end a row."""
    if end_id is None:
        return ()
    several = isinstance(end_id, Sequence | np.ndarray)
    ends = tuple(_whole("end_id", x) for x in (end_id if several else [end_id]))
    most = model.config.vocab_size if vocab_size is None else vocab_size
    for end in ends:
        if not 0 <= end < most:
            raise ConfigError(
                f"end_id={end} can never be generated: ids are 0 to {most - 1}; use None if no id "
                "ends a row"
            )
    return ends


def check_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray], vocab_size: int, may_be_empty: bool = False
) -> list[np.ndarray]:
    """Checks prompts, and returns the token ids of each."""
    if not len(prompts):
        raise ConfigError("there are no prompts; give at least one")
    checked = []
    for number, prompt in enumerate(prompts):
        ids = checked_ids(prompt, vocab_size, f"prompts[{number}]")
        if not len(ids) and not may_be_empty:
            raise ConfigError(
                f"prompts[{number}] is empty; begin it with a token such as the tokenizer's bos_id"
            )
        checked.append(ids)
    return checked


def check_finite(model: LanguageModel, log_probabilities: Sequence[Any]) -> None:
    """Raises `CheckpointError` unless the log-probabilities of each row's tokens are finite."""
    wrong = [row for row, each in enumerate(log_probabilities) if not np.isfinite(each).all()]
    if wrong:
        raise CheckpointError(
            f"the model's probabilities are not finite for {len(wrong)} of "
            f"{len(log_probabilities)} prompts (first: prompt {wrong[0]}): {why_not_finite(model)}"
        )


def _whole(name: str, value: int) -> int:
    """An integer of Python or numpy as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}={value!r} is not an integer") from None
