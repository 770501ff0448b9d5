"""Decides which documents are held out from training."""

import hashlib

from retnet_jax.data.sources import Document


def split_of(document: Document, share: float) -> str:
    """The split of a document: "train" or "held_out"."""
    return "held_out" if is_held_out(document.name, share) else "train"


def is_held_out(name: str, share: float) -> bool:
    """Whether a document is held out, which depends only on its name and the share.

    A document that is held out at one share is held out at every larger share.
    """
    return hash_of_name(name) < share


def hash_of_name(name: str) -> float:
    """A hash that is uniform in [0, 1)."""
    # A file name that is not UTF-8 reaches Python as surrogates.
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
