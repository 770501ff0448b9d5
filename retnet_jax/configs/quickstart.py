"""A small RetNet on the source code of Python's standard library: `make quickstart`.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
python train.py --config=configs/quickstart.py:transformer --workdir=runs/quickstart_transformer
"""

from retnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


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
