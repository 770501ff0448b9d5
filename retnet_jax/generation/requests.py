"""Requests: prompts to continue, each with its own options, from a file or from strings.

A file is read line by line, as its requests are needed, so it may have any number of them.
"""

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from retnet_jax.errors import ConfigError
from retnet_jax.files.paths import place
from retnet_jax.generation.sampling import Sampler

_KINDS = {
    "prompt": str,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
    "max_tokens": int,
}
# Fields of other programs' requests that are the same for all prompts here, with their flags.
_FOR_ALL = {
    "max_new_tokens": "--max_tokens for all, or the field max_tokens",
    "max_length": "--max_tokens for all, or the field max_tokens",
    "n_predict": "--max_tokens for all, or the field max_tokens",
    "stop": "--stop for all",
    "seed": "--seed for all",
}
# Fields of other programs' requests that are not supported here.
_ABSENT = (
    *("n", "best_of", "min_p", "typical_p", "logit_bias", "num_beams"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)
# Fields of an answer in --output that its request cannot have.
ANSWER_FIELDS = ("request_number", "text", "tokens", "log_probabilities", "ended_by")
_SAMPLER_OPTIONS = ("temperature", "top_k", "top_p")


class Request(NamedTuple):
    """A prompt, its options, and fields that are copied to its answer."""

    prompt: str
    sampler: Sampler
    others: Mapping[str, Any] = {}  # unused fields of its line, such as an id
    max_tokens: int = 256
    stop: Sequence[str] = ()  # strings that end its text
    number: int = 0  # its index, from 0 on; sampling depends on it
    name: str = "a request"  # for messages


def read_prompt(path: str) -> str:
    """Reads the text of --prompt_file, without a line break at its end; "-" is standard input.

    Raises:
      ConfigError: for a file that cannot be read, is not UTF-8, or is empty.
    """
    name = f"--prompt_file={path}"
    try:
        contents = sys.stdin.buffer.read() if path == "-" else place(path).read_bytes()
        text = contents.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid UTF-8: {error}") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError(f"{name} is empty; give the beginning of a text, such as 'The'")
    return text


def requests_of_prompts(
    prompts: Sequence[str], defaults: Mapping[str, Any], may_be_empty: bool = False
) -> list[Request]:
    """The prompts of --prompt, all with the same sampler.

    Args:
      prompts: Texts to continue.
      defaults: Temperature, top_k and top_p of the sampler.
      may_be_empty: Whether a prompt may be empty, because it continues a text read before.

    Raises:
      ConfigError: for a prompt that is empty or not valid UTF-8, and as `Sampler`.
    """
    for prompt in prompts:
        _check_prompt(prompt, "--prompt", may_be_empty)
    sampler = Sampler(**defaults)
    return [Request(prompt, sampler) for prompt in prompts]


def read_requests(
    path: epath.Path,
    defaults: Mapping[str, Any],
    may_be_empty: bool = False,
    max_tokens: int = 256,
    stop: Sequence[str] = (),
) -> Iterator[Request]:
    """Reads the file of --requests: JSON lines with a prompt, and optionally options.

    Args:
      path: The file.
      defaults: Options of the sampler for requests that do not give them.
      may_be_empty: As in `requests_of_prompts`.
      max_tokens: The `max_tokens` of requests that do not give it.
      stop: Strings that end the texts of all requests.

    Raises:
      ConfigError: for a missing or empty file, and for a line that is not a valid request, when it
        is reached.
    """
    for number, (name, fields) in enumerate(_read_lines(path)):
        prompt = fields.pop("prompt")
        _check_prompt(prompt, f"{name}: prompt", may_be_empty)
        options = {field: fields[field] for field in _SAMPLER_OPTIONS if field in fields}
        others = {field: value for field, value in fields.items() if field not in _KINDS}
        most = fields.get("max_tokens", max_tokens)
        if most < 0:
            raise ConfigError(f"{name}: max_tokens={most} is less than 0")
        try:
            sampler = Sampler(**{**defaults, **options})
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        yield Request(prompt, sampler, others, most, stop, number, name)


def _read_lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each line, for messages, and its fields, with checked types."""
    empty = True
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        empty, name = False, f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not valid UTF-8 ({error})") from None
        except ValueError as error:
            raise ConfigError(f"{name}: not JSON ({error})") from None
        if not isinstance(fields, dict) or "prompt" not in fields:
            shown = line[:80].decode(errors="replace").rstrip()
            raise ConfigError(f"{name}: not a JSON object with a prompt: {shown}")
        for field, value in fields.items():
            if field not in _KINDS:
                _check_unused(name, field, value)
                continue
            absent = field in ("top_k", "top_p") and value is None
            fits = isinstance(value, _KINDS[field]) and not isinstance(value, bool)
            if not (absent or fits):
                raise ConfigError(f"{name}: {field}={value!r} does not fit; {_FIELDS}")
        yield name, fields
    if empty:
        raise ConfigError(f'--requests={path} is empty; each line must be like {{"prompt": "..."}}')


def _lines(path: epath.Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"--requests={path} cannot be read: {error}") from None


_FIELDS = (
    "a request has a prompt (text), and may have temperature (a number), top_k and top_p (numbers "
    "or null) and max_tokens (a number)"
)


def _check_unused(name: str, field: str, value: Any) -> None:
    """Raises `ConfigError` for a field that would be overwritten, or was meant as an option."""
    if field in ANSWER_FIELDS:
        raise ConfigError(
            f"{name}: {field}={value!r} would be overwritten by the answer's {field} in --output: "
            "rename the field"
        )
    if value is None:
        return
    if field in _FOR_ALL:
        raise ConfigError(
            f"{name}: {field}={value!r} cannot be set for each request: use {_FOR_ALL[field]}"
        )
    if field in _ABSENT:
        raise ConfigError(f"{name}: {field}={value!r} is not supported; {_FIELDS}")
    if close := difflib.get_close_matches(field.lower(), _KINDS, n=2, cutoff=0.7):
        raise ConfigError(
            f"{name}: {field}={value!r} does not fit; did you mean {' or '.join(close)}? {_FIELDS}"
        )


def _check_prompt(prompt: str, name: str, may_be_empty: bool) -> None:
    if not prompt and not may_be_empty:
        raise ConfigError(f"{name}='' is empty; give the beginning of a text, such as 'The'")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{name}={prompt!a} is not valid UTF-8") from None
