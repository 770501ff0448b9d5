"""Text in parts: tokens that are decoded as they come, and long texts that are encoded in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retnet_jax.data.tokenizers.base import Tokenizer


class TextStream:
    """The text of tokens that come piece by piece.

    Together the pieces are what `decode(before + new)` has more than `decode(before)`. A character
    that is split over several tokens comes with the last of them, also where it began in `before`.
    The text of a token can depend on the one before it, so the last few tokens are decoded again.

    Args:
      tokenizer: what the ids are of.
      before: ids in front of the first piece; their text is not given again.

    Attributes:
      context: how many tokens are decoded again with the ones after them.
    """

    context = 16

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids, self._given = self._last(before)

    def add(self, ids: list[int]) -> str:
        """The text that these further ids complete."""
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
        """The text that was held back, for when no more ids come."""
        text = self._tokenizer.decode(self._ids)
        return text[_common(self._given, text) :]

    def _last(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """The last ids and their text, which is not empty unless that of all of them is."""
        count = self.context
        while True:
            last = list(ids)[-count:]
            text = self._tokenizer.decode(last)
            if text or len(last) == len(ids):
                return last, text
            count *= 2


# A character of UTF-8 has at most four bytes; of one that is not complete three can be there.
_TORN = 3


def _without_torn_end(text: str) -> str:
    """The text without what may be the beginning of a character."""
    whole = text.rstrip("\ufffd")
    return text[: max(len(whole), len(text) - _TORN)]


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def text_parts(text: str, most: int) -> Iterator[str]:
    """A text in parts of at most `most` characters, in order.

    It is cut in front of a space between two words, where byte-level BPE and cl100k_base cut too,
    so the tokens of the parts are those of the whole; but where half of `most` has no such place,
    anywhere. A tokenizer that puts a space in front of each text puts one in front of each part.
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
