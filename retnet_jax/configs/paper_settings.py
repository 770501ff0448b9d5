"""What the experiments of arXiv 2307.08621 share (its section 3.1 and Table 7)."""

from retnet_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def paper_model(*, n_layers: int, d_model: int) -> ModelConfig:
    """Heads of 256 (values 512), feed-forward layers of 2 d; 12 n d^2 parameters in the layers.

    The vocabulary is cl100k's 100,277 tokens, rounded up to a multiple of 512. Dropout, 0.1 in the
    paper, is left out: no token is seen twice in 100B.
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
    """The paper's optimiser on windows of 2048 tokens.

    The Transformer twin has heads of 128. The corpus is any that `data.path` names: JSON lines
    with a field "text", on which a byte-level BPE of the vocabulary's size is trained.
    """
    return Config(
        model=model.built_as(architecture, n_heads=2 * model.n_heads),
        data=DataConfig(
            source="jsonl",
            path="data/corpus/**/*.jsonl",
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
