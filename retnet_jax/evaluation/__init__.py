"""How good a model is: perplexity by three protocols, tasks, and what it can recall.

prefix_trie.py  requests with what they share; scoring.py reads it and gives log-likelihoods
tasks.py        the seven tasks of the paper as data; task_data.py their rows; accuracy.py results
recall.py       synthetic probes of the memory
perplexity.py   -log p of every token of documents
statistics.py   perplexities, positions, standard errors, paired differences
texts.py        the documents; compressors.py: the same through gzip and xz, for scale
suite.py        what is evaluated of a model, and its results; report.py, tables.py: as tables
harness.py      the model behind the interface of lm-evaluation-harness
"""

from retnet_jax.evaluation.compressors import compressed_bits_per_byte
from retnet_jax.evaluation.held_out_texts import Text, given_text, held_out_text
from retnet_jax.evaluation.perplexity import (
    last_tokens_nll,
    stateful_nll,
    window_nll,
    windows,
)
from retnet_jax.evaluation.prefix_trie import PrefixTrie, Request
from retnet_jax.evaluation.recall_probes import RecallResult, recall
from retnet_jax.evaluation.record import as_json, differences_as_json, tables
from retnet_jax.evaluation.run import (
    PARTS,
    PROTOCOLS,
    Plan,
    Results,
    TaskRows,
    evaluate_model,
    read_tasks,
)
from retnet_jax.evaluation.scoring import Score, score, score_trie
from retnet_jax.evaluation.statistics import (
    Difference,
    PerplexityReport,
    PositionBucket,
    paired_difference,
    perplexity_report,
    position_buckets,
    ratio_standard_error,
    standard_error,
)
from retnet_jax.evaluation.task_requests import (
    SHOT_MODES,
    TaskRequests,
    TaskResult,
    draw_shots,
    encode_pairs,
    task_requests,
    task_result,
)
from retnet_jax.evaluation.task_rows import HUBS, Rows, read_rows
from retnet_jax.evaluation.tasks import TASKS, VARIANTS, Question, Task

__all__ = [
    "HUBS",
    "PARTS",
    "PROTOCOLS",
    "SHOT_MODES",
    "TASKS",
    "VARIANTS",
    "Difference",
    "PerplexityReport",
    "Plan",
    "PositionBucket",
    "PrefixTrie",
    "Question",
    "RecallResult",
    "Request",
    "Results",
    "Rows",
    "Score",
    "Task",
    "TaskRequests",
    "TaskResult",
    "TaskRows",
    "Text",
    "as_json",
    "compressed_bits_per_byte",
    "differences_as_json",
    "draw_shots",
    "encode_pairs",
    "evaluate_model",
    "given_text",
    "held_out_text",
    "last_tokens_nll",
    "paired_difference",
    "perplexity_report",
    "position_buckets",
    "ratio_standard_error",
    "read_rows",
    "read_tasks",
    "recall",
    "score",
    "score_trie",
    "standard_error",
    "stateful_nll",
    "tables",
    "task_requests",
    "task_result",
    "window_nll",
    "windows",
]
