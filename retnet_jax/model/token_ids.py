"""Checks of token ids where their values are at hand, before a model reads them."""

from typing import Any

import numpy as np

from retnet_jax.errors import ConfigError


def checked_ids(ids: Any, vocab_size: int | None, name: str) -> np.ndarray:
    """Token ids [n], a list or an array, as int32.

    A model itself does not wait for the device to look at its input: it reads an id that is out of
    range as the nearest that it knows.

    Args:
      ids: integers.
      vocab_size: ids are less; None: any that are not negative will do.
      name: of the ids, for messages.

    Raises:
      ConfigError: for anything else, with the name and the value.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of several lengths
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise ConfigError(
            f"{name} is {str(ids)[:40]!r}, no list of token ids such as [256, 72, 101]"
        )
    if not array.size:
        return array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} has {array[0]!r} ({array.dtype}); token ids are integers")
    most = 2**31 if vocab_size is None else vocab_size
    for token in (int(array.min()), int(array.max())):
        if not 0 <= token < most:
            known = f"the model knows ids from 0 to {most - 1}; is the tokenizer another model's?"
            raise ConfigError(f"{name} has the token id {token}, but {known}")
    return array.astype(np.int32)
