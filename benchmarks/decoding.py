"""Time of one decoded token at an early and a late position, RetNet and Transformer.

    python -m benchmarks.decoding [--near=100] [--far=10000]

Both positions take turns in one process, on the quickstart's sizes, one row, random parameters.
A Transformer's cache has as many slots as its position needs.
"""

import statistics
from functools import partial

import jax
from absl import app, flags
from flax import nnx

from benchmarks.measure import interleaved_seconds, write_results
from configs.quickstart import get_config
from retnet_jax.generate import decode, prefill, row_keys
from retnet_jax.model import build_model

flags.DEFINE_integer("near", 100, "position of the early token")
flags.DEFINE_integer("far", 10_000, "position of the late token")
flags.DEFINE_integer("tokens", 64, "tokens in a timed call")
flags.DEFINE_integer("rounds", 15, "timed calls at each position")


class Decoder:
    """Decodes a few tokens at a time, on from a position."""

    def __init__(self, model, position: int, tokens: int, rounds: int):
        prompt = [i % model.config.vocab_size for i in range(position)]
        self.progress = prefill(model, [prompt], room=tokens * (2 * rounds + 1))
        self.step = partial(decode, model, keys=row_keys(0, 1), length=tokens)

    def __call__(self):
        tokens, self.progress = self.step(self.progress)
        return tokens


def main(_) -> None:
    args, results = flags.FLAGS, {}
    for architecture in ("retnet", "transformer"):
        model = build_model(get_config(architecture).model, rngs=nnx.Rngs(0))
        calls = {
            str(position): Decoder(model, position, args.tokens, args.rounds)
            for position in (args.near, args.far)
        }
        seconds = interleaved_seconds(calls, args.rounds)
        near, far = (seconds[str(position)] for position in (args.near, args.far))
        milliseconds = [1000 * statistics.median(x) / args.tokens for x in (near, far)]
        ratio = statistics.median(b / a for a, b in zip(near, far, strict=True))
        results[architecture] = {
            f"ms_per_token_at_{args.near}": milliseconds[0],
            f"ms_per_token_at_{args.far}": milliseconds[1],
            "median_ratio_far_to_near": ratio,
        }
        print(
            f"{architecture:<12} {milliseconds[0]:.3f} ms a token at {args.near}, "
            f"{milliseconds[1]:.3f} at {args.far}: ratio {ratio:.3f}"
        )
    print(f"written to {write_results(f'decoding_{jax.default_backend()}', results)}")


if __name__ == "__main__":
    app.run(main)
