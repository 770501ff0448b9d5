"""What the configs of the paper need before they can run, for a user who has no corpus yet."""

import contextlib
import os
from functools import partial

import jax

from retnet_jax.config import Config
from retnet_jax.configs.paper_settings import CORPUS
from retnet_jax.data.corpus_files import corpus_files
from retnet_jax.data.token_store import token_dtype
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.files import paths as files
from retnet_jax.programs import command_line
from retnet_jax.training.memory import device_memory, gigabytes, least_bytes
from retnet_jax.training.step import initial_state


def check_corpus(config: Config, paper_command: str | None = None) -> None:
    """Checks that the corpus of the paper's configs exists, unless its store does.

    The path of another corpus is checked when its files are read.

    Args:
      config: The config, checked.
      paper_command: Command that downloads the paper's corpus; None: that of this program's config.

    Raises:
      ConfigError: if there is neither, with what a run takes and a command that gets a corpus.
    """
    data = config.data
    of_paper = data.path == CORPUS and data.source in ("text", "jsonl", "parquet")
    if not of_paper or data.mixture or files.exists(files.expanded(data.store)):
        return
    with contextlib.suppress(ConfigError):
        corpus_files(data.path)
        return
    if paper_command is None:
        paper_command = command_line.command_with_config(
            "tools/prepare_corpus.py", "retnet-prepare-corpus", ["paper"]
        )
    step = config.train.batch_size * data.sequence_length
    tokens = config.train.steps * step
    width = _bytes_of_token(config)
    raise ConfigError(
        f"no corpus: data.path={data.path!r} matches no file (from {os.getcwd()}), and there is no "
        f"store in data.store={data.store!r}; give JSON lines with a field {data.text_field!r}\n"
        f"  the run reads {tokens:,} tokens ({config.train.steps:,} steps of {step:,}); a store of "
        f"this size takes {gigabytes(width * tokens)} of disk, {width} bytes a token\n"
        f"  {_size_of_model(config)}\n"
        "  the paper's corpus, without the parts of The Pile that are no longer public, is "
        f"downloaded by this command (then train with the same options): {paper_command}"
    )


def _bytes_of_token(config: Config) -> int:
    is_byte = config.data.tokenizer == "byte"
    return token_dtype(ByteTokenizer.vocab_size if is_byte else config.model.vocab_size).itemsize


def _size_of_model(config: Config) -> str:
    needed = least_bytes(jax.eval_shape(partial(initial_state, config)))
    device = jax.local_devices()[0]
    available = device_memory(device)
    here = ""
    if available is not None:
        here = f"; here: {jax.device_count()} {device.device_kind} of {gigabytes(available)}"
    return (
        f"{config.model.parameter_count():,} parameters, their gradients and optimiser state take "
        f"{gigabytes(needed)} of device memory, and activations come on top{here}"
    )
