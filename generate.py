"""Continues prompts with a trained model.

    python generate.py --workdir=runs/quickstart --prompt="def main("
    python generate.py --workdir=DIR --temperature=0.8 --top_p=0.95 --prompt="..." --prompt="..."

One prompt's continuation is printed as it comes, those of several when all are done. A text ends
where the model ends the document, or after --max_tokens.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import flags

from retnet_jax import command_line, for_decoding, load_pretrained
from retnet_jax.config import ConfigError
from retnet_jax.data import TextStream
from retnet_jax.generate import Sampler, stream
from retnet_jax.pretrained import read_pretrained

flags.DEFINE_string("workdir", None, "directory of a training run")
flags.DEFINE_string("checkpoint", None, "directory of a trained model, own or foreign")
flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint"], required=True)
flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times")
flags.mark_flag_as_required("prompt")
flags.DEFINE_integer("max_tokens", 256, "most tokens to add to each prompt", lower_bound=1)
flags.DEFINE_float("temperature", 0.0, "0: the likeliest token; else: draw at this temperature")
flags.DEFINE_integer("top_k", None, "draw among this many likeliest tokens")
flags.DEFINE_float("top_p", None, "draw among the likeliest tokens that have this probability")
command_line.define_dtype()
flags.DEFINE_enum("weights", None, ["int8"], "of the matrices; if not given in --dtype")
flags.DEFINE_enum("state_dtype", None, ["float32", "bfloat16"], "of a RetNet's state")
flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)


def main() -> int:
    """Generates as the flags say."""
    args = flags.FLAGS
    try:
        sampler = Sampler(args.temperature, args.top_k, args.top_p)
        directory = Path(args.workdir or args.checkpoint)
        kept = {"weights": args.weights, "state_dtype": args.state_dtype}
        changes = command_line.given_dtype()
        continue_prompts(directory, args.prompt, args.max_tokens, sampler, args.seed, changes, kept)
    except KeyboardInterrupt:
        print()
        return 130  # as a shell reports SIGINT
    return 0


def continue_prompts(
    directory: Path,
    prompts: list[str],
    max_tokens: int,
    sampler: Sampler,
    seed: int,
    changes: dict[str, str],
    kept: dict[str, str | None],
) -> None:
    """Prints prompts with their continuations, and on stderr the speed.

    Args:
      directory: where the model and its tokenizer are.
      prompts: texts.
      max_tokens: as in `generate`, as are sampler and seed.
      sampler: see there.
      seed: see there.
      changes: as in `load_pretrained`.
      kept: the arguments of `for_decoding`.

    Raises:
      ConfigError, CheckpointError: for a directory or a prompt that does not fit.
    """
    check_prompts(prompts)
    _, tokenizer = read_pretrained(directory)
    ids = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(prompts)]
    blocks = TimedBlocks(
        stream(
            for_decoding(load_pretrained(directory, **changes), **kept),
            ids,
            max_tokens,
            sampler,
            seed,
            end_id=tokenizer.end_id,
            vocab_size=tokenizer.vocab_size,
        ),
        end_id=tokenizer.end_id,
    )
    additions = decoded(blocks, [TextStream(tokenizer, before=prompt) for prompt in ids])
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for (text,) in additions:
            print(text, end="", flush=True)
        print()
    else:
        for number, texts in enumerate(zip(prompts, *additions, strict=True), start=1):
            print(f"--- {number} of {len(prompts)} ---", "".join(texts), sep="\n")
    print(blocks.speed(), file=sys.stderr)


def check_prompts(prompts: list[str]) -> None:
    """Raises `ConfigError` for a prompt that is no text."""
    for prompt in prompts:
        if not prompt:
            raise ConfigError("--prompt='' is empty; give the beginning of a text, such as 'The'")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"--prompt={prompt!a} is not valid UTF-8") from None


def decoded(blocks: Iterable[np.ndarray], rows: list[TextStream]) -> Iterator[list[str]]:
    """What each block of tokens [b n] adds to the text of each row, and what is left at the end."""
    for block in blocks:
        yield [row.add(ids) for row, ids in zip(rows, block.tolist(), strict=True)]
    yield [row.rest() for row in rows]


class TimedBlocks:
    """Passes blocks of tokens [b n] on, and times those after the first, which is compiled."""

    def __init__(self, blocks: Iterable[np.ndarray], end_id: int):
        self._blocks = blocks
        self._end_id = end_id
        self._tokens = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        blocks = iter(self._blocks)
        yield next(blocks)
        begin = time.perf_counter()
        for block in blocks:
            self._tokens += np.count_nonzero(block != self._end_id)
            self._seconds = time.perf_counter() - begin
            yield block

    def speed(self) -> str:
        """How many tokens a second came."""
        if not self._tokens:
            return "too few tokens to tell their speed"
        return f"{self._tokens / self._seconds:.1f} tokens/s, compilation left out"


if __name__ == "__main__":
    command_line.run(main)
