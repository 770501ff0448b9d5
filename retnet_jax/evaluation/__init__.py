"""Evaluation of a model: perplexity by three protocols, tasks, and recall.

run.py            `evaluate`: from a model or a directory to the record of its results
plan.py           options of an evaluation; measure.py: evaluates one model by a plan
results.py        results of a model, and differences of two models
tables.py         results as tables; record.py: results as JSON

perplexity.py     -log p of every token of documents
held_out_texts.py the documents; compressors.py: gzip and xz on them, as a baseline
statistics.py     perplexities, loss by position, standard errors, paired differences

tasks.py          the seven tasks of the paper; task_rows.py: reads their data
task_requests.py  task rows to requests, scores to accuracies
prefix_trie.py    requests with shared prefixes; scoring.py: their log-likelihoods
reading_order.py  batches of a trie's nodes; rows_of_branches.py: parts of a trie in one row
recall_probes.py  synthetic probes of the model's memory
harness.py        adapter for lm-evaluation-harness
"""

from retnet_jax.evaluation.perplexity import stateful_nll, window_nll
from retnet_jax.evaluation.plan import Plan
from retnet_jax.evaluation.prefix_trie import PrefixTrie, Request
from retnet_jax.evaluation.recall_probes import recall
from retnet_jax.evaluation.run import evaluate
from retnet_jax.evaluation.scoring import Score, score, score_trie
from retnet_jax.evaluation.tasks import TASKS

__all__ = [
    "TASKS",
    "Plan",
    "PrefixTrie",
    "Request",
    "Score",
    "evaluate",
    "recall",
    "score",
    "score_trie",
    "stateful_nll",
    "window_nll",
]
