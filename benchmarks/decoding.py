"""Time per decoded token at an early and at a late position, for RetNet and Transformer.

    python -m benchmarks.decoding [--near=100] [--far=10000] [--weights=int8]
        [--d_model=256] [--n_layers=6] [--attention_layers='1,3:n_heads=4,window=256']

Both positions take turns in one process, with one row, the quickstart's sizes and random
parameters. A Transformer's cache is just large enough for its position. It also counts the
operations of the compiled loop that copy or rearrange a whole cache.
"""

import dataclasses
import re
import statistics
from functools import partial

import jax
from absl import app, flags
from flax import nnx

from benchmarks.measure import interleaved_seconds, write_results
from retnet_jax.config.attention import attention_layers_from_text
from retnet_jax.configs.quickstart import get_config
from retnet_jax.generation.decode import decode, prefill, row_keys
from retnet_jax.model import build_model, for_decoding

flags.DEFINE_integer("near", 100, "Position of the early token")
flags.DEFINE_integer("far", 10_000, "Position of the late token")
flags.DEFINE_integer("tokens", 64, "Number of tokens in a timed call")
flags.DEFINE_integer("rounds", 15, "Number of timed calls at each position")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of activations and weights")
flags.DEFINE_enum("weights", None, ["int8"], "Format of the weight matrices; default: --dtype")
flags.DEFINE_enum(
    "state_dtype", None, ["float32", "bfloat16"], "Dtype of a RetNet's state; default: float32"
)
flags.DEFINE_integer("d_model", 128, "Width of the RetNet, which its twin has too")
flags.DEFINE_integer("n_layers", 2, "Number of layers of both")
flags.DEFINE_string("attention_layers", "", "Attention layers of the RetNet, as in model configs")


class Decoder:
    """Decodes the next `tokens` tokens in each call, beginning at a position."""

    def __init__(self, model, position: int, tokens: int, rounds: int):
        prompt = [i % model.config.vocab_size for i in range(position)]
        self.progress = prefill(model, [prompt], room=tokens * (2 * rounds + 1))
        self.step = partial(decode, model, keys=row_keys(0, 1), length=tokens)

    def __call__(self):
        tokens, self.progress = self.step(self.progress)
        return tokens

    def cache_copies(self) -> int:
        """Operations of the compiled loop that copy or rearrange the cache of a layer.

        A cache is recognised by its number of slots. An update in place is a fusion, too, but its
        name says `dynamic-update-slice`.
        """
        visible = getattr(self.progress.state, "visible", None)
        if visible is None:
            return 0
        lowered = self.step.func.lower(*self.step.args, self.progress, **self.step.keywords)
        slots, heads = visible.shape[1], r"\d+,\d+"
        cache = rf"\[(?:\d+,)*(?:{slots},{heads}|{heads},{slots})\]"
        copy = rf"%(?:copy|transpose|bitcast_fusion|copy_bitcast_fusion)[.\w]* = \w+{cache}"
        lines = lowered.compile().as_text().splitlines()
        found = [line for line in lines if re.search(copy, line)]
        return len(found)


def main(_) -> None:
    args, results = flags.FLAGS, {}
    for architecture in ("retnet", "transformer"):
        config = dataclasses.replace(
            get_config().model,
            dtype=args.dtype,
            d_model=args.d_model,
            n_layers=args.n_layers,
            attention_layers=attention_layers_from_text(args.attention_layers),
        ).built_as(architecture)
        state_dtype = args.state_dtype if architecture == "retnet" else None
        model = build_model(config, rngs=nnx.Rngs(0))
        model = for_decoding(model, args.weights, state_dtype)
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
            "cache_copies": calls[str(args.far)].cache_copies(),
        }
        print(
            f"{architecture:<12} {milliseconds[0]:.3f} ms per token at {args.near}, "
            f"{milliseconds[1]:.3f} at {args.far}: ratio {ratio:.3f}, "
            f"{results[architecture]['cache_copies']} copies of a cache"
        )
    options = [x for x in (args.weights, args.state_dtype and f"state_{args.state_dtype}") if x]
    if (args.d_model, args.n_layers) != (128, 2):
        options.insert(0, f"{args.n_layers}x{args.d_model}")
    if args.attention_layers:
        options.insert(0, "hybrid")
    if args.dtype != "float32":
        options.insert(0, args.dtype)
    name = "_".join(["decoding", jax.default_backend(), *options])
    print(f"written to {write_results(name, results)}")


if __name__ == "__main__":
    app.run(main)
