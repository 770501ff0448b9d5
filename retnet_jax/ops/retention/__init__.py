"""Retention: one linear recurrence with a fixed decay for each head.

For the tokens n = 0, 1, ... of a document, with S_-1 the initial state (Eq. 1 to 6 of
arXiv 2307.08621, with the rotation already in q and k):

    S_n = gamma S_{n-1} + k_n^T v_n        y_n = q_n S_n = sum_{m<=n} gamma^(n-m) (q_n . k_m) v_m

`retention` computes it in parallel, chunk by chunk, or token by token: three forms with the same
outputs, final state and gradients. Scaling, normalisers and gates are left to the caller. On a mesh
that splits positions (`jax.set_mesh`, axis "seq") the chunkwise form uses all devices of that axis.
"""

from retnet_jax.ops.retention.api import FORMS, IMPLEMENTATIONS, explain_choice, retention
from retnet_jax.ops.retention.clamp import score_clamp
from retnet_jax.ops.retention.decay import log_decay, row_normalizer
from retnet_jax.ops.retention.document_index import number_documents, positions
from retnet_jax.ops.retention.on_mesh import SplitDocuments, split_documents

__all__ = [
    "FORMS",
    "IMPLEMENTATIONS",
    "SplitDocuments",
    "explain_choice",
    "log_decay",
    "number_documents",
    "positions",
    "retention",
    "row_normalizer",
    "score_clamp",
    "split_documents",
]
