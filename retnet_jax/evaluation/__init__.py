"""How good a model is: perplexity by three protocols, tasks, and what it can recall.

run.py            evaluate(): from a model or a directory to the record of its results
plan.py           what is evaluated, and how; measure.py: one model, as planned
results.py        what came out, and how two models differ
tables.py         results for people; record.py: results as JSON

perplexity.py     -log p of every token of documents
held_out_texts.py the documents; compressors.py: the same through gzip and xz, for scale
statistics.py     perplexities, positions, standard errors, paired differences

tasks.py          the seven tasks of the paper as data; task_rows.py: their rows
task_requests.py  rows as requests to a model, scores as accuracy
prefix_trie.py    requests with what they share; scoring.py reads it and gives log-likelihoods
recall_probes.py  synthetic probes of the memory
harness.py        the model behind the interface of lm-evaluation-harness
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
