"""From documents to batches.

    sources.py      a corpus in pieces, and their documents; formats.py: files and data sets
    tokenizer.py    text <-> token ids: bytes, or a byte-level BPE trained here
    pretrained_tokenizer.py  those that came with a model
    token_store.py  a directory that holds all tokens of a corpus, split into train and held out
    store_builder.py  writes it, in parallel
    windows.py      how its stream is cut into windows, and in which order they come
    pipeline.py     batches of windows addressed by (seed, step)
    files.py        local files, and those on gs:// and the like

A document begins with the id of `<bos>`; where one ends and the next begins is seen again in the
`segment_ids` of a batch. `tokenizers`, `grain`, `tqdm` and what reads a format are imported where
they are used.
"""

from retnet_jax.data.batches import (
    Batch,
    BatchStream,
    PlacedBatches,
    number_of_windows,
)
from retnet_jax.data.bpe_sample import train_tokenizer
from retnet_jax.data.build import build_store
from retnet_jax.data.sources import Document, Skipped, read_documents
from retnet_jax.data.stores import Stores, open_or_build, open_stores
from retnet_jax.data.token_store import Split, TokenStore, check_files, open_store
from retnet_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    TextStream,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "BatchStream",
    "ByteTokenizer",
    "Document",
    "PlacedBatches",
    "Skipped",
    "Split",
    "Stores",
    "TextStream",
    "TokenStore",
    "Tokenizer",
    "build_store",
    "check_files",
    "has_tokenizer",
    "load_tokenizer",
    "number_of_windows",
    "open_or_build",
    "open_store",
    "open_stores",
    "read_documents",
    "train_bpe",
    "train_tokenizer",
]
