"""Checks of the values of token ids, before they go to a device."""

from typing import Any

import numpy as np

from retnet_jax.errors import ConfigError


def checked_ids(ids: Any, vocab_size: int | None, name: str) -> np.ndarray:
    """Token ids [n], a list or an array, as int32.

    A model itself cannot check the values of its input without waiting for the device. It treats an
    id out of range as the nearest valid id.

    Args:
      ids: Integers.
      vocab_size: Upper bound of the ids, exclusive; None: 2^31.
      name: Name of the ids, for messages.

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
