"""Requests: texts to continue, each with its own sampler, from a file or from strings."""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retnet_jax.errors import ConfigError
from retnet_jax.files.paths import local
from retnet_jax.generation.sampling import Sampler

_KINDS = {"prompt": str, "temperature": (int, float), "top_k": int, "top_p": (int, float)}
# What others give with a request and is the same for all here, with the flag that says it.
_FOR_ALL = {
    "max_tokens": "--max_tokens",
    "max_new_tokens": "--max_tokens",
    "max_length": "--max_tokens",
    "n_predict": "--max_tokens",
    "stop": "--stop",
    "seed": "--seed",
}
# What they give and there is not here.
_ABSENT = (
    *("n", "best_of", "min_p", "typical_p", "logit_bias", "num_beams"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)
_ANSWERS = ("text", "tokens", "log_probabilities", "ended_by")  # what --output says of a request


class Request(NamedTuple):
    """A text to continue, how its tokens are chosen, and what its answer is given along."""

    prompt: str
    sampler: Sampler
    others: Mapping[str, Any] = {}  # fields of its line that are not used, such as its id


def read_prompt(path: str) -> str:
    """The text of --prompt_file, without one line break at its end; "-" is standard input.

    Raises:
      ConfigError: for a file that cannot be read, is not UTF-8, or is empty.
    """
    name = f"--prompt_file={path}"
    try:
        contents = sys.stdin.buffer.read() if path == "-" else local(path).read_bytes()
        text = contents.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not valid UTF-8: {error}") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError(f"{name} is empty; give the beginning of a text, such as 'The'")
    return text


def requests_of_prompts(
    prompts: Sequence[str], defaults: Mapping[str, Any], may_be_empty: bool = False
) -> list[Request]:
    """Prompts of --prompt with one sampler.

    Args:
      prompts: texts.
      defaults: the sampler's temperature, top_k and top_p.
      may_be_empty: whether a prompt may be, which continues a text that was read before.

    Raises:
      ConfigError: for a prompt that is no text, and as `Sampler`.
    """
    for prompt in prompts:
        _check_prompt(prompt, "--prompt", may_be_empty)
    sampler = Sampler(**defaults)
    return [Request(prompt, sampler) for prompt in prompts]


def read_requests(
    path: Path, defaults: Mapping[str, Any], may_be_empty: bool = False
) -> list[Request]:
    """The file of --requests: JSON lines with a prompt each, and perhaps options of its sampler.

    Args:
      path: the file.
      defaults: options of the samplers that a request does not give.
      may_be_empty: as of `requests_of_prompts`.

    Raises:
      ConfigError: for a file that is not there or empty, and a line that is no request.
    """
    requests = []
    for name, fields in _read_lines(path):
        prompt = fields.pop("prompt")
        _check_prompt(prompt, f"{name}: prompt", may_be_empty)
        options = {field: value for field, value in fields.items() if field in _KINDS}
        others = {field: value for field, value in fields.items() if field not in _KINDS}
        try:
            requests.append(Request(prompt, Sampler(**defaults | options), others))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return requests


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines as objects whose fields have the right types, and their names."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--requests={path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{name}: not JSON ({error})") from None
        if not isinstance(fields, dict) or "prompt" not in fields:
            raise ConfigError(f"{name}: no object with a prompt: {line[:80]}")
        for field, value in fields.items():
            if field not in _KINDS:
                _check_unused(name, field, value)
                continue
            absent = field in ("top_k", "top_p") and value is None
            fits = isinstance(value, _KINDS[field]) and not isinstance(value, bool)
            if not (absent or fits):
                raise ConfigError(f"{name}: {field}={value!r} does not fit; {_FIELDS}")
        found.append((name, fields))
    if not found:
        raise ConfigError(f"--requests={path} has no requests: a line is {{'prompt': '...'}}")
    return found


_FIELDS = (
    "a request has prompt (text) and may have temperature (a number), top_k and top_p (numbers, or "
    "null)"
)


def _check_unused(name: str, field: str, value: Any) -> None:
    """Raises `ConfigError` for a field that is meant to change the text, or is an answer's own."""
    if field in _ANSWERS:
        raise ConfigError(
            f"{name}: {field}={value!r} would be overwritten in --output, where {field} is the "
            "answer's: give it another name"
        )
    if value is None:
        return
    if field in _FOR_ALL:
        raise ConfigError(
            f"{name}: {field}={value!r} is not a request's own here: give {_FOR_ALL[field]} for all"
        )
    if field in _ABSENT:
        raise ConfigError(f"{name}: {field}={value!r} is not done here; {_FIELDS}")
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
