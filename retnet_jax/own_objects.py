"""The user's own objects, which options name as "module:object" (docs/extend.md)."""

import importlib
import re
from typing import Any

from retnet_jax.errors import ConfigError


def is_own(name: str) -> bool:
    """Whether the value of an option has the form "module:object"."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def own_object(option: str, name: str) -> Any:
    """Imports the module of "module:object", which runs its code, and returns the object.

    Args:
      option: Option that names the object, such as "model.mixer", for error messages.
      name: Value of the option.

    Raises:
      ConfigError: if there is no such module or object, or the module is `__main__`.
    """
    module, _, attributes = name.partition(":")
    if module == "__main__":
        raise ConfigError(
            f"{option}={name!r}: other programs must be able to import what a run records; put it "
            "in a module of its own"
        )
    try:
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{option}={name!r} is not found: {error}; it names code outside of retnet_jax: put "
            "its directory on PYTHONPATH"
        ) from error
    return found
