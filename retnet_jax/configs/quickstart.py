"""A small RetNet on the source code of Python's standard library: `make quickstart`.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
python train.py --config=configs/quickstart.py:transformer --workdir=runs/quickstart_transformer
"""

import copy
from collections.abc import Set

from retnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

# Generated files of the standard library: tables of encodings and names, topics of the manual.
GENERATED = (
    r"^(encodings/(aliases|cp(?!932|949|950)|hp_roman8|iso8859|koi8|kz1048|mac_|palmos|ptcp154"
    r"|tis_620)|html/entities|locale\.py|pydoc_data/|_sysconfigdata)"
)


def get_config(architecture: str = "retnet") -> Config:
    """The RetNet, or with "transformer" its twin with the same number of parameters."""
    model = ModelConfig(
        vocab_size=4096,
        d_model=128,
        n_layers=2,
        n_heads=4,
        decay_range=(1 / 2, 1 / 512),
        tie_embeddings=True,
    )
    return Config(
        model=model.built_as(architecture),
        data=DataConfig(store="data/stdlib_bpe4096", sequence_length=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            muon_learning_rate=0.04,
            beta2=0.95,
            weight_decay=0.0,
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=20,
            decay_share=0.5,
        ),
        train=TrainConfig(
            steps=1900,
            batch_size=8,
            log_every=25,
            eval_every=500,
            checkpoint_every=500,
        ),
    )


def fitted(config: Config, given_options: Set[str], bytes_of_text: int) -> Config:
    """The quickstart's config for a text of another size.

    Only options that the user has not given are changed:

    | bytes of text | `data.tokenizer` | `model.vocab_size` |
    |---|---|---|
    | less than 200,000 | byte | 257 |
    | less than 2,000,000 | bpe | 1024 |
    | more | bpe | 4096 |

    With a given tokenizer, "byte" has 257 tokens, "bpe" 512 for less than 200,000 bytes, and the
    vocabulary is not changed for the tokenizer of another model. With a given vocabulary the
    tokenizer is not changed. `train.steps` is lowered if the text would be read more than about ten
    times, but not below 200 or ten times the warm-up; a token of a BPE is counted as two bytes.

    Args:
      config: Config from `get_config`, with the user's options.
      given_options: Names of the options that the user has given, such as "train.steps".
      bytes_of_text: Size of the text, such as `sources.approximate_bytes`.

    Returns:
      A new config.
    """
    config = copy.deepcopy(config)
    if not config.init_from:  # which determines the tokenizer
        _fit_vocabulary(config, given_options, bytes_of_text)
    if "train.steps" not in given_options:
        tokens = bytes_of_text // (1 if config.data.tokenizer == "byte" else 2)
        step = config.train.batch_size * config.data.sequence_length
        least = max(200, 10 * config.optimizer.warmup_steps)
        config.train.steps = min(config.train.steps, max(least, 10 * tokens // step))
    return config


def _fit_vocabulary(config: Config, given_options: Set[str], bytes_of_text: int) -> None:
    if "model.vocab_size" in given_options:
        return
    is_small = bytes_of_text < 200_000
    if "data.tokenizer" not in given_options and is_small:
        config.data.tokenizer = "byte"
    if config.data.tokenizer == "byte":
        config.model.vocab_size = 257
    elif config.data.tokenizer == "bpe":
        config.model.vocab_size = 512 if is_small else 1024 if bytes_of_text < 2_000_000 else 4096
