"""What is evaluated, and the results of one model."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from retnet_jax.data import Tokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.held_out_texts import Text
from retnet_jax.evaluation.perplexity import (
    check_contexts,
    last_tokens_nll,
    stateful_nll,
    window_nll,
    windows,
)
from retnet_jax.evaluation.prefix_trie import PrefixTrie
from retnet_jax.evaluation.recall_probes import RecallResult, recall
from retnet_jax.evaluation.scoring import score_trie
from retnet_jax.evaluation.task_requests import (
    TaskRequests,
    TaskResult,
    draw_shots,
    task_requests,
    task_result,
)
from retnet_jax.evaluation.task_rows import Rows, read_rows
from retnet_jax.evaluation.tasks import TASKS, Task
from retnet_jax.model import LanguageModel

PARTS = ("perplexity", "tasks", "recall")
PROTOCOLS = ("window", "sliding", "stateful")


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how.

    Attributes:
      parts: of PARTS.
      protocols: of PROTOCOLS.
      window_length: tokens of a window.
      stride: of the sliding protocol.
      context_lengths: contexts after which the same last 128 tokens are scored.
      tasks: names of tasks.
      task_data: where their rows are, as in `read_rows`.
      shots: examples before a question; each number gives a result of its own.
      shot_mode: as in `draw_shots`.
      variant: of a task's texts, of VARIANTS.
      seed: of the examples.
      max_length: of a request, as in `PrefixTrie`.
      distances: of the recall probes.
      trials: of each probe and distance.
      batch_size: rows at once.
    """

    parts: Sequence[str] = ("perplexity",)
    protocols: Sequence[str] = ("window", "stateful")
    window_length: int = 2048
    stride: int | None = None
    context_lengths: Sequence[int] = ()
    tasks: Sequence[str] = tuple(TASKS)
    task_data: str | None = None
    shots: Sequence[int] = (0,)
    shot_mode: str = "per-document"
    variant: str = "lm_eval"
    seed: int = 1234
    max_length: int | None = None
    distances: Sequence[int] = ()
    trials: int = 64
    batch_size: int = 4

    def label(self, protocol: str) -> str:
        """A protocol with its lengths."""
        if protocol == "window":
            return f"window of {self.window_length}"
        if protocol == "sliding":
            return f"sliding {self.window_length} by {self.stride}"
        return protocol


