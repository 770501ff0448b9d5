"""A small RetNet on the source code of Python's standard library: `make quickstart`.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
python train.py --config=configs/quickstart.py:transformer --workdir=runs/quickstart_transformer
"""

import copy
import dataclasses
from collections.abc import Set

from retnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

# Generated files of the standard library: tables of encodings and names, topics of the manual.
GENERATED = (
    r"^(encodings/(aliases|cp(?!932|949|950)|hp_roman8|iso8859|koi8|kz1048|mac_|palmos|ptcp154"
    r"|tis_620)|html/entities|locale\.py|pydoc_data/|_sysconfigdata)"
)


def get_config(architecture: str = "retnet") -> Config:
    """The RetNet, or with "transformer" its twin with about as many parameters.

    Both recipes are the best runs of a search (`experiments/recipe.py`, 41 runs of each model). The
    paper's RetNet has no short convolutions, no relu of queries and keys, an epsilon of 1e-6 in the
    heads' norm, a rotation, and keys of a quarter of the width. The usual Transformer has no short
    convolutions, no norm of queries and keys, output projections that do not begin at 0, and heads
    that together are as wide as the model. A step has 2,048 tokens for both.
    """
    model = ModelConfig(
        vocab_size=4096,
        d_model=128,
        n_layers=2,
        n_heads=4,
        decay_range=(1 / 2, 1 / 512),
        key_dim=512,
        short_conv=4,
        feature_map="relu",
        rotation="none",
        head_norm_epsilon=1e-4,
        tie_embeddings=True,
    )
    length, rows, learning_rate = 128, 16, 0.04
    if architecture != "retnet":
        twin = dataclasses.replace(model, short_conv=None).built_as(architecture, n_heads=2)
        model = dataclasses.replace(
            twin,
            key_dim=256,
            value_dim=256,
            ffn_dim=640,  # for the RetNet's number of parameters
            short_conv=4,
            qk_norm=True,
            init="zero_outputs",
            rotation="rope",
        )
        length, rows, learning_rate = 512, 4, 0.02
    return Config(
        model=model,
        data=DataConfig(
            store="data/python_bpe4096",
            held_out=0.12,
            apart=GENERATED,
            sequence_length=length,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=learning_rate,
            muon_learning_rate=0.04,
            beta2=0.95,
            weight_decay=0.0,
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=20,
            decay_share=0.5,
        ),
        train=TrainConfig(
            steps=1500,
            batch_size=rows,
            log_every=25,
            eval_every=500,
            checkpoint_every=500,
        ),
    )


def fitted(config: Config, given_options: Set[str], bytes_of_text: int | None) -> Config:
    """The quickstart's config for another text.

    Only options that the user has not given are changed. `data.held_out` and `data.apart`, which
    are for the standard library, get their defaults. By the size of the text:

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
      bytes_of_text: Size of the text, such as `sources.approximate_bytes`; None: it is not known,
        and nothing is fitted to it.

    Returns:
      A new config.
    """
    config = copy.deepcopy(config)
    for name in ("held_out", "apart"):
        if f"data.{name}" not in given_options:
            setattr(config.data, name, getattr(DataConfig, name))
    if bytes_of_text is None:
        return config
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
