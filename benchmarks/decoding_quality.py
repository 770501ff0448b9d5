"""The loss in bits per byte from a bfloat16 state and from int8 weights.

    python -m benchmarks.decoding_quality --workdir=runs/a [--workdir=runs/b]

The held-out text of each run's store is cut into rows and read token by token in recurrent form, as
in decoding. The state is carried through a whole row, across documents. Reported are differences
from float32 weights and state, with the standard error over rows. They are also given for each
quarter of the rows, because errors of a state might accumulate.
"""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measure import write_results
from retnet_jax.data import open_store
from retnet_jax.model import LanguageModel, for_decoding
from retnet_jax.model.decoding import DecodingModel
from retnet_jax.pretrained import load_pretrained, read_pretrained
from retnet_jax.programs import command_line

flags.DEFINE_multi_string(
    "workdir", None, "Directory of a training run; may be given several times", required=True
)
flags.DEFINE_integer("length", 4096, "Number of tokens in a row")
flags.DEFINE_integer("rows", 16, "Largest number of rows")


def main() -> None:
    args, results = flags.FLAGS, {}
    for workdir in args.workdir:
        model = load_pretrained(workdir)
        config, _ = read_pretrained(Path(workdir))
        held_out = open_store(config.data.store).held_out
        rows = min(args.rows, held_out.token_count // args.length)
        tokens = held_out.read(0, rows * args.length).reshape(rows, args.length)
        bits = partial(bits_per_byte, tokens=tokens, tokens_per_byte=held_out.tokens_per_byte)
        base = bits(for_decoding(model))
        found = {"float32": float(base.mean())}
        for name, arguments in OPTIONS.items():
            found[name] = compared(bits(for_decoding(model, **arguments)) - base)
        found["state to the nearest bfloat16"] = compared(bits(to_the_nearest(model)) - base)
        results[Path(workdir).name] = {
            "decay": config.model.decay,
            "n_heads": config.model.n_heads,
            "rows": rows,
            "length": args.length,
        } | found
        print(Path(workdir).name, config.model.decay)
        for name, value in found.items():
            print(f"  {name:<32} {value}")
    print(f"written to {write_results('decoding_quality', results)}")


OPTIONS = {
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "int8 weights": {"weights": "int8"},
    "both": {"weights": "int8", "state_dtype": "bfloat16"},
}


def compared(differences: np.ndarray) -> dict[str, float | list[float]]:
    """Mean of differences [b t], its standard error over rows, and the mean of each quarter."""
    rows = differences.mean(1)
    return {
        "difference": float(rows.mean()),
        "standard_error": float(rows.std(ddof=1) / math.sqrt(len(rows))),
        "quarters": [float(x.mean()) for x in np.array_split(differences, 4, axis=1)],
    }


def bits_per_byte(model: LanguageModel, tokens: np.ndarray, tokens_per_byte: float) -> np.ndarray:
    """Bits per byte [b t-1] of each token except the first, for tokens of average byte length."""
    state = model.init_state(*tokens.shape)
    nll = _nll(model, state, jnp.asarray(tokens, jnp.int32))
    return np.asarray(nll, np.float64) * tokens_per_byte / math.log(2)


@jax.jit
def _nll(model, state, tokens):
    def step(state, pair):
        token, target = pair
        logits, state = model(token[:, None], state, form="recurrent")
        log_probability = jax.nn.log_softmax(logits[:, 0])
        return state, -jnp.take_along_axis(log_probability, target[:, None], axis=1)[:, 0]

    _, nll = jax.lax.scan(step, state, (tokens[:, :-1].T, tokens[:, 1:].T))
    return nll.T


class _ToTheNearest(DecodingModel):
    """A model that rounds its bfloat16 state to the nearest instead of stochastically."""

    def _stored(self, layer_state, position, number):
        return self._turned(layer_state).astype(jnp.bfloat16)


def to_the_nearest(model: LanguageModel) -> LanguageModel:
    return _ToTheNearest(model, None, "bfloat16")


if __name__ == "__main__":
    command_line.run(main)
