"""The answers to many requests in a file of JSON lines, which a killed run resumes.

Each answer is appended as it ends: its request's fields and number, its options, its text and its
tokens. The options that all requests share are in a second file, NAME.options.json, so that a
later run continues the file only if it would have written the same answers.
"""

import contextlib
import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic
from retnet_jax.generation.requests import ANSWER_FIELDS, Request
from retnet_jax.generation.texts import Continuation


class AnswerFile:
    """Appends answers to a file, and knows which requests it answers already.

        with AnswerFile(path, options, say) as file:
            ...

    It holds eight bytes for each answer that was in the file, and nothing for new ones.

    Args:
      path: The file; it is made if it does not exist.
      options: Options of the run that its answers depend on, by the names of the flags.
      say: Called with messages for the user.

    Attributes:
      answered: Number of answers that were in the file.

    Raises:
      ConfigError: for a file of another run or with other options; for a line that is no answer;
        if another process writes the file; or if it cannot be written.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], say: Callable[[str], object]):
        self._path = path
        self._seen = array("Q")  # digest of each answered request; 0: not answered
        self.answered = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"--output={path} cannot be written: {error}") from None
        with contextlib.ExitStack() as at_an_error:
            at_an_error.callback(self.close)
            _lock(self._file, path)
            begun = path.stat().st_size > 0
            self._check_options(dict(options), begun)
            if begun:
                self._find_answers(say)
            at_an_error.pop_all()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the writing, so that another process can continue the file."""
        self._file.close()

    def unanswered(self, requests: Iterator[Request]) -> Iterator[Request]:
        """The requests that the file does not answer.

        Raises:
          ConfigError: for a request that is not the one that was answered under its number, or if
            the file has answers to more requests.
        """
        number = -1
        for number, request in enumerate(requests):
            if number >= len(self._seen) or not self._seen[number]:
                yield request
            elif self._seen[number] != _digest(_asked(request)):
                raise ConfigError(
                    f"{request.name} is not the request that --output={self._path} answers as "
                    f"request_number {number}: it or its options have changed. Restore the "
                    "requests, or name another file"
                )
        if number + 1 < len(self._seen):
            raise ConfigError(
                f"--output={self._path} answers request_number {len(self._seen) - 1}, but there "
                f"are {number + 1} requests: restore the requests, or name another file"
            )

    def append(self, request: Request, found: Continuation) -> None:
        """Writes an answer: the whole line, or nothing."""
        line = as_json({**_asked(request), **dataclasses.asdict(found)}).encode() + b"\n"
        end = self._file.seek(0, 2)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise ConfigError(
                f"--output={self._path} cannot be written: {error}; with space for it, the same "
                "command resumes"
            ) from None

    def _check_options(self, options: dict[str, Any], begun: bool) -> None:
        """Compares the options with those of the run that began the file, or records them."""
        path = self._path.with_name(f"{self._path.name}.options.json")
        options = json.loads(json.dumps(options))
        if not begun:
            try:
                atomic.write_text(path, json.dumps(options, indent=2) + "\n")
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error}") from None
            return
        name = f"--output={self._path} exists already"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{name}, and cannot be continued without {path} ({error}): name another file, or "
                "delete it"
            ) from None
        different = [
            f"{key}={found.get(key)!r}, here {options.get(key)!r}"
            for key in {**found, **options}
            if found.get(key) != options.get(key)
        ]
        if different:
            raise ConfigError(
                f"{name}, and was written with other options ({'; '.join(different)}): give the "
                "same options to resume it, or name another file"
            )

    def _find_answers(self, say: Callable[[str], object]) -> None:
        """Reads which requests are answered, and deletes a last line that was cut off."""
        self._file.seek(0)
        end = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    say(f"{self._path}: the last line was cut off and is deleted")
                    self._file.truncate(end)
                    break
                end += len(line)
                self._add(line, f"{self._path}, line {number}")
        say(f"{self._path}: {self.answered} requests are answered already")

    def _add(self, line: bytes, name: str) -> None:
        """Notes the answer in a line."""
        try:
            record = json.loads(line)
            number = record["request_number"]
            if type(number) is not int or number < 0:
                raise ValueError(number)
        except (ValueError, LookupError, TypeError):
            raise ConfigError(
                f"{name} is not an answer: delete the line to resume, or name another --output"
            ) from None
        if number >= len(self._seen):
            self._seen.extend([0] * (number + 1 - len(self._seen)))
        if self._seen[number]:
            raise ConfigError(
                f"{name} answers request_number {number} a second time: delete the line to resume"
            )
        asked = {
            field: value
            for field, value in record.items()
            if field == "request_number" or field not in ANSWER_FIELDS
        }
        self._seen[number] = _digest(asked)
        self.answered += 1


def _asked(request: Request) -> dict[str, Any]:
    """The part of an answer that its request determines."""
    sampler = dataclasses.asdict(request.sampler)
    return {
        "request_number": request.number,
        **request.others,
        "prompt": request.prompt,
        **sampler,
        "max_tokens": request.max_tokens,
    }


def _digest(asked: Mapping[str, Any]) -> int:
    """A digest of 8 bytes that is not 0."""
    text = json.dumps(asked, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) | 1


def as_json(record: Mapping[str, Any]) -> str:
    """One line of JSON in UTF-8; a lone surrogate in a request's own field stays an escape."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def _lock(file: Any, path: Path) -> None:
    """Locks the file until it is closed, so that no answer is written twice."""
    import fcntl  # not on Windows, where nothing else here needs it

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"--output={path} is being written by another process") from None
