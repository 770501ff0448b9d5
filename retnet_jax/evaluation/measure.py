"""Evaluates one model by a plan."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
from retnet_jax.evaluation.plan import Plan
from retnet_jax.evaluation.prefix_trie import PrefixTrie
from retnet_jax.evaluation.recall_probes import RecallResult, recall
from retnet_jax.evaluation.results import LAST_TOKENS, Results, TokensRead
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
from retnet_jax.parallel import processes
from retnet_jax.waiting import showing


@dataclass(frozen=True)
class TaskRows:
    """A task with the rows to evaluate, and the rows from which examples are drawn."""

    task: Task
    rows: Rows
    pool: Rows | None  # None: no examples are needed


def evaluate_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: Text | None,
    tasks: Sequence[TaskRows],
    plan: Plan,
) -> Results:
    """Evaluates a model by a plan, with progress bars on a terminal.

    Args:
      model: Model on the current mesh, if one is set.
      tokenizer: Tokenizer of the model.
      text: Documents for perplexity and for the filler of recall probes, as tokens of `tokenizer`.
      tasks: Rows of the tasks, from `read_tasks`.
      plan: Options of the evaluation.

    Raises:
      ConfigError: for input that the model cannot process.
    """
    results = Results(text, apart=Results(text.apart) if text and text.apart else None)
    perplexity = "perplexity" in plan.parts
    if perplexity and plan.context_lengths:
        check_contexts(results.documents.tokens, plan.context_lengths)
    # All requests are made first, so that an unusable row is found before anything is computed.
    prepared = [
        (of_task, shots, _requests(of_task, shots, tokenizer, plan))
        for of_task in tasks
        for shots in plan.shots
    ]
    for protocol in plan.protocols if perplexity else ():
        # Together, because a few long documents do not fill a batch.
        tokens = results.documents.tokens
        apart = results.apart.documents.tokens if results.apart else []
        nll = _nll(model, [*tokens, *apart], protocol, plan)
        results.nll[protocol] = nll[: len(tokens)]
        if results.apart:
            results.apart.nll[protocol] = nll[len(tokens) :]
    if perplexity and plan.context_lengths:
        results.last_nll.update(
            last_tokens_nll(
                model,
                results.documents.tokens,
                plan.context_lengths,
                scored=LAST_TOKENS,
                batch_size=plan.batch_size,
            )
        )
    for of_task, shots, requests in prepared:
        key = of_task.task.name, shots
        results.tasks[key], results.read[key] = _task(model, of_task.task, shots, requests, plan)
    if "recall" in plan.parts:
        results.recall.extend(_recall(model, tokenizer, results.documents, plan))
    return results


def read_tasks(plan: Plan) -> list[TaskRows]:
    """Reads the rows of the plan's tasks, and those for examples if the plan has any.

    Raises:
      ConfigError: if no task data is given, there are too few examples, or as `read_rows`.
    """
    if "tasks" not in plan.parts:
        return []
    if plan.task_data is None:
        raise ConfigError(
            "the tasks need --data (task_data in Python): a directory with TASK/SPLIT.jsonl, such "
            f"as {plan.tasks[0]}/{TASKS[plan.tasks[0]].split}.jsonl, or hf, or tfds"
        )
    found = []
    for task in map(TASKS.__getitem__, plan.tasks):
        rows = read_rows(task, task.split, plan.task_data)
        pool = None
        if any(plan.shots):
            same = task.shots_from == task.split
            pool = rows if same else read_rows(task, task.shots_from, plan.task_data)
            draw_shots(task, rows, pool, max(plan.shots))  # raises if there are too few rows
        found.append(TaskRows(task, rows, pool))
    return found


def _nll(
    model: LanguageModel, documents: Sequence[np.ndarray], protocol: str, plan: Plan
) -> list[np.ndarray]:
    """The -log p of each document's tokens by a protocol."""
    lengths = [len(tokens) - 1 for tokens in documents]
    if protocol == "stateful":
        with progress_bar(protocol, sum(lengths)) as progress:
            return stateful_nll(model, documents, batch_size=plan.batch_size, progress=progress)
    stride = plan.stride if protocol == "sliding" else None
    each = (windows(length, plan.window_length, stride) for length in lengths)
    total = sum(window.stop - window.start for found in each for window in found)
    with progress_bar(protocol, total) as progress:
        return window_nll(
            model,
            documents,
            window_length=plan.window_length,
            stride=stride,
            batch_size=plan.batch_size,
            progress=progress,
        )


def _requests(of_task: TaskRows, shots: int, tokenizer: Tokenizer, plan: Plan) -> TaskRequests:
    task, rows = of_task.task, of_task.rows
    examples = [()] * len(rows.rows)
    if shots:
        assert of_task.pool is not None  # `read_tasks` reads it if the plan has examples
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
    model: LanguageModel, task: Task, shots: int, requests: TaskRequests, plan: Plan
) -> tuple[TaskResult, TokensRead]:
    trie = PrefixTrie(requests.pairs, plan.max_length)
    with progress_bar(f"{task.name}, {shots} shots", trie.tokens) as progress:
        scores = score_trie(model, trie, batch_size=plan.batch_size, progress=progress)
    read = TokensRead(trie.tokens, trie.tokens_unshared, trie.truncated)
    return task_result(task, requests, scores), read


def _recall(
    model: LanguageModel, tokenizer: Tokenizer, text: Text, plan: Plan
) -> list[RecallResult]:
    total = 2 * plan.trials * sum(plan.distances)
    with progress_bar("recall", total) as progress:
        return recall(
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


@contextmanager
def progress_bar(description: str, total: int):
    """Shows the time passed, and on a terminal a progress bar of tokens.

    Yields the function that advances the bar.
    """
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
        with showing(f"evaluating {description}", processes.is_first()):
            yield update
