"""Settings that the experiments of arXiv 2307.08621 share (its section 3.1 and Table 7).

The argument after the name of a config, such as --config=configs/retnet_1p3b.py:paper, is one of
`ARCHITECTURES`. "paper" and "paper_transformer" have the paper's recipe (`with_paper_recipe`).
"retnet" and "transformer" leave out what a corpus that is read once does not need, and have what
was tested best (`with_tested_settings`).
"""

import dataclasses

from retnet_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from retnet_jax.config.fields import check_choice

ARCHITECTURES = ("retnet", "transformer", "paper", "paper_transformer")
# Written by `python tools/prepare_corpus.py paper`, or brought by the user.
CORPUS = "data/corpus/**/*.jsonl*"


def paper_model(*, n_layers: int, d_model: int) -> ModelConfig:
    """A RetNet with heads of width 256 (values 512) and feed-forward layers of width 2 d.

    Its layers have 12 n d^2 parameters. The vocabulary is that of cl100k, 100,277 tokens, rounded
    up to a multiple of 512. The paper's dropout of 0.1 is left out, because no token of the 100B is
    seen twice; `with_paper_recipe` has it.
    """
    return ModelConfig(
        vocab_size=100_352,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // 256,
        dtype="bfloat16",
        remat="full",
    )


def paper_config(
    model: ModelConfig, architecture: str, *, learning_rate: float, train: TrainConfig
) -> Config:
    """The paper's optimiser, and windows of 2048 tokens.

    The Transformer twin has heads of width 128. The corpus in `data.path` is JSON lines with a
    field "text"; a byte-level BPE of the model's vocabulary size is trained on it.

    Args:
      model: The RetNet.
      architecture: One of `ARCHITECTURES`.
      learning_rate: Peak learning rate.
      train: Length of the run and its batches.

    Raises:
      ConfigError: for another architecture.
    """
    check_choice("the argument after --config=FILE:", architecture, ARCHITECTURES)
    as_paper = architecture.startswith("paper")
    mixer = "transformer" if architecture.endswith("transformer") else "retnet"
    config = Config(
        model=model.built_as(mixer, n_heads=2 * model.n_heads),
        data=DataConfig(
            source="jsonl",
            path=CORPUS,
            store="data/corpus_bpe100k",
            held_out=0.001,
            sequence_length=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            beta1=0.9,
            beta2=0.98,
            weight_decay=0.05,
            clip_norm=2.0,
            schedule="linear",
            warmup_steps=375,
        ),
        train=train,
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    return with_paper_recipe(config) if as_paper else with_tested_settings(config)


def with_tested_settings(config: Config) -> Config:
    """A config with what did best in the search of the quickstart's recipe (docs/results.md).

    The RetNet has an epsilon in the norm of the heads that keeps gradients small at the beginning
    of documents, and the Transformer a norm of queries and keys and output projections that begin
    at 0, which made no difference beside it. Tested with a million parameters, and not at the
    paper's sizes.
    """
    if config.model.mixer == "retention":
        model = dataclasses.replace(config.model, head_norm_epsilon=0.01)
    else:
        model = dataclasses.replace(config.model, qk_norm=True, init="zero_outputs")
    return dataclasses.replace(config, model=model)


def with_paper_recipe(config: Config) -> Config:
    """A config with everything that arXiv 2307.08621 says of its training.

    | setting | value | source |
    |---|---|---|
    | `model.dropout` | 0.1 | Table 7 |
    | `model.init` | "deepnet" | 3.1: as DeepNet (arXiv 2203.00555) |
    | `model.decay` | "log_spaced", 1/32 to 1/512, all sizes | 3.1 |
    | AdamW's betas | 0.9, 0.98 | 3.1 and Table 7 |
    | learning rate | linear warm-up of 375 steps, then linear decay | 3.1; Table 7: polynomial |
    | `optimizer.weight_decay` | 0.05 | 3.1; Table 7 says 0.01 |
    | `optimizer.clip_norm` | 2.0 | Table 7 |
    | sequence length, tokens of a step | 2048, 4M | 3.1 and Table 7 |
    | `<bos>` | in front of every sequence | 3.1; here it opens every document |
    | layers | LayerNorm before mixer and feed-forward layer, gelu(x W1) W2 | 2.3 |

    The betas, the schedule, weight decay, clipping, lengths and layers are those of `paper_config`
    too. What is added here is dropout and the initialisation, and that no step is skipped for its
    loss or its gradient norm, which the paper does not mention.

    Choices where the paper is not explicit: DeepNet's initialisation comes without its scale of the
    residual (`model.deepnorm`), which is for blocks with norms after the sums, and the paper's have
    norms before. Of the two weight decays the one of the running text is taken. Not known: biases,
    epsilon of the norms (torchscale's of that time had 1e-5) and of Adam, whether embedding and
    head are tied, the positions of the paper's Transformer, and where the dropout was: here after
    the embedding and in what each mixer and each feed-forward layer adds. The rest are this
    project's defaults.
    """
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init="deepnet", dropout=0.1),
        train=dataclasses.replace(config.train, spike_deviations=0.0),
    )
