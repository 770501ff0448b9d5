"""How much of a corpus comes back from its tokens, measured on a sample.

A tokenizer of another model may drop what it has no token for, or what its normaliser takes out. It
costs nothing to predict what is not there: such a loss makes bits per byte look better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from retnet_jax.data.tokenizers import Tokenizer
from retnet_jax.errors import ConfigError

_MOST_LOST = 0.5  # of the characters; with more the tokenizer is one for other texts


def measure_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """What is lost of some texts when they are encoded and decoded, for the manifest of a store.

    Returns:
      "documents", those that are "changed" and those without a token, "empty"; "characters", and
      those that are "lost", whatever their order: the share of them that do not come back, and the
      "most_lost"; "tokens", and the share of them that are "unknown".
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
    """One sentence on what was lost; "" if nothing was, or a store of before does not say."""
    if found is None or not found["changed"]:
        return ""
    empty = f", {found['empty']} documents have no token" if found["empty"] else ""
    most = ", ".join(f"{count} times {text!r}" for text, count in found["most_lost"].items())
    return (
        f"{found['changed']} of {found['documents']} documents do not come back from their tokens "
        f"as they were: {found['lost']:.2%} of {found['characters']:,} characters are lost"
        f"{f' ({most})' if most else ''}, {found['unknown']:.2%} of the tokens are unknown"
        f"{empty}"
    )


def check_round_trip(found: dict[str, Any], tokenizer: str) -> None:
    """Raises `ConfigError` if little of the texts is left in the tokens of `data.tokenizer`."""
    if found["lost"] > _MOST_LOST:
        raise ConfigError(
            f"data.tokenizer={tokenizer!r} is not for these texts: {describe_round_trip(found)}; "
            "use one that has tokens for all bytes, such as data.tokenizer='bpe'"
        )
