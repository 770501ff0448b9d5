"""Continuous batching: any number of requests, in constant memory.

    for answer in generate_requests(model, requests, rows=16):
        ...

`rows` requests are decoded at a time, and a row that ends goes to the next request. The loop
alternates between two compiled programs (`decoding_rows.py`): one decodes up to STEPS tokens of
each row, and gives free rows to requests whose prompts have been read; the other reads pieces of
prompts (`prompt_trie.py`) for later. So between two calls that decode, at most one piece of PIECE
tokens is read for each row, however long the prompts are: that bounds how long a row waits. Prompts
are read into a pool of 2 * `rows` states, so that all rows decode while there are requests.

What a request gets is a function of the request, its number, the seed and `rows`, bit for bit:

- The shapes of both programs depend on `rows` only, and no row's numbers depend on other rows.
- A prompt is cut into pieces at multiples of PIECE tokens, and only whole pieces are shared.
- A token is sampled with the seed, the request's number and the token's position.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.generation.checks import check_ends, check_lengths, check_seed
from retnet_jax.generation.decode import LAST_POSITION, Progress, check_progress, empty_progress
from retnet_jax.generation.decoding_rows import (
    Decoded,
    Ready,
    decode_rows,
    empty_rows,
    read_pieces,
)
from retnet_jax.generation.prompt_trie import PIECE, PromptTrie
from retnet_jax.generation.sampling import GREEDY, Sampler, sampler_columns
from retnet_jax.model import LanguageModel, for_decoding
from retnet_jax.model.length_limit import grows, limited_state, with_length_limit
from retnet_jax.model.parameters import why_not_finite
from retnet_jax.model.token_ids import checked_ids

ROWS = 16  # requests decoded at a time, unless another number is given
LONGEST = 2048  # tokens of a request of a Transformer, unless another number is given
STEPS = 16  # tokens that are decoded of each row in a call
_PIECES_AT_ONCE = 16  # pieces that are read in a call, at most


class TokenRequest(NamedTuple):
    """Token ids to continue."""

    prompt: Sequence[int]
    max_tokens: int
    sampler: Sampler = GREEDY
    number: int | None = None  # sampling depends on it; None: its index among the requests


class Answer(NamedTuple):
    """The tokens generated for a request."""

    number: int
    tokens: list[int]  # without the end id
    log_probabilities: list[float]  # of each token, as in `NewTokens`
    ended_by: str  # "end" id, or the "length" max_tokens


def generate_requests(
    model: LanguageModel,
    requests: Iterable[TokenRequest],
    *,
    rows: int = ROWS,
    seed: int = 0,
    end_id: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Iterator[Answer]:
    """Continues any number of prompts of any lengths, and yields the answers as they end.

    What a request gets depends on the request, its number, the seed and `rows` only. The memory
    depends on `rows`: about three states for each. A prefix that prompts share is read once, in
    whole pieces of 64 tokens.

    Args:
      model: RetNet or Transformer, best from `for_decoding`.
      requests: The requests. They are read as they are needed, about 2 * `rows` in advance.
      rows: Number of requests decoded at a time.
      seed: Seed of the sampling.
      end_id: As in `generate`.
      vocab_size: As in `generate`.
      max_length: Largest number of tokens of a request, its prompt and `max_tokens`, for models
        with attention to all tokens: each of the states has slots for all of them. None: 2048.
        Other models have no limit, and ignore it.

    Raises:
      ConfigError: for arguments out of range; and for a request with an empty prompt, an id unknown
        to the model, or more than `max_length` tokens: after the answers to all requests before it.
        An error of `requests` itself is also raised then.
      CheckpointError: for a model whose probabilities are not finite.
    """
    batch = ContinuousBatch(
        model,
        rows=rows,
        seed=seed,
        end_id=end_id,
        vocab_size=vocab_size,
        max_length=max_length,
    )
    for job in batch.run(_TokenJob(*each, batch.end_ids) for each in enumerate(requests)):
        yield Answer(job.number, job.tokens, job.log_probabilities, job.ended_by)


class Job:
    """A request on its way through the batch.

    Args:
      number: Number of the request, from 0 on, with which its tokens are sampled.
      ids: Token ids of the prompt.
      max_tokens: Largest number of tokens to generate.
      sampler: Sampler of its tokens.
      name: Name of the request, for messages.

    Attributes:
      done: Whether its last token has been generated.
      left: Number of tokens that may still be generated.
      order: Its index among the requests that were given: the first ones are read first.
    """

    def __init__(
        self, number: int, ids: Sequence[int], max_tokens: int, sampler: Sampler, name: str
    ):
        self.number, self.sampler, self.name = number, sampler, name
        self.ids = checked_ids(ids, None, f"{name}: the prompt")
        self.max_tokens = self.left = max_tokens
        self.done = max_tokens == 0
        self.order = 0

    def add(self, tokens: list[int], log_probabilities: list[float]) -> None:
        """Adds new tokens. Those after an end id are to be dropped."""
        raise NotImplementedError


class _TokenJob(Job):
    """A request whose tokens are collected."""

    def __init__(self, index: int, request: TokenRequest, end_ids: tuple[int, ...]):
        number = index if request.number is None else request.number
        name = f"request {number}"
        super().__init__(number, request.prompt, request.max_tokens, request.sampler, name)
        self.tokens, self.log_probabilities, self.ended_by = [], [], "length"
        self._end_ids = end_ids

    def add(self, tokens: list[int], log_probabilities: list[float]) -> None:
        end = next((i for i, token in enumerate(tokens) if token in self._end_ids), None)
        self.tokens += tokens[:end]
        self.log_probabilities += log_probabilities[:end]
        if end is not None:
            self.ended_by = "end"
        self.done = end is not None or not self.left


AnyJob = TypeVar("AnyJob", bound=Job)


class ContinuousBatch(Generic[AnyJob]):
    """Decodes requests in a fixed number of rows.

    Args:
      model: As in `generate_requests`.
      rows: As in `generate_requests`.
      seed: As in `generate_requests`.
      end_id: As in `generate_requests`.
      vocab_size: As in `generate_requests`.
      max_length: As in `generate_requests`.
      after: Progress after a text that all prompts continue, of one row; None: they begin new
        texts.

    Attributes:
      end_ids: All ids that end a row.
      tokens_read: Number of prompt tokens that were read; those shared by prompts count once.

    Raises:
      ConfigError: for arguments out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int = ROWS,
        seed: int = 0,
        end_id: int | Sequence[int] | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
        after: Progress | None = None,
    ):
        self._rows = check_lengths(model, rows, vocab_size, name="rows")
        self._key = jax.random.key(check_seed(seed))
        self.end_ids = check_ends(model, end_id, vocab_size)
        self._vocab_size = vocab_size
        model = for_decoding(model)
        if after is not None:
            check_progress(model, after, 1, 0)
        self._longest = LAST_POSITION
        if grows(model.config):
            longest = LONGEST if max_length is None else max_length
            self._longest = check_lengths(model, longest, vocab_size, name="max_length")
        self._model = with_length_limit(model, self._longest)
        self._position = 0 if after is None else int(np.asarray(after.state.position)[0])
        self._may_be_empty = after is not None and not bool(np.asarray(after.ended)[0])
        if self._position >= self._longest:
            raise ConfigError(
                f"the text before the prompts has {self._position} tokens, but {self._limit}"
            )
        # On all devices of the model; otherwise the second call would compile again.
        placed = partial(jax.device_put, device=self._model.sharding)
        self._decoding = placed(empty_rows(self._model, rows))
        self._pool = placed(_pool(self._model, after, 2 * rows, self._longest))
        self._trie = PromptTrie(2 * rows)
        self._waiting = 0  # requests in the trie
        self._owners: list[AnyJob | None] = [None] * rows
        self._stopped = np.zeros(rows, bool)  # rows to be freed in the next call
        self._source: Iterator[AnyJob] | None = None  # None: it has no further requests
        self._error: Exception | None = None

    @property
    def _limit(self) -> str:
        """The largest number of tokens, for messages."""
        if self._longest == LAST_POSITION:
            return f"{LAST_POSITION} is the last position of a token"
        return f"it is {self._longest}; a larger max_length takes more memory"

    @property
    def tokens_read(self) -> int:
        return self._trie.tokens_read

    def run(self, jobs: Iterable[AnyJob]) -> Iterator[AnyJob]:
        """Yields the jobs as they end.

        An error of `jobs` is raised after all jobs before it have ended.
        """
        self._source, self._error = _in_order(jobs), None
        yield from self._take()
        self._read()
        while self._source or self._waiting or any(self._owners):
            decoded = None
            if self._trie.ready or any(self._owners):
                decoded = self._decode()
            done_at_once = self._take()  # while the device decodes
            new = [] if decoded is None else self._collect(decoded)
            self._read()
            yield from done_at_once
            for row, job, tokens, log_p in new:  # while the device reads
                job.add(tokens, log_p)
                if job.done:
                    if self._owners[row] is job:
                        self._owners[row], self._stopped[row] = None, True
                    yield job
        if self._error is not None:
            raise self._error

    def _take(self) -> list[AnyJob]:
        """Takes requests from the source; those without tokens to generate are returned."""
        done = []
        while self._source and self._waiting < 2 * self._rows and len(done) < self._rows:
            try:
                job = next(self._source, None)
                if job is not None:
                    self._check(job)
            except Exception as error:
                self._error, job = error, None
            if job is None:
                self._source = None
            elif job.done:
                done.append(job)
            else:
                self._trie.add(job)
                self._waiting += 1
        return done

    def _check(self, job: Job) -> None:
        """Raises `ConfigError` for a request that cannot be answered."""
        checked_ids(job.ids, self._model.config.vocab_size, f"{job.name}: the prompt")
        if job.max_tokens < 0:
            raise ConfigError(f"{job.name}: max_tokens={job.max_tokens} is less than 0")
        if not len(job.ids) and not self._may_be_empty:
            before = ", but the text before it has ended" if self._position else ""
            raise ConfigError(f"{job.name}: the prompt is empty{before}; give at least one token")
        tokens = self._position + len(job.ids) + job.max_tokens
        if tokens > self._longest:
            read = f" after {self._position} tokens" if self._position else ""
            raise ConfigError(
                f"{job.name}: a prompt of {len(job.ids)} tokens{read} and max_tokens="
                f"{job.max_tokens} need max_length={tokens}, but {self._limit}"
            )

    def _read(self) -> None:
        """Reads pieces of prompts, at most one for each row, unless enough prompts are ready."""
        at_once = min(self._rows, _PIECES_AT_ONCE)
        for before in range(0, self._rows, at_once):
            most = min(at_once, self._rows - before)
            nodes = self._trie.next_nodes(most)
            ready = len(self._trie.ready)
            # Half of the rows can wait for a call in which all places are used.
            if not nodes or ready >= self._rows or (2 * ready > self._rows and len(nodes) < most):
                return
            tokens = np.zeros((at_once, PIECE), np.int32)
            counts = np.zeros(at_once, np.int32)
            places = np.zeros((2, at_once), np.int32)
            places[1] = 2 * self._rows + 1  # beyond the last row: not written
            for i, node in enumerate(nodes):
                ids = np.frombuffer(node.tokens, np.int32)
                tokens[i, : len(ids)], counts[i] = ids, len(ids)
                places[:, i] = self._trie.read(node)
            self._pool = read_pieces(self._model, self._pool, *places, tokens, counts)

    def _decode(self) -> Decoded:
        """Starts a call that decodes."""
        jobs = [job for job, _ in self._trie.ready]
        padding = 2 * self._rows - len(jobs)
        columns: tuple[np.ndarray, ...] = (
            np.array([node.row for _, node in self._trie.ready], np.int32),
            np.array([job.number % 2**32 for job in jobs], np.uint32),
            np.array([job.max_tokens for job in jobs], np.int32),
            *sampler_columns([job.sampler for job in jobs]),
        )
        ready = Ready(np.int32(len(jobs)), *(np.pad(column, (0, padding)) for column in columns))
        decoded, self._decoding = decode_rows(
            self._model,
            self._decoding,
            self._pool,
            ready,
            self._stopped.copy(),
            self._key,
            STEPS,
            self.end_ids,
            self._vocab_size,
        )
        self._stopped[:] = False
        return decoded

    def _collect(self, decoded: Decoded) -> list[tuple[int, AnyJob, list[int], list[float]]]:
        """Waits for a call, and returns the row and the new tokens of each job."""
        (tokens, log_p), steps, given_row, first = jax.device_get(decoded)
        parts: list[list[tuple[AnyJob, int]]] = [
            [] if job is None else [(job, 0)] for job in self._owners
        ]
        for row, step in zip(given_row.tolist(), first.tolist(), strict=True):
            if row < 0:
                break
            job, _ = self._trie.ready[0]
            self._trie.release()
            self._waiting -= 1
            parts[row].append((job, step))
        tokens, log_p = (x[:steps].T.tolist() for x in (tokens, log_p))
        new = []
        for row, jobs in enumerate(parts):
            ends = [*(step for _, step in jobs[1:]), int(steps)]
            for (job, start), next_start in zip(jobs, ends, strict=False):
                end = min(next_start, start + job.left)
                job.left -= end - start
                new.append((row, job, tokens[row][start:end], log_p[row][start:end]))
            self._owners[row] = jobs[-1][0] if jobs else None
        self._check_finite(new)
        return new

    def _check_finite(self, new: list[tuple[int, AnyJob, list[int], list[float]]]) -> None:
        for _, job, _, log_p in new:
            if not np.isfinite(log_p).all():
                raise CheckpointError(
                    f"the model's probabilities are not finite after {job.name}: "
                    f"{why_not_finite(self._model)}"
                )


def _in_order(jobs: Iterable[AnyJob]) -> Iterator[AnyJob]:
    """The jobs, each with its index."""
    for order, job in enumerate(jobs):
        job.order = order
        yield job


@partial(jax.jit, static_argnames=("rows", "longest"))
def _pool(model: LanguageModel, after: Progress | None, rows: int, longest: int) -> Progress:
    """The progress after pieces of prompts, with that before all prompts in row 0."""
    pool = empty_progress(model, rows + 1, capacity=1)
    if after is None:
        return pool
    first = Progress(after.logits, limited_state(after.state, longest), jnp.zeros(1, bool))
    return pool.put(jnp.zeros(1, jnp.int32), first)