@dataclass
class Results:
    """What a model gave.

    Attributes:
      nll: by protocol, of each document the -log p of its tokens.
      last_nll: by context length, of each document that is long enough the -log p of 128 tokens.
      tasks: by name and shots.
      read: by name and shots, tokens that were read, and how many without shared prefixes.
      truncated: requests of tasks that were longer than `max_length`.
      recall: of each probe and distance.
    """

    nll: dict[str, list[np.ndarray]] = field(default_factory=dict)
    last_nll: dict[int, np.ndarray] = field(default_factory=dict)
    tasks: dict[tuple[str, int], TaskResult] = field(default_factory=dict)
    read: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    truncated: int = 0
    recall: list[RecallResult] = field(default_factory=list)


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task that are evaluated, and those that examples are drawn from."""

    task: Task
    rows: Rows
    pool: Rows | None


def read_tasks(plan: Plan) -> list[TaskRows]:
    """The rows of the plan's tasks; examples' too, where there are to be some.

    Raises:
      ConfigError: as `read_rows`.
    """
    if "tasks" not in plan.parts:
        return []
    if plan.task_data is None:
        raise ConfigError(
            "the tasks need --data: a directory with TASK/SPLIT.jsonl, such as "
            f"{plan.tasks[0]}/{TASKS[plan.tasks[0]].split}.jsonl, or hf, or tfds"
        )
    found = []
    for task in map(TASKS.__getitem__, plan.tasks):
        rows = read_rows(task, task.split, plan.task_data)
        pool = None
        if any(plan.shots):
            same = task.shots_from == task.split
            pool = rows if same else read_rows(task, task.shots_from, plan.task_data)
            draw_shots(task, rows, pool, max(plan.shots))  # before anything is computed
        found.append(TaskRows(task, rows, pool))
    return found


def evaluate_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: Text | None,
    tasks: Sequence[TaskRows],
    plan: Plan,
) -> Results:
    """Evaluates a model as planned, with progress bars on a terminal.

    Args:
      model: on the mesh that is set, if one is.
      tokenizer: the model's.
      text: for perplexity, and to put between in the recall probes; its tokens are the tokenizer's.
      tasks: from `read_tasks`.
      plan: what to do.

    Raises:
      ConfigError: for input that the model cannot take.
    """
    results = Results()
    if "perplexity" in plan.parts and plan.context_lengths:
        check_contexts(text.tokens, plan.context_lengths)
    # All of them before anything is computed, so that a row that does not fit costs nothing.
    prepared = [
        (of_task, shots, _requests(of_task, shots, tokenizer, plan))
        for of_task in tasks
        for shots in plan.shots
    ]
    if "perplexity" in plan.parts:
        _perplexity(results, model, text, plan)
    for of_task, shots, requests in prepared:
        _task(results, model, of_task.task, shots, requests, plan)
    if "recall" in plan.parts:
        total = 2 * plan.trials * sum(plan.distances)
        with progress_bar("recall", total) as progress:
            results.recall = recall(
                model,
                np.concatenate([tokens[1:] for tokens in text.tokens]),
                bos_id=tokenizer.bos_id,
                vocab_size=tokenizer.vocab_size,
                distances=plan.distances,
                trials=plan.trials,
                seed=plan.seed,
                batch_size=plan.batch_size,
                progress=progress,
            )
    return results


def _perplexity(results: Results, model: LanguageModel, text: Text, plan: Plan) -> None:
    lengths = [len(tokens) - 1 for tokens in text.tokens]
    for protocol in plan.protocols:
        stride = plan.stride if protocol == "sliding" else None
        if protocol == "stateful":
            total = sum(lengths)
        else:
            each = (windows(length, plan.window_length, stride) for length in lengths)
            total = sum(window.stop - window.start for found in each for window in found)
        with progress_bar(protocol, total) as progress:
            if protocol == "stateful":
                nll = stateful_nll(
                    model, text.tokens, batch_size=plan.batch_size, progress=progress
                )
            else:
                nll = window_nll(
                    model,
                    text.tokens,
                    window_length=plan.window_length,
                    stride=stride,
                    batch_size=plan.batch_size,
                    progress=progress,
                )
        results.nll[protocol] = nll
    if plan.context_lengths:
        results.last_nll = last_tokens_nll(
            model, text.tokens, plan.context_lengths, batch_size=plan.batch_size
        )


def _requests(of_task: TaskRows, shots: int, tokenizer: Tokenizer, plan: Plan) -> TaskRequests:
    task, rows = of_task.task, of_task.rows
    examples = [()] * len(rows.rows)
    if shots:
        examples = draw_shots(task, rows, of_task.pool, shots, plan.shot_mode, plan.seed)
    requests = task_requests(task, rows, examples, tokenizer, plan.variant)
    for number, pair in enumerate(requests.pairs):
        if plan.max_length is not None and len(pair.continuation) > plan.max_length:
            raise ConfigError(
                f"{rows.names[number // task.choices]}: choice {number % task.choices} of "
                f"{task.name} has {len(pair.continuation)} tokens, more than "
                f"max_length={plan.max_length}"
            )
    return requests


def _task(
    results: Results,
    model: LanguageModel,
    task: Task,
    shots: int,
    requests: TaskRequests,
    plan: Plan,
) -> None:
    trie = PrefixTrie(requests.pairs, plan.max_length)
    with progress_bar(f"{task.name}, {shots} shots", trie.tokens) as progress:
        scores = score_trie(model, trie, batch_size=plan.batch_size, progress=progress)
    results.tasks[task.name, shots] = task_result(task, requests, scores)
    results.read[task.name, shots] = trie.tokens, trie.tokens_alone
    results.truncated += trie.truncated


@contextmanager
def progress_bar(description: str, total: int):
    """A bar of tokens, if stderr is a terminal; gives what to call with the number of new ones."""
    from tqdm import tqdm

    with tqdm(
        desc=description,
        total=total,
        unit="token",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=None,
    ) as bar:
        update: Callable[[int], object] = bar.update
        yield update
