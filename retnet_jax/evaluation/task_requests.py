"""Accuracy on tasks of multiple choice: rows become requests, scores become choices."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retnet_jax.data import Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.prefix_trie import Request
from retnet_jax.evaluation.scoring import Score
from retnet_jax.evaluation.statistics import standard_error
from retnet_jax.evaluation.task_rows import Rows
from retnet_jax.evaluation.tasks import Question, Row, Task

SHOT_MODES = ("per-document", "fixed")


def draw_shots(
    task: Task,
    rows: Rows,
    pool: Rows,
    count: int,
    mode: str = "per-document",
    seed: int = 1234,
) -> list[list[Row]]:
    """The examples that each row is asked after, which never are the row itself.

    Args:
      task: whose rows these are.
      rows: those that are evaluated.
      pool: those that examples are drawn from, perhaps the same.
      count: examples for each.
      mode: "per-document" draws for each row anew, with the generator and in the order of
        lm-evaluation-harness; "fixed" draws once for all rows, so that they are read once.
      seed: of the draws; 1234 is lm-evaluation-harness's.

    Raises:
      ConfigError: if the pool has too few rows.
    """
    # One more than is needed, since the row itself may be among them and is left out.
    drawn = count + task.spare_shot if count else 0
    if drawn > len(pool.rows):
        raise ConfigError(
            f"{count} shots need {drawn} rows to draw from, but there are {len(pool.rows)}, from "
            f"{pool.names[0]} on"
        )
    generator = random.Random(seed)
    once = generator.sample(pool.rows, drawn) if mode == "fixed" else None
    shots = []
    for row in rows.rows:
        sample = generator.sample(pool.rows, drawn) if once is None else once
        sample = [x for x in sample if x != row]
        if len(sample) < count:  # the pool has the row more than once
            others = [x for x in pool.rows if x != row]
            if len(others) < count:
                raise ConfigError(
                    f"{count} shots need as many rows other than the one that is asked, but of "
                    f"those from {pool.names[0]} on only {len(others)} are"
                )
            sample = generator.sample(others, count)
        shots.append(sample[:count])
    return shots


@dataclass(frozen=True)
class TaskRequests:
    """A task as requests to a model.

    Attributes:
      questions: the rows as texts, without examples.
      texts: of each row and choice, the context with the examples before it, and the continuation.
      pairs: the same as token ids, one row after the other.
    """

    questions: list[Question]
    texts: list[tuple[str, str]]
    pairs: list[Request]


def task_texts(
    task: Task, rows: Rows, shots: Sequence[Sequence[Row]], variant: str
) -> Iterator[tuple[Question, list[tuple[str, str]]]]:
    """Each row as a question, and the context and continuation of each of its choices."""
    for row, examples in zip(rows.rows, shots, strict=True):
        question = task.question(row, variant)
        before = "".join(f"{task.question(x, variant).solved}\n\n" for x in examples)
        asked = [question.texts(choice) for choice in range(question.choices)]
        yield question, [(before + context, continuation) for context, continuation in asked]


def task_requests(
    task: Task, rows: Rows, shots: Sequence[Sequence[Row]], tokenizer: Tokenizer, variant: str
) -> TaskRequests:
    """A task's rows with their examples as requests.

    Raises:
      ConfigError: for a choice that becomes no token, with the row's name.
    """
    asked = list(task_texts(task, rows, shots, variant))
    texts = [text for _, choices in asked for text in choices]
    pairs = encode_pairs(tokenizer, texts)
    for number, pair in enumerate(pairs):
        if not pair.continuation:
            raise ConfigError(
                f"{rows.names[number // task.choices]}: choice {number % task.choices} of "
                f"{task.name}, {texts[number][1]!r}, becomes no token"
            )
    return TaskRequests([question for question, _ in asked], texts, pairs)


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Request]:
    """Contexts and continuations as token ids, BOS first, divided as lm-evaluation-harness does.

    Both are encoded together; the continuation's ids are those behind as many as the context alone
    has. Spaces at a context's end belong to the continuation, with whose words they are one token.
    """
    split = []
    for context, continuation in texts:
        bare = context.rstrip()
        split.append((bare, context[len(bare) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in split))
    encoded = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    wholes = tokenizer.encode_batch([a + b for a, b in split])
    bos = tokenizer.bos_id
    return [
        Request([bos, *encoded[context]], whole[len(encoded[context]) :])
        for (context, _), whole in zip(split, wholes, strict=True)
    ]


@dataclass(frozen=True)
class TaskResult:
    """How often a model was right on a task.

    Attributes:
      task: its name.
      correct: by metric, of each row whether the likeliest choice was the right one. "acc" compares
        log-likelihoods, "acc_norm" log-likelihoods per character of the choice.
      random: the share of right answers that guessing gives.
      majority: the share that always naming the most frequent label gives.
    """

    task: str
    correct: dict[str, np.ndarray]
    random: float
    majority: float

    @property
    def rows(self) -> int:
        """How many there were."""
        return len(self.correct["acc"])

    def accuracy(self, metric: str = "acc") -> float:
        """The share of rows that are right."""
        return float(self.correct[metric].mean())

    def standard_error(self, metric: str = "acc") -> float:
        """Of the accuracy, over rows: the sample's deviation by the root of n."""
        return standard_error(self.correct[metric].astype(np.float64))


def task_result(task: Task, requests: TaskRequests, scores: Sequence[Score]) -> TaskResult:
    """What the scores of a task's requests say."""
    log_likelihood = np.array([found.log_likelihood for found in scores])
    log_likelihood = log_likelihood.reshape(-1, task.choices)
    labels = np.array([question.label for question in requests.questions])
    correct = {"acc": log_likelihood.argmax(1) == labels}
    if task.normalized:
        # Without the space between context and choice, as lm-evaluation-harness counts.
        characters = [[len(x) - 1 for x in q.continuations] for q in requests.questions]
        correct["acc_norm"] = (log_likelihood / characters).argmax(1) == labels
    most_frequent = max(Counter(labels.tolist()).values())
    return TaskResult(task.name, correct, 1 / task.choices, most_frequent / len(labels))
