"""The options that determine the contents of a store, which the store records."""

from __future__ import annotations

import glob
import json
import os
import platform
import re
from typing import Any

from retnet_jax.config import TOKENIZERS, DataConfig
from retnet_jax.config.as_json import OLD_NAMES, marked
from retnet_jax.data.tokenizers import TOKENIZER_FILES, Tokenizer, has_tokenizer, load_tokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import paths as files
from retnet_jax.files.digests import sha256_of
from retnet_jax.files.hub import tokenizer_directory


def stored_options(config: DataConfig, vocab_size: int) -> dict[str, Any]:
    """Everything that determines the contents of a store, by the names of the options."""
    values = _options_of(config)
    values["data.tokenizer"] = _tokenizer_option(config)
    if config.tokenizer == "bpe":
        values["model.vocab_size"] = vocab_size
    if config.source == "stdlib":
        values["python"] = platform.python_version()
    return values


def _options_of(config: DataConfig) -> dict[str, Any]:
    values = {name: getattr(config, name.removeprefix("data.")) for name in marked("in_store")}
    # Through JSON, for comparison with recorded options.
    return json.loads(json.dumps(values))


def differences(built: dict[str, Any], asked: dict[str, Any]) -> str:
    """Lines that name the options that differ; "" if none does.

    Args:
      built: Options that a store records. An option that did not exist when it was built has its
        default.
      asked: Options from `stored_options`.
    """
    renamed = {OLD_NAMES.get(name, name): value for name, value in built.items()}
    built = _options_of(DataConfig()) | renamed
    return "".join(
        f"\n  {name}: {built.get(name)!r} in the store, {asked.get(name)!r} asked for"
        for name in sorted(built | asked)
        if built.get(name) != asked.get(name)
    )


def default_store(config: DataConfig, vocab_size: int) -> str:
    """A directory for the store of a corpus, such as "data/shakespeare_bpe1024".

    It depends only on the options that determine the store's contents: equal ones have the same
    directory, different ones different directories. The name is that of the corpus and of the
    tokenizer. It ends with a short hash of the options, unless the corpus is a text file in the
    working directory, or the standard library, and no other option is set.

    Args:
      config: The data options.
      vocab_size: `model.vocab_size`.
    """
    defaults = _options_of(DataConfig())
    # Only what differs from the defaults, so that a new option does not change the directory.
    given = {name: x for name, x in _options_of(config).items() if x != defaults[name]}
    name = _plain(_name_of_corpus(config))
    tokenizer = _plain(os.path.basename(os.path.normpath(config.tokenizer)))
    tokenizer += str(vocab_size) if config.tokenizer == "bpe" else ""
    is_simple = config.tokenizer in TOKENIZERS and (
        given.keys() - {"data.source", "data.path", "data.tokenizer"} == set()
    )
    if is_simple and (config.source, config.path) in (("text", f"{name}.txt"), ("stdlib", "")):
        return f"data/{name}_{tokenizer}"
    contents = json.dumps([given, tokenizer]).encode()
    return f"data/{name}_{tokenizer}_{sha256_of(contents)[:8]}"


def _name_of_corpus(config: DataConfig) -> str:
    """The last part of `data.path` without wildcards; a file without its endings."""
    parts = [x for x in config.path.split("/") if x and not glob.has_magic(x) and x not in _HERE]
    if not parts:
        return config.source
    is_file = config.source in ("text", "jsonl", "parquet") and config.path.endswith(parts[-1])
    return parts[-1].partition(".")[0] if is_file else parts[-1]


_HERE = (".", "..", "~")


def _plain(name: str) -> str:
    """A part of a directory's name, from any text."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:60].strip(".") or "corpus"


def pretrained_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer in the directory, or on the Hugging Face hub, that `config.tokenizer` names.

    Raises:
      ConfigError: if there is none, or it is damaged.
      CheckpointError: if the hub cannot be reached.
    """
    directory = tokenizer_directory(config.tokenizer)
    if not has_tokenizer(directory):
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r} is not one of "
            f"{', '.join(map(repr, TOKENIZERS))}, and not a directory with one of "
            f"{', '.join(TOKENIZER_FILES)}"
        )
    try:
        return load_tokenizer(directory)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer={config.tokenizer!r}: {error}") from error


def _tokenizer_option(config: DataConfig) -> str | None:
    """The tokenizer as recorded, a pretrained one by its contents; None if it cannot be found."""
    if config.tokenizer in TOKENIZERS:
        return config.tokenizer
    try:
        if not files.exists(tokenizer_directory(config.tokenizer)):
            return None
    except CheckpointError:  # the hub cannot be reached
        return None
    return f"pretrained {pretrained_tokenizer(config).fingerprint[:16]}"
