"""Continues prompts with a trained model.

    python generate.py --workdir=runs/quickstart --prompt="def main("
    python generate.py --workdir=DIR --temperature=0.8 --top_p=0.95 --prompt="..." --prompt="..."
    python generate.py --workdir=DIR --requests=requests.jsonl --output=answers.jsonl
    python generate.py --workdir=DIR --prompt_file=book --max_tokens=0 --save_state=book.state
    python generate.py --workdir=DIR --load_state=book.state --prompt="Who ..." --prompt="Why ..."

One prompt's continuation is printed as it comes, those of several when all are done. A text ends
where the model ends the document, before a --stop string, or after --max_tokens. --prompt_file=-
reads standard input.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from retnet_jax.errors import ConfigError
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
from retnet_jax.programs import command_line


def main() -> None:
    """The program."""
    define_flags()
    command_line.run(_main)


def define_flags() -> None:
    """Not at import, so that a process can import this program along with others."""
    command_line.group("The model")
    flags.DEFINE_string("workdir", None, "directory of a training run")
    flags.DEFINE_string("checkpoint", None, "directory of a trained model, own or foreign")
    flags.mark_flags_as_mutual_exclusive(["workdir", "checkpoint"], required=True)
    command_line.define_dtype()
    flags.DEFINE_enum("weights", None, ["int8"], "of the matrices; if not given in --dtype")
    flags.DEFINE_enum("state_dtype", None, ["float32", "bfloat16"], "of a RetNet's state")
    command_line.group("What is read")
    flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times")
    flags.DEFINE_multi_string(
        "prompt_file",
        None,
        "file with a text to continue, without one line break at its end; -: standard input",
    )
    flags.DEFINE_string(
        "requests",
        None,
        "JSON lines with a prompt each, and perhaps its own temperature, top_k and top_p; other "
        "fields, such as an id, are given along to --output",
    )
    flags.DEFINE_string("load_state", None, "file of --save_state: prompts continue it")
    command_line.group("What is written")
    flags.DEFINE_integer("max_tokens", 256, "most tokens to add to each prompt", lower_bound=0)
    flags.DEFINE_float("temperature", 0.0, "0: the likeliest token; else: draw at this temperature")
    flags.DEFINE_integer("top_k", None, "draw among this many likeliest tokens")
    flags.DEFINE_float("top_p", None, "draw among the likeliest tokens that have this probability")
    flags.DEFINE_multi_string(
        "stop", [], "a text ends before this string; may be given several times"
    )
    flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("save_state", None, "file to keep what was read and written; one prompt")
    flags.DEFINE_string(
        "output", None, "JSON lines to write: texts, tokens, their log-probabilities"
    )


def _main() -> int:
    """Generates as the flags say."""
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
        raise ConfigError(f"--save_state keeps one text; there are {len(prompts)} prompts")
    directory = place(args.workdir or args.checkpoint)
    _, tokenizer = read_pretrained(directory)
    model = load_pretrained(directory, **command_line.given_dtype())
    model = for_decoding(model, weights=args.weights, state_dtype=args.state_dtype)
    after = None
    if args.load_state is not None:
        after = load_reading(local(args.load_state), model, tokenizer)
    writer = Writer(
        model,
        tokenizer,
        prompts,
        args.max_tokens,
        [request.sampler for request in requests],
        args.seed,
        stop=args.stop,
        # What is saved must have read no token after the end of the text.
        tokens_at_once=1 if args.save_state else 16,
        after=after,
    )
    speed = Speed(lambda: sum(len(found.tokens) for found in writer.continuations))
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    for additions in writer:
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
    if args.save_state is not None:
        save_reading(local(args.save_state), writer.reading, model, tokenizer)


def _as_json(record: dict[str, Any]) -> str:
    """A line of UTF-8; half a character, which a request's own field may have, stays an escape."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def given_requests(args) -> list[Request]:
    """The prompts that the flags give, each with its sampler."""
    defaults = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    after_text = args.load_state is not None
    prompts = [*(args.prompt or []), *map(read_prompt, args.prompt_file or [])]
    if prompts and args.requests is None:
        return requests_of_prompts(prompts, defaults, may_be_empty=after_text)
    if args.requests is not None and not prompts:
        return read_requests(local(args.requests), defaults, may_be_empty=after_text)
    if not prompts and after_text:
        return requests_of_prompts([""], defaults, may_be_empty=True)
    raise ConfigError(
        "give the texts to continue as --prompt or as --requests; a long one as --prompt_file"
    )


class Speed:
    """Tokens a second after the first piece, which is compiled; `count` says how many there are."""

    def __init__(self, count: Callable[[], int]):
        self._count = count
        self._notes = []

    def note(self) -> None:
        """That a piece has come."""
        self._notes.append((time.perf_counter(), self._count()))

    def __str__(self) -> str:
        # The last note is of what was held back, after the pieces.
        if len(self._notes) < 3 or self._notes[-2][1] == self._notes[0][1]:
            return "too few tokens to tell their speed"
        (begin, before), (end, after) = self._notes[0], self._notes[-2]
        return f"{(after - before) / (end - begin):.1f} tokens/s, compilation left out"
