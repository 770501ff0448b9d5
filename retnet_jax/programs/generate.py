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

A file of --requests may have any number of them: --rows are continued at a time, and a text that
ends makes room for the next. Answers are written to --output as they end; the same command resumes
a run that was killed. A line that is no request ends the run after the answers to all lines before
it.
"""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from tqdm import tqdm

from retnet_jax.data import Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.files.digests import sha256_of_file
from retnet_jax.files.hub import model_directory
from retnet_jax.files.paths import local, place
from retnet_jax.generation.answers import AnswerFile, as_json
from retnet_jax.generation.continuous import LONGEST, ROWS
from retnet_jax.generation.requests import (
    Request,
    read_prompt,
    read_requests,
    requests_of_prompts,
)
from retnet_jax.generation.saved_state import (
    fingerprint_of_model,
    load_reading,
    save_reading,
)
from retnet_jax.generation.texts import Continuation, Reading, Writer, answer_requests
from retnet_jax.model import LanguageModel, for_decoding
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
    command_line.group("Many requests")
    flags.DEFINE_integer(
        "rows",
        ROWS,
        "Number of --requests continued at a time. The memory is that of about three states for "
        "each; a text depends on its request, the seed and this number",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "max_length",
        LONGEST,
        "Largest number of tokens of one of the --requests with its text, for a model with "
        "attention to all tokens; other models have no limit",
        lower_bound=1,
    )
    command_line.group("Output files")
    flags.DEFINE_string(
        "output",
        None,
        "JSON lines file to write: text, tokens and log-probabilities of each prompt. With "
        "--requests each line has the request_number, from 0 on, in the order in which texts end, "
        "and an existing file is continued",
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
        "JSON lines file: each line has a prompt, and optionally its own temperature, top_k, "
        "top_p and max_tokens. Other fields, such as an id, are copied to --output",
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
    if args.requests is not None:
        _answer(args)
        return
    requests = given_requests(args)
    prompts = [request.prompt for request in requests]
    output = None if args.output is None else local(args.output)
    for name in ("output", "save_state"):
        path = getattr(args, name)
        if path is not None and local(path).exists():
            raise ConfigError(f"--{name}={path} exists already: name another file, or delete it")
    if args.save_state is not None and len(prompts) > 1:
        raise ConfigError(f"--save_state takes a single prompt; there are {len(prompts)}")
    model, tokenizer, after = _loaded(args)
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
                file.write(as_json(record) + "\n")
        print(f"written to {output}", file=sys.stderr)
    if args.save_state is not None:
        save_reading(local(args.save_state), writer.reading, model, tokenizer)
        print(f"the state is written to {args.save_state}", file=sys.stderr)


def _loaded(args) -> tuple[LanguageModel, Tokenizer, Reading | None]:
    """The model, its tokenizer, and the text of --load_state."""
    directory = model_directory(args.workdir or args.checkpoint)
    _, tokenizer = read_pretrained(directory)
    with showing("loading the model"):
        model = load_pretrained(directory, **command_line.given_dtype())
        model = for_decoding(model, weights=args.weights, state_dtype=args.state_dtype)
    after = None
    if args.load_state is not None:
        after = load_reading(local(args.load_state), model, tokenizer)
    return model, tokenizer, after


def _answer(args) -> None:
    """Answers the requests of a file: into --output, or on the screen.

    Raises:
      ConfigError, CheckpointError: for a directory or file that does not fit; for a line that is no
        request, after the answers to those before it.
    """
    if args.prompt or args.prompt_file:
        raise ConfigError("give either --requests, or --prompt and --prompt_file, not both")
    if args.save_state is not None:
        raise ConfigError("--save_state takes a single prompt, not --requests")
    requests = read_requests(
        place(args.requests),
        _sampling(args),
        may_be_empty=args.load_state is not None,
        max_tokens=args.max_tokens,
        stop=args.stop,
    )
    requests = itertools.chain([next(requests)], requests)  # before the model is loaded
    model, tokenizer, after = _loaded(args)
    with contextlib.ExitStack() as open_files:
        file = None
        if args.output is not None:
            options = _options(args, model, tokenizer)
            file = AnswerFile(local(args.output), options, lambda x: print(x, file=sys.stderr))
            open_files.enter_context(file)
            requests = file.unanswered(requests)
        answers = answer_requests(
            model,
            tokenizer,
            requests,
            rows=args.rows,
            seed=args.seed,
            max_length=args.max_length,
            after=after,
        )
        _write(answers, file)
    if args.output is not None:
        print(f"written to {args.output}", file=sys.stderr)


def _write(answers: Iterator[tuple[Request, Continuation]], file: AnswerFile | None) -> None:
    """Writes answers as they come, or prints them; and on stderr their number and the speed."""
    answers = with_first(answers, "compiling, and answering the first request")
    start, tokens = time.perf_counter(), 0
    with tqdm(unit=" answers", initial=file.answered if file else 0, disable=None) as bar:
        for request, found in answers:
            if file is None:
                bar.clear()
                print(f"--- request {request.number} ---", request.prompt + found.text, sep="\n")
            else:
                file.append(request, found)
            tokens += len(found.tokens)
            bar.update()
    print(f"{tokens} tokens in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def _options(args, model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the answers depend on beside the requests, by the names of the flags."""
    names = ("temperature", "top_k", "top_p", "max_tokens", "stop", "seed", "rows", "max_length")
    names = (*names, "dtype", "weights", "state_dtype")
    state = None if args.load_state is None else sha256_of_file(local(args.load_state))
    return {
        "model": fingerprint_of_model(model),
        "tokenizer": tokenizer.fingerprint,
        **{name: getattr(args, name) for name in names},
        "load_state": state,
    }


def _sampling(args) -> dict[str, Any]:
    """The options of the sampler on the command line."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}


def given_requests(args) -> list[Request]:
    """The prompts on the command line or in its files, all with the same sampler."""
    defaults, after_text = _sampling(args), args.load_state is not None
    prompts = [*(args.prompt or []), *map(read_prompt, args.prompt_file or [])]
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
