"""Decides what is held out from training: whole documents, or the end of each document."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from retnet_jax.data.sources import Document


def parts_of(
    documents: Iterable[Document], share: float, held_out_by: str
) -> Iterator[tuple[str, Document]]:
    """What a store has of some documents, with the split of each part.

    By "document", whole documents are held out. By "tail", the end of each document is held out. It
    has about `share` of the bytes and begins at the start of a line, sentence or word. The two
    parts of a text together are the text. A text too short to be divided is one part.

    Args:
      documents: The documents.
      share: `data.held_out`.
      held_out_by: "document" or "tail".
    """
    for document in documents:
        if held_out_by == "document":
            yield split_of(document, share), document
            continue
        cut = start_of_tail(document.text, share)
        beginning, tail = document.text[:cut], document.text[cut:]
        if beginning and tail:
            yield "train", Document(document.name, beginning)
            yield "held_out", Document(f"{document.name} (its end)", tail)
        else:
            yield "train" if beginning else "held_out", document


def describe_tail(manifest: dict[str, Any]) -> str:
    """A sentence on a store whose held-out texts are the ends of documents; "" for other stores."""
    if manifest.get("held_out_by") != "tail":
        return ""
    options = manifest["options"]
    few = "there are too few documents to hold out whole ones, so "
    return (
        f"{few if options['data.held_out_by'] == 'auto' else ''}the last "
        f"{100 * options['data.held_out']:.3g}% of each document is held out from training"
    )


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


def start_of_tail(text: str, share: float) -> int:
    """The character at which the held-out end of a text begins.

    It is the start of a line that leaves between half and one and a half times `share` of the bytes
    to the end; if no line starts there, of a sentence; otherwise of a word; otherwise the character
    at exactly `share`. The nearest to `share` is taken. 0 or the length of the text, if one part
    would be empty or only white space.
    """
    body = text.rstrip()
    data = body.encode("utf-8")
    exact = data[: len(data) - round(share * len(data))]
    # Characters are not cut: bytes of an incomplete one are ignored.
    ideal = len(exact.decode("utf-8", errors="ignore"))
    reach = min(ideal, len(body) - ideal) // 2
    first, last = ideal - reach, ideal + reach
    cut = ideal
    for border in _BORDERS:
        places = [first + found.end() for found in border.finditer(text[first:last])]
        if places:
            cut = min(places, key=lambda place: abs(place - ideal))
            break
    if not text[cut:].strip():
        return len(text)
    return cut if text[:cut].strip() else 0


_CLOSING = r"""["'\u201d\u2019\u00bb\u300d\u300f)\]]*"""  # quotation marks, brackets
_BORDERS = (
    re.compile(r"\n+"),
    # A full stop of Chinese or Japanese needs no space after it.
    re.compile(rf"[.!?\u2026]{_CLOSING}\s+|[\u3002\uff01\uff1f]{_CLOSING}"),
    re.compile(r"\s+"),
)
