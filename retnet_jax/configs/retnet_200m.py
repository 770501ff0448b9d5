"""The paper's 200M RetNet (arXiv 2307.08621, 3.3): 16 layers, d 1024, 4 heads.

    python train.py --config=configs/retnet_200m.py --workdir=runs/retnet_200m
    python train.py --config=configs/retnet_200m.py:transformer --workdir=runs/transformer_200m
    python train.py --config=configs/retnet_200m.py:paper --workdir=runs/paper_200m

5B tokens as in its Tables 5 and 6; the learning rate and 0.5M tokens in each step are our choice.
The corpus is JSON lines in data/corpus/, or --config.data.path; one like the paper's is downloaded
there by

    python tools/prepare_corpus.py paper --config=retnet_200m

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
        paper_model(n_layers=16, d_model=1024),
        architecture,
        learning_rate=6e-4,
        train=TrainConfig(steps=10_000, batch_size=256, micro_batches=4),
    )
