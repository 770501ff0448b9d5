"""Continues prompts with a trained model.

    python generate.py RUN "def main("
    python generate.py MODEL --temperature=0.8 --top_p=0.95 --prompt="..." --prompt="..."
    python generate.py MODEL --requests=requests.jsonl --output=answers.jsonl
    python generate.py MODEL --prompt_file=book --max_tokens=0 --save_state=book.state
    python generate.py MODEL --load_state=book.state --prompt="Who ..." --prompt="Why ..."

RUN is the directory of a training run. MODEL is the directory of any trained model, or its name on
the Hugging Face hub. Without either, the newest run under runs/ is used.

The continuation of a single prompt is printed while it is generated; those of several prompts are
printed at the end. A text ends where the model ends the document, before a --stop string, or after
--max_tokens.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from retnet_jax.errors import ConfigError
from retnet_jax.files.hub import model_directory
from retnet_jax.files.paths import local, place
from retnet_jax.generation.requests import (
    Request,
    read_prompt,
    read_requests,
    requests_of_prompts,
)
from retnet_jax.generation.saved_state import load_reading, save_reading
from retnet_jax.generation.texts import Writer
from retnet_jax.model import for_decoding
from retnet_jax.pretrained import load_pretrained, read_pretrained
from retnet_jax.programs import command_line, compilation_cache
from retnet_jax.programs.host_memory import keep_freed_memory
from retnet_jax.waiting import showing, with_first


def main() -> None:
    """The program."""
    define_flags()
    command_line.run(_main, positional=("workdir", "prompt"))


def define_flags() -> None:
    """Defines the flags; not at import, so that one process can import several programs."""
    command_line.group("Model")
    command_line.define_model_directory()
    command_line.define_dtype()
    flags.DEFINE_enum(
        "weights", None, ["int8"], "Format of the weight matrices; default: the --dtype"
    )
    flags.DEFINE_enum(
        "state_dtype",
        None,
        ["float32", "bfloat16"],
        "Dtype in which a RetNet's state is stored; default: float32",
    )
    _define_prompts()
    _define_sampling()
    command_line.group("Output files")
    flags.DEFINE_string(
        "output",
        None,
        "JSON lines file to write: text, tokens and log-probabilities of each prompt",
    )
    flags.DEFINE_string(
        "save_state",
        None,
        "File to write the model's state to, after a single prompt and its continuation",
    )
    compilation_cache.define_flag()


def _define_prompts() -> None:
    command_line.group("Prompts")
    flags.DEFINE_multi_string("prompt", None, "Text to continue; may be given several times")
    flags.DEFINE_multi_string(
        "prompt_file",
        None,
        "File with a text to continue (one line break at its end is dropped); -: standard input",
    )
    flags.DEFINE_string(
        "requests",
        None,
        "JSON lines file: each line has a prompt, and optionally its own temperature, top_k and "
        "top_p. Other fields, such as an id, are copied to --output",
    )
    flags.DEFINE_string(
        "load_state", None, "File written by --save_state; the prompts continue its text"
    )


def _define_sampling() -> None:
    command_line.group("Sampling")
    flags.DEFINE_integer(
        "max_tokens", 256, "Largest number of tokens to generate after each prompt", lower_bound=0
    )
    flags.DEFINE_float("temperature", 0.0, "0: greedy decoding; otherwise the sampling temperature")
    flags.DEFINE_integer("top_k", None, "Number of most likely tokens to sample from; default: all")
    flags.DEFINE_float(
        "top_p",
        None,
        "Total probability of the most likely tokens to sample from (nucleus); default: 1, all",
    )
    flags.DEFINE_multi_string(
        "stop", [], "String before which a text ends; may be given several times"
    )
    flags.DEFINE_integer("seed", 0, "Seed of the sampling", lower_bound=0, upper_bound=2**32 - 1)


def _main() -> int:
    """Generates as the flags say."""
    keep_freed_memory()
    command_line.find_model()
    compilation_cache.use(flags.FLAGS.compilation_cache)
    try:
        generate(flags.FLAGS)
    except KeyboardInterrupt:
        print()
        return 130  # as a shell reports SIGINT
    return 0


def generate(args) -> None:
    """Prints prompts with their continuations, and on stderr the speed.

    Raises:
      ConfigError, CheckpointError: for a directory, prompt or file that does not fit.
    """
    requests = given_requests(args)
    prompts = [request.prompt for request in requests]
    output = None if args.output is None else local(args.output)
    for name in ("output", "save_state"):
        path = getattr(args, name)
        if path is not None and local(path).exists():
            raise ConfigError(f"--{name}={path} exists already: name another file, or delete it")
    if args.save_state is not None and len(prompts) > 1:
        raise ConfigError(f"--save_state takes a single prompt; there are {len(prompts)}")
    directory = model_directory(args.workdir or args.checkpoint)
    _, tokenizer = read_pretrained(directory)
    with showing("loading the model"):
        model = load_pretrained(directory, **command_line.given_dtype())
        model = for_decoding(model, weights=args.weights, state_dtype=args.state_dtype)
    after = None
    if args.load_state is not None:
        after = load_reading(local(args.load_state), model, tokenizer)
    with showing("compiling, and reading the prompts"):
        writer = Writer(
            model,
            tokenizer,
            prompts,
            args.max_tokens,
            [request.sampler for request in requests],
            args.seed,
            stop=args.stop,
            # A saved state must not have read any token beyond the end of the text.
            tokens_at_once=1 if args.save_state else 16,
            after=after,
        )
    speed = Speed(lambda: sum(len(found.tokens) for found in writer.continuations))
    pieces = with_first(writer, "compiling the decoding")
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    for additions in pieces:
        speed.note()
        if len(prompts) == 1:
            print(additions[0], end="", flush=True)
    if len(prompts) == 1:
        print()
    else:
        for number, (prompt, found) in enumerate(
            zip(prompts, writer.continuations, strict=True), start=1
        ):
            print(f"--- {number} of {len(prompts)} ---", prompt + found.text, sep="\n")
    print(speed, file=sys.stderr)
    if output is not None:
        with output.open("x", encoding="utf-8") as file:
            for request, found in zip(requests, writer.continuations, strict=True):
                record = {**request.others, "prompt": request.prompt, **dataclasses.asdict(found)}
                file.write(_as_json(record) + "\n")
        print(f"written to {output}", file=sys.stderr)
    if args.save_state is not None:
        save_reading(local(args.save_state), writer.reading, model, tokenizer)
        print(f"the state is written to {args.save_state}", file=sys.stderr)


def _as_json(record: dict[str, Any]) -> str:
    """One line of JSON in UTF-8; a lone surrogate in a request's own field stays an escape."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def given_requests(args) -> list[Request]:
    """The prompts on the command line or in its files, each with its sampler."""
    defaults = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    after_text = args.load_state is not None
    prompts = [*(args.prompt or []), *map(read_prompt, args.prompt_file or [])]
    if args.requests is not None:
        if prompts:
            raise ConfigError("give either --requests, or --prompt and --prompt_file, not both")
        return read_requests(place(args.requests), defaults, may_be_empty=after_text)
    if not prompts and not after_text:
        raise ConfigError(
            "no prompts: give --prompt, or --prompt_file for a long text, or --requests"
        )
    return requests_of_prompts(prompts or [""], defaults, may_be_empty=after_text)


class Speed:
    """Measures tokens per second, from the end of the first piece on: that includes compilation.

    Args:
      count: Returns the number of tokens generated so far.
    """

    def __init__(self, count: Callable[[], int]):
        self._count = count
        self._notes = []

    def note(self) -> None:
        """Records the time and the number of tokens after a piece."""
        self._notes.append((time.perf_counter(), self._count()))

    def __str__(self) -> str:
        # The last note comes after the pieces, for the text that was held back.
        if len(self._notes) < 3 or self._notes[-2][1] == self._notes[0][1]:
            return "too few tokens to measure the speed"
        (begin, before), (end, after) = self._notes[0], self._notes[-2]
        return f"{(after - before) / (end - begin):.1f} tokens/s, without compilation"
