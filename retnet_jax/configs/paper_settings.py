"""Settings that the experiments of arXiv 2307.08621 share (its section 3.1 and Table 7)."""

from retnet_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

# Written by `python tools/prepare_corpus.py paper`, or brought by the user.
CORPUS = "data/corpus/**/*.jsonl*"


def paper_model(*, n_layers: int, d_model: int) -> ModelConfig:
    """A RetNet with heads of width 256 (values 512) and feed-forward layers of width 2 d.

    Its layers have 12 n d^2 parameters. The vocabulary is that of cl100k, 100,277 tokens, rounded
    up to a multiple of 512. The paper's dropout of 0.1 is left out, because no token of the 100B is
    seen twice.
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
    """
    return Config(
        model=model.built_as(architecture, n_heads=2 * model.n_heads),
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
