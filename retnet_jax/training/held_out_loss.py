"""The loss on the held-out documents of each store: the evaluator that every run has."""

import math
import operator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from retnet_jax.config import Config
from retnet_jax.data import Batch, Stores, number_of_windows
from retnet_jax.data.batches import PlacedBatches
from retnet_jax.model import LanguageModel
from retnet_jax.training.step import Sums, loss_sum


class HeldOutLoss:
    """The mean loss over the first held-out windows of each store.

    Every window begins with the empty state and counts once, so a store with fewer windows than
    `train.eval_batches` batches has the same loss for every batch size. A batch is run in
    `train.micro_batches` parts, like that of a training step, and takes less memory. Each store of
    a mixture has its own loss; the loss over all is their mean, weighted by the mixture's shares.

    Args:
      config: Config of the run. At most `train.eval_batches` batches of each store are read.
      mesh: The devices.
      stores: The stores that the run is trained on.
    """

    def __init__(self, config: Config, mesh: Mesh, stores: Stores):
        self._config = config.train
        self._splits = {name: store.held_out for name, store in stores.stores.items()}
        self._shares = stores.weights / stores.weights.sum()
        self._length = config.data.sequence_length
        self._rows = config.train.batch_size // config.train.micro_batches
        self._batches = {
            name: PlacedBatches(
                mesh,
                [split],
                [1.0],
                sequence_length=self._length,
                batch_size=self._rows,
                bos_id=stores.tokenizer.bos_id,
                seed=config.train.seed,
                loss_weights=config.data.loss_weights,
            )
            for name, split in self._splits.items()
        }

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """The mean loss in nats per token; loss, perplexity and bits per byte of each store."""
        losses = {name: self._loss(name, model) for name in self._splits}
        metrics = {"held_out_loss": float(sum(map(operator.mul, self._shares, losses.values())))}
        for name, loss in losses.items():
            metrics |= {
                f"held_out_loss/{name}": loss,
                f"held_out_perplexity/{name}": math.exp(min(loss, 700.0)),
                f"held_out_bits_per_byte/{name}": (
                    loss / math.log(2) * self._splits[name].tokens_per_byte
                ),
            }
        return metrics

    def _loss(self, name: str, model: LanguageModel) -> float:
        windows = min(
            number_of_windows(self._splits[name], self._length),
            self._config.eval_batches * self._config.batch_size,
        )
        found: list[Sums] = []
        for number in range(math.ceil(windows / self._rows)):
            # The last part also reads rows of the next epoch; their weight is set to 0.
            rows = windows - number * self._rows
            found.append(first_rows_loss(model, self._batches[name][number], rows))
            # At most two batches are on the devices: the one that runs and the next.
            jax.block_until_ready(found[-2:-1])
        return sum(float(x.loss) for x in found) / sum(float(x.weight) for x in found)


@jax.jit
def first_rows_loss(model: LanguageModel, batch: Batch, rows: int) -> Sums:
    """The sums of losses and weights over at most the first `rows` rows of a batch."""
    counted = jnp.arange(len(batch.weights)) < rows
    batch = batch._replace(weights=jnp.where(counted[:, None], batch.weights, 0))
    return loss_sum(model, batch)[1]
