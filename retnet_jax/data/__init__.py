"""From documents to batches.

sources.py        the documents of a corpus; corpus_files.py finds files, formats.py reads them
tokenizers/       text to token ids and back
split.py          which documents are held out
token_store.py    a directory with all tokens of a corpus, in two splits; block_digests.py verifies
                  what is read of it, store_problems.py all of it
build.py          builds it, with build_plan.py, survey.py, bpe_sample.py, round_trip.py,
                  shard_writer.py, workers.py and store_options.py
stores.py         the stores of a run: opened, or built where they are not there
windows.py        how a store is cut into windows, and in which order they come
batches.py        batches of windows addressed by (seed, step), on the host or on a mesh

A document begins with the BOS id. Where one ends and the next begins is seen again in the
`segment_ids` of a batch. `tokenizers`, `grain`, `tqdm` and what reads a format are imported where
they are used.
"""

from retnet_jax.data.batches import (
    Batch,
    BatchStream,
    PlacedBatches,
    number_of_windows,
)
from retnet_jax.data.build import build_store
from retnet_jax.data.stores import Stores, open_stores
from retnet_jax.data.token_store import Split, open_store
from retnet_jax.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "BatchStream",
    "PlacedBatches",
    "Split",
    "Stores",
    "Tokenizer",
    "build_store",
    "load_tokenizer",
    "number_of_windows",
    "open_store",
    "open_stores",
]
