"""How good a model is on text that it was not trained on.

perplexity.py    -log p of documents by two protocols, and what is reported of it
compressors.py   the same text through gzip and xz, for scale
"""

from retnet_jax.evaluation.compressors import compressed_bits_per_byte
from retnet_jax.evaluation.perplexity import (
    PerplexityReport,
    document_nll_stateful,
    document_nll_window,
    perplexity_report,
    ratio_standard_error,
)

__all__ = [
    "PerplexityReport",
    "compressed_bits_per_byte",
    "document_nll_stateful",
    "document_nll_window",
    "perplexity_report",
    "ratio_standard_error",
]
