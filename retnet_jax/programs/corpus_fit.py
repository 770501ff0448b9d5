"""What follows for a config from a corpus that the command line names."""

import copy
import sys
from collections.abc import Set

from retnet_jax.config import Config
from retnet_jax.config.as_json import config_differences, marked
from retnet_jax.configs import quickstart
from retnet_jax.data.sources import approximate_bytes
from retnet_jax.data.store_options import default_store


def fitted_to_corpus(config: Config, name: str, given: Set[str]) -> Config:
    """The config with a store of its own, and the quickstart with sizes that fit another corpus.

    What the command line sets is not changed. The changes are printed to stderr.

    Args:
      config: Config with the options of the command line.
      name: Value of --config, such as "quickstart:transformer".
      given: Names of the options that the command line sets.

    Raises:
      ConfigError: if `data.path` matches no file.
    """
    found = config
    file = name.partition(":")[0]
    is_quickstart = file == "quickstart" or file.endswith("configs/quickstart.py")
    if is_quickstart and given & {"data.source", "data.path"}:
        found = quickstart.fitted(config, given, approximate_bytes(config.data))
    if given & set(marked("in_store")) and not given & {"data.store", "data.mixture"}:
        if found is config:
            found = copy.deepcopy(config)
        found.data.store = default_store(found.data, found.model.vocab_size)
    changes = config_differences(config, found)
    if changes:
        shown = ", ".join(f"{option}={new}" for option, (_, new) in changes.items())
        print(f"for this corpus: {shown}", file=sys.stderr)
    return found
