"""Requests: texts to continue, each with its own sampler, from a file or from strings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retnet_jax.errors import ConfigError
from retnet_jax.generation.sampling import Sampler

_KINDS = {"prompt": str, "temperature": (int, float), "top_k": int, "top_p": (int, float)}


class Request(NamedTuple):
    """A text to continue, and how its tokens are chosen."""

    prompt: str
    sampler: Sampler


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
        try:
            requests.append(Request(prompt, Sampler(**defaults | fields)))
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
            absent = field in ("top_k", "top_p") and value is None
            fits = isinstance(value, _KINDS.get(field, ())) and not isinstance(value, bool)
            if not (absent or fits):
                raise ConfigError(
                    f"{name}: {field}={value!r} does not fit; a request has prompt (text) and may "
                    "have temperature (a number), top_k and top_p (numbers, or null)"
                )
        found.append((name, fields))
    if not found:
        raise ConfigError(f"--requests={path} has no requests: a line is {{'prompt': '...'}}")
    return found


def _check_prompt(prompt: str, name: str, may_be_empty: bool) -> None:
    if not prompt and not may_be_empty:
        raise ConfigError(f"{name}='' is empty; give the beginning of a text, such as 'The'")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{name}={prompt!a} is not valid UTF-8") from None
