"""The paper's 2.7B RetNet (arXiv 2307.08621, Table 2): 32 layers, d 2560, 10 heads.

    python train.py --config=configs/retnet_2p7b.py --workdir=runs/retnet_2p7b
    python train.py --config=configs/retnet_2p7b.py:transformer --workdir=runs/transformer_2p7b
    python train.py --config=configs/retnet_2p7b.py:paper --workdir=runs/paper_2p7b

100B tokens, 4M in each step. The corpus is JSON lines in data/corpus/, or --config.data.path; one
like the paper's is downloaded there by

    python tools/prepare_corpus.py paper --config=retnet_2p7b

Not run yet.
"""

from retnet_jax.config import Config, TrainConfig
from retnet_jax.configs.paper_settings import paper_config, paper_model


def get_config(architecture: str = "retnet") -> Config:
    """The RetNet; with "transformer" its twin with the same number of parameters.

    With "paper" or "paper_transformer": the same two with the paper's recipe, whose settings and
    their sources `paper_settings.with_paper_recipe` lists.
    """
    return paper_config(
        paper_model(n_layers=32, d_model=2560),
        architecture,
        learning_rate=3e-4,
        train=TrainConfig(steps=25_000, batch_size=2048, micro_batches=16),
    )
