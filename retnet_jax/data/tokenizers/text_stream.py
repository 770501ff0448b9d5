"""Decodes tokens as they are generated, and cuts long texts into parts for encoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retnet_jax.data.tokenizers.base import Tokenizer


class TextStream:
    """The text of tokens that arrive in pieces.

    All returned texts together are what `decode(before + new)` adds to `decode(before)`. A
    character that is split over several tokens is returned with the last of them, even if it began
    in `before`. The text of a token can depend on the token before it, so the last few tokens are
    decoded again.

    Args:
      tokenizer: Tokenizer of the ids.
      before: Ids before the first piece; their text is not returned.

    Attributes:
      context: Number of tokens that are decoded again with the tokens after them.
    """

    context = 16

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids, self._given = self._last(before)

    def add(self, ids: list[int]) -> str:
        """The text that is completed by more ids."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        certain = _without_torn_end(text)
        if self._given.startswith(certain):
            return ""
        new = certain[_common(self._given, certain) :]
        self._given = certain
        if len(self._ids) > 4 * self.context:
            held = len(text) - len(certain)
            self._ids, self._given = self._last(self._ids)
            self._given = self._given[: len(self._given) - held]
        return new

    def copy(self) -> TextStream:
        """An independent stream at the same position."""
        other = TextStream(self._tokenizer)
        other._ids, other._given = list(self._ids), self._given
        return other

    def rest(self) -> str:
        """The text that is still held back, when there are no more ids."""
        text = self._tokenizer.decode(self._ids)
        return text[_common(self._given, text) :]

    def _last(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """The last ids and their text; enough ids that it is not empty, unless all text is."""
        count = self.context
        while True:
            last = list(ids)[-count:]
            text = self._tokenizer.decode(last)
            if text or len(last) == len(ids):
                return last, text
            count *= 2


# A UTF-8 character has at most four bytes, so an incomplete one has at most three.
_TORN = 3


def _without_torn_end(text: str) -> str:
    """The text without an incomplete character at its end."""
    whole = text.rstrip("\ufffd")
    return text[: max(len(whole), len(text) - _TORN)]


def _common(a: str, b: str) -> int:
    """The length of the common beginning of two texts."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def text_parts(text: str, most: int) -> Iterator[str]:
    """A text in parts of at most `most` characters, in order.

    The text is cut before a space between two words, where byte-level BPE and cl100k_base cut too,
    so the parts have the same tokens as the whole. If there is no such place in half of `most`
    characters, it is cut anywhere. A tokenizer that adds a space before a text adds one before each
    part.
    """
    start = 0
    while len(text) - start > most:
        least, cut = start + most // 2, start + most
        while (cut := text.rfind(" ", least, cut)) > 0:
            if text[cut - 1].isalnum() and text[cut + 1].isalnum():
                break
        cut = cut if cut > start else start + most
        yield text[start:cut]
        start = cut
    yield text[start:]
