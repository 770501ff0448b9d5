"""From documents to batches.

    sources.py      documents: (name, text) pairs, read in the same order every time
    tokenizer.py    text <-> token ids: bytes, or a byte-level BPE trained here
    pretrained_tokenizer.py  those that came with a model
    token_store.py  a directory that holds all tokens of a corpus, split into train and held out
    pipeline.py     windows of the token stream, and batches of windows addressed by (seed, step)

A document begins with the id of `<bos>`; where one ends and the next begins is seen again in the
`segment_ids` of a batch. `tokenizers`, `grain` and `tqdm` are imported where they are used.
"""

from retnet_jax.data.pipeline import Batch, BatchStream, number_of_windows, window
from retnet_jax.data.pretrained_tokenizer import has_tokenizer, load_tokenizer
from retnet_jax.data.sources import Document, read_documents
from retnet_jax.data.token_store import Split, TokenStore, build_store, open_or_build, open_store
from retnet_jax.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    TextStream,
    Tokenizer,
    train_bpe,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "BatchStream",
    "ByteTokenizer",
    "Document",
    "Split",
    "TextStream",
    "TokenStore",
    "Tokenizer",
    "build_store",
    "has_tokenizer",
    "load_tokenizer",
    "number_of_windows",
    "open_or_build",
    "open_store",
    "read_documents",
    "train_bpe",
    "window",
]
