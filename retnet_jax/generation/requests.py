"""Requests: prompts to continue, each with its own sampler, from a file or from strings."""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retnet_jax.errors import ConfigError
from retnet_jax.files.paths import place
from retnet_jax.generation.sampling import Sampler

_KINDS = {"prompt": str, "temperature": (int, float), "top_k": int, "top_p": (int, float)}
# Fields of other programs' requests that are the same for all prompts here, with their flags.
_FOR_ALL = {
    "max_tokens": "--max_tokens",
    "max_new_tokens": "--max_tokens",
    "max_length": "--max_tokens",
    "n_predict": "--max_tokens",
    "stop": "--stop",
    "seed": "--seed",
}
# Fields of other programs' requests that are not supported here.
_ABSENT = (
    *("n", "best_of", "min_p", "typical_p", "logit_bias", "num_beams"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)
_ANSWERS = ("text", "tokens", "log_probabilities", "ended_by")  # fields of an answer in --output


class Request(NamedTuple):
    """A prompt, its sampler, and fields that are copied to its answer."""

    prompt: str
    sampler: Sampler
    others: Mapping[str, Any] = {}  # unused fields of its line, such as an id


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
    path: Path, defaults: Mapping[str, Any], may_be_empty: bool = False
) -> list[Request]:
    """Reads the file of --requests: JSON lines with a prompt, and optionally sampler options.

    Args:
      path: The file.
      defaults: Options of the sampler for requests that do not give them.
      may_be_empty: As in `requests_of_prompts`.

    Raises:
      ConfigError: for a missing or empty file, and for a line that is not a valid request.
    """
    requests = []
    for name, fields in _read_lines(path):
        prompt = fields.pop("prompt")
        _check_prompt(prompt, f"{name}: prompt", may_be_empty)
        options = {field: value for field, value in fields.items() if field in _KINDS}
        others = {field: value for field, value in fields.items() if field not in _KINDS}
        try:
            requests.append(Request(prompt, Sampler(**{**defaults, **options}), others))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return requests


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The name of each line, for messages, and its fields, with checked types."""
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
            raise ConfigError(f"{name}: not a JSON object with a prompt: {line[:80]}")
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
        raise ConfigError(f'--requests={path} is empty; each line must be like {{"prompt": "..."}}')
    return found


_FIELDS = (
    "a request has a prompt (text), and may have temperature (a number), top_k and top_p (numbers "
    "or null)"
)


def _check_unused(name: str, field: str, value: Any) -> None:
    """Raises `ConfigError` for a field that would be overwritten, or was meant as an option."""
    if field in _ANSWERS:
        raise ConfigError(
            f"{name}: {field}={value!r} would be overwritten by the answer's {field} in --output: "
            "rename the field"
        )
    if value is None:
        return
    if field in _FOR_ALL:
        raise ConfigError(
            f"{name}: {field}={value!r} cannot be set for each request: use {_FOR_ALL[field]} for "
            "all"
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
