"""Generation of texts, in pieces, from prompts and stop strings.

    writer = Writer(model, tokenizer, ["Once", "The"], max_tokens=100, stop=["END"])
    for additions in writer:                  # the new text of each prompt
        ...
    writer.continuations[0].text

The model's state after a text can be saved (`saved_state.py`) and continued. `answer_requests`
continues any number of texts in a fixed number of rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from retnet_jax.data.tokenizers import TextStream, Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.generation.continuous import ROWS, ContinuousBatch, Job
from retnet_jax.generation.decode import Progress, Stream
from retnet_jax.generation.requests import Request
from retnet_jax.generation.sampling import GREEDY, Sampler
from retnet_jax.model import LanguageModel


@dataclass
class Continuation:
    """The text generated after a prompt so far."""

    text: str = ""  # without the stop string
    tokens: list[int] = field(default_factory=list)  # including those of the stop string
    log_probabilities: list[float] = field(default_factory=list)  # of each token, in nats
    ended_by: str = "length"  # "end" of the text, a "stop" string, or the "length" max_tokens


@dataclass(frozen=True)
class Reading:
    """Texts that a model has read, to be continued.

    Attributes:
      progress: Progress of the model, one row for each text.
      last_ids: Last token ids of each text; decoding the next ones to text can depend on them.
    """

    progress: Progress
    last_ids: list[list[int]]


class Writer:
    """Continues texts; iterating yields the new text of each, until all have ended.

    A stop string may be spread over several tokens. Text that might begin a stop string is held
    back until that is decided.

    Args:
      model: RetNet or Transformer, best from `for_decoding`.
      tokenizer: Tokenizer of the model.
      prompts: Texts to continue; with `after` they may be empty.
      max_tokens: Largest number of tokens to generate after each prompt.
      sampler: Sampler for all prompts, or one for each.
      seed: Seed of the sampling.
      stop: Strings that end a text; they are not part of it.
      tokens_at_once: Tokens generated between checks for a stop string; up to this many are wasted.
      after: Text read before that all prompts continue, or one such text for each; None: prompts
        begin new texts, with BOS. A prompt is encoded separately, so if it begins within a word its
        tokens differ from those of the joined text.

    Raises:
      ConfigError: for an empty stop string, a wrong number of texts in `after`, or an empty prompt
        after a text that has ended; and as `generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        max_tokens: int,
        sampler: Sampler | Sequence[Sampler] = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        tokens_at_once: int = 16,
        after: Reading | None = None,
    ):
        _check_stop(stop)
        self._end_ids = tokenizer.end_ids
        ids = tokenizer.encode_batch(prompts)
        progress = None
        if after is None:
            ids = [[tokenizer.bos_id, *row] for row in ids]
            before = [[]] * len(ids)
        else:
            texts = _rows(after, len(prompts))
            progress = after.progress.take(jnp.array(texts))
            before = [after.last_ids[row] for row in texts]
            for number, (row, prompt) in enumerate(zip(texts, ids, strict=True)):
                if not prompt and bool(after.progress.ended[row]):
                    raise ConfigError(
                        f"prompt {number} is empty, but the text before it has ended: give a "
                        "prompt for the next text"
                    )
        self._ids = [[*old, *new] for old, new in zip(before, ids, strict=True)]
        self._stream = Stream(
            model,
            ids,
            max_tokens,
            sampler,
            seed,
            end_id=tokenizer.end_ids,
            vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
            tokens_at_once=tokens_at_once,
            progress=progress,
        )
        self._rows = [_Row(TextStream(tokenizer, before=row), stop) for row in self._ids]
        self.continuations = [row.continuation for row in self._rows]

    def __iter__(self) -> Iterator[list[str]]:
        for new in self._stream:
            tokens, log_p = (x.tolist() for x in new)
            yield [
                row.add(row_tokens, row_log_p, self._end_ids)
                for row, row_tokens, row_log_p in zip(self._rows, tokens, log_p, strict=True)
            ]
            self._stream.stop([row.done for row in self._rows])
        yield [row.rest() for row in self._rows]

    @property
    def reading(self) -> Reading:
        """The reading of the prompts and their continuations so far.

        It is exact for a single text with `tokens_at_once=1`. Otherwise the model has read to the
        end of the last piece of the stream, or until the longest text ended.
        """
        rows = zip(self._ids, self.continuations, strict=True)
        last_ids = [[*before, *after.tokens][-TextStream.context :] for before, after in rows]
        ended = np.array([row.ended_by == "end" for row in self.continuations])
        return Reading(self._stream.progress._replace(ended=ended), last_ids)


def answer_requests(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Iterable[Request],
    *,
    rows: int = ROWS,
    seed: int = 0,
    max_length: int | None = None,
    after: Reading | None = None,
) -> Iterator[tuple[Request, Continuation]]:
    """Continues any number of texts, and yields them with their requests as they end.

    Rows, memory and what a text depends on are as in `generate_requests`.

    Args:
      model: As in `Writer`.
      tokenizer: Tokenizer of the model.
      requests: Prompts with their options, read as they are needed.
      rows: As in `generate_requests`.
      seed: As in `generate_requests`.
      max_length: As in `generate_requests`.
      after: Text read before that all prompts continue, as in `Writer`.

    Raises:
      ConfigError: if `after` has several texts; for an empty stop string; and as
        `generate_requests`.
    """
    if after is not None and len(after.last_ids) != 1:
        raise ConfigError(f"the prompts continue {len(after.last_ids)} texts: give one text")
    batch = ContinuousBatch(
        model,
        rows=rows,
        seed=seed,
        end_id=tokenizer.end_ids,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
        max_length=max_length,
        after=None if after is None else after.progress,
    )
    before = None if after is None else after.last_ids[0]
    for job in batch.run(_TextJob(request, tokenizer, before) for request in requests):
        yield job.request, job.continuation


class _TextJob(Job):
    """A request whose text is written while its tokens arrive."""

    def __init__(self, request: Request, tokenizer: Tokenizer, before: Sequence[int] | None):
        _check_stop(request.stop)
        ids = tokenizer.encode(request.prompt)
        if before is None:
            ids = [tokenizer.bos_id, *ids]
        super().__init__(request.number, ids, request.max_tokens, request.sampler, request.name)
        self.request = request
        self._end_ids = tokenizer.end_ids
        self._row = _Row(TextStream(tokenizer, before=[*(before or ()), *ids]), request.stop)
        self._new: tuple[list[int], list[float]] = [], []  # not yet added to the text
        self.continuation = self._row.continuation

    def add(self, tokens: list[int], log_probabilities: list[float]) -> None:
        for new, more in zip(self._new, (tokens, log_probabilities), strict=True):
            new += more
        last = not self.left or any(token in self._end_ids for token in tokens)
        if last or self.request.stop:
            self._row.add(*self._new, self._end_ids)
            self._new = [], []
        self.done = last or self._row.done
        if self.done:
            self._row.rest()


def _rows(after: Reading, prompts: int) -> list[int]:
    """The index of the text that each prompt continues."""
    texts = len(after.last_ids)
    if texts not in (1, prompts):
        raise ConfigError(f"{prompts} prompts cannot continue {texts} texts: give one for each")
    return [0] * prompts if texts == 1 else list(range(prompts))


def _check_stop(stop: Sequence[str]) -> None:
    if "" in stop:
        raise ConfigError("a stop string is empty; it would end every text at its beginning")


class _Row:
    """The text of one row, while it is generated."""

    def __init__(self, stream: TextStream, stop: Sequence[str]):
        self._stream = stream
        self._stop = stop
        self._held = ""  # text that may be the beginning of a stop string
        self.continuation = Continuation()
        self.done = False

    def add(self, tokens: list[int], log_p: list[float], end_ids: Sequence[int]) -> str:
        """Adds new tokens up to the end of the text, and returns the new text that is certain."""
        if self.done:
            return ""
        ends = [place for place, token in enumerate(tokens) if token in end_ids]
        ended = bool(ends)
        tokens = tokens[: ends[0]] if ended else tokens
        before, held = self._stream.copy(), self._held
        given = self._certain(self._stream.add(list(tokens)))
        if self.done:
            tokens = tokens[: self._tokens_to_stop(before, held, tokens)]
        elif ended:
            self._end("end")
        self.continuation.text += given
        self.continuation.tokens += tokens
        self.continuation.log_probabilities += log_p[: len(tokens)]
        return given

    def _tokens_to_stop(self, stream: TextStream, text: str, tokens: Sequence[int]) -> int:
        """The number of tokens after which a stop string is complete."""
        for number, token in enumerate(tokens, start=1):
            text += stream.add([token])
            if any(stop in text for stop in self._stop):
                return number
        return len(tokens)

    def rest(self) -> str:
        """The text that was held back; called after the last tokens."""
        if self.done and self.continuation.ended_by == "stop":
            return ""
        rest = self._certain(self._stream.rest()) + self._held
        self._held = ""
        self.continuation.text += rest
        return rest

    def _certain(self, new: str) -> str:
        """The part of the held-back and the new text that cannot belong to a stop string."""
        text = self._held + new
        starts = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if starts:
            self._held = ""
            self._end("stop")
            # The one that is complete first, so that it does not matter in what parts text comes.
            _, first = min((start + len(stop), start) for start, stop in starts)
            return text[:first]
        keep = max((_beginning(stop, text) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _end(self, reason: str) -> None:
        self.done = True
        self.continuation.ended_by = reason


def _beginning(stop: str, text: str) -> int:
    """The length of the longest end of a text that is a proper beginning of a stop string."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
