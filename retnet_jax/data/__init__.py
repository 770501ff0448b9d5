"""From documents to batches.

sources.py        reads documents; corpus_files.py finds their files, formats.py reads records
tokenizers/       text to token ids and back
split.py          decides which documents, or ends of documents, are held out
token_store.py    a directory with all tokens of a corpus, in two splits; block_digests.py verifies
                  the bytes that are read, store_problems.py a whole store
build.py          builds a store, with build_plan.py, survey.py, bpe_sample.py,
                  round_trip.py, shard_writer.py, workers.py and store_options.py
stores.py         opens the stores of a run, and builds a store that does not exist
windows.py        how a store is cut into windows, and the order of the windows
batches.py        batches of windows addressed by (seed, step), on the host or on a mesh

A document begins with the BOS id. The `segment_ids` of a batch number the documents of each row.
`tokenizers`, `grain`, `tqdm` and the readers of formats are imported where they are used.
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
