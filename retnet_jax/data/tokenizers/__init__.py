"""Text to token ids and back.

base.py         the interface, and the names of a tokenizer's files
byte_level.py   bytes, and byte-level BPE trained by this project
pretrained.py   tokenizers of other models
loading.py      loads a tokenizer of any kind from a directory
text_stream.py  decodes and encodes text in parts
"""

from retnet_jax.data.tokenizers.base import SAVED_FILES, TOKENIZER_FILES, Tokenizer
from retnet_jax.data.tokenizers.byte_level import BPETokenizer, ByteTokenizer, train_bpe
from retnet_jax.data.tokenizers.loading import has_tokenizer, load_tokenizer
from retnet_jax.data.tokenizers.text_stream import TextStream, text_parts

__all__ = [
    "SAVED_FILES",
    "TOKENIZER_FILES",
    "BPETokenizer",
    "ByteTokenizer",
    "TextStream",
    "Tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "text_parts",
    "train_bpe",
]
