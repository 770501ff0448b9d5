"""Measures on a sample how much text is lost when a corpus is encoded and decoded.

The tokenizer of another model may drop characters that it has no token for, or that its normaliser
removes. Text that is dropped costs nothing to predict, so bits per byte look better than they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from retnet_jax.data.tokenizers import Tokenizer
from retnet_jax.errors import ConfigError

_MOST_LOST = 0.5  # share of the characters; with more the tokenizer is not for these texts


def measure_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Measures what texts lose when they are encoded and decoded, for the manifest of a store.

    Returns:
      "documents": number of texts; "changed": of those that differ after decoding; "empty": of
      those without a token; "characters": number of characters; "lost": share of the characters
      that are missing after decoding, regardless of order; "most_lost": the most frequent of them;
      "tokens": number of tokens; "unknown": share of the tokens that are the unknown token.
    """
    lost: Counter[str] = Counter()
    characters = tokens = unknown = changed = empty = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        known = [i for i in ids if i != tokenizer.unknown_id]
        decoded = tokenizer.decode(known)
        lost += Counter(text) - Counter(decoded)
        characters += len(text)
        tokens += len(ids)
        unknown += len(ids) - len(known)
        changed += decoded != text
        empty += not ids
    return {
        "documents": len(texts),
        "changed": changed,
        "empty": empty,
        "characters": characters,
        "lost": lost.total() / max(1, characters),
        "most_lost": dict(lost.most_common(5)),
        "tokens": tokens,
        "unknown": unknown / max(1, tokens),
    }


def describe_round_trip(found: dict[str, Any] | None) -> str:
    """A sentence on the losses; "" if there are none, or an old store has not measured them."""
    if found is None or not found["changed"]:
        return ""
    empty = f", {found['empty']} documents have no token" if found["empty"] else ""
    most = ", ".join(f"{text!r} {count} times" for text, count in found["most_lost"].items())
    return (
        f"{found['changed']} of {found['documents']} documents change when they are encoded and "
        f"decoded: {found['lost']:.2%} of {found['characters']:,} characters are lost"
        f"{f' ({most})' if most else ''}, {found['unknown']:.2%} of the tokens are unknown"
        f"{empty}"
    )


def check_round_trip(found: dict[str, Any], tokenizer: str) -> None:
    """Raises `ConfigError` if the tokens of `data.tokenizer` lose most of the text."""
    if found["lost"] > _MOST_LOST:
        raise ConfigError(
            f"data.tokenizer={tokenizer!r} is not suitable for these texts: "
            f"{describe_round_trip(found)}; "
            "use one that has tokens for all bytes, such as data.tokenizer='bpe'"
        )
