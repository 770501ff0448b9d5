"""Multiple-choice tasks: rows become requests to a model, and scores become accuracies."""

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
    """Draws the examples that are shown before each row; a row is never its own example.

    Args:
      task: Task of the rows.
      rows: Rows that are evaluated.
      pool: Rows from which examples are drawn, possibly the same ones.
      count: Number of examples for each row.
      mode: "per-document" draws new examples for each row, with the random generator and in the
        order of lm-evaluation-harness; "fixed" draws once for all rows, so that the examples are
        read once.
      seed: Seed of the random draws; 1234 is that of lm-evaluation-harness.

    Raises:
      ConfigError: if the pool has too few rows.
    """
    # One more than needed, because the row itself may be among them and is left out.
    drawn = count + task.spare_shot if count else 0
    if drawn > len(pool.rows):
        raise ConfigError(
            f"{count} shots need {drawn} rows to draw from, but there are only "
            f"{len(pool.rows)} ({pool.names[0]} and following)"
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
                    f"{count} shots need {count} rows that differ from the evaluated row, but only "
                    f"{len(others)} do ({pool.names[0]} and following)"
                )
            sample = generator.sample(others, count)
        shots.append(sample[:count])
    return shots


@dataclass(frozen=True)
class TaskRequests:
    """A task as requests to a model.

    Attributes:
      questions: The rows as texts, without examples.
      texts: Context, with examples before it, and continuation of each choice, row by row.
      pairs: The same as token ids.
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
    """The requests for a task's rows, with their examples.

    Raises:
      ConfigError: for a choice that is encoded as no token, with the name of its row.
    """
    asked = list(task_texts(task, rows, shots, variant))
    texts = [text for _, choices in asked for text in choices]
    pairs = encode_pairs(tokenizer, texts)
    for number, pair in enumerate(pairs):
        if not pair.continuation:
            raise ConfigError(
                f"{rows.names[number // task.choices]}: choice {number % task.choices} of "
                f"{task.name}, {texts[number][1]!r}, is encoded as no token"
            )
    return TaskRequests([question for question, _ in asked], texts, pairs)


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Request]:
    """Encodes contexts and continuations, BOS first, split as in lm-evaluation-harness.

    Context and continuation are encoded together. If the context by itself has n token ids, the
    continuation gets all ids after the first n. Spaces at the end of a context are moved to the
    continuation, because tokenizers join them with the next word.
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
    """The result of a model on a task.

    Attributes:
      task: Name of the task.
      correct: For each metric, whether each row was answered correctly. "acc" chooses by
        log-likelihood, "acc_norm" by log-likelihood per character of the choice.
      random: Accuracy of guessing.
      majority: Accuracy of always choosing the most frequent label.
    """

    task: str
    correct: dict[str, np.ndarray]
    random: float
    majority: float

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.correct["acc"])

    def accuracy(self, metric: str = "acc") -> float:
        """The fraction of rows answered correctly."""
        return float(self.correct[metric].mean())

    def standard_error(self, metric: str = "acc") -> float:
        """Standard error of the accuracy, over rows."""
        return standard_error(self.correct[metric].astype(np.float64))


def task_result(task: Task, requests: TaskRequests, scores: Sequence[Score]) -> TaskResult:
    """The result on a task, from the scores of its requests."""
    log_likelihood = np.array([found.log_likelihood for found in scores])
    log_likelihood = log_likelihood.reshape(-1, task.choices)
    labels = np.array([question.label for question in requests.questions])
    correct = {"acc": log_likelihood.argmax(1) == labels}
    if task.normalized:
        # Without the space between context and choice, as in lm-evaluation-harness.
        characters = [[len(x) - 1 for x in q.continuations] for q in requests.questions]
        correct["acc_norm"] = (log_likelihood / characters).argmax(1) == labels
    most_frequent = max(Counter(labels.tolist()).values())
    return TaskResult(task.name, correct, 1 / task.choices, most_frequent / len(labels))
