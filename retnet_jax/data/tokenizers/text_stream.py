"""Text in parts: tokens that are decoded as they come, and long texts that are encoded in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retnet_jax.data.tokenizers.base import Tokenizer


class TextStream:
    """The text of tokens that come piece by piece.

    A character that is split over several tokens comes with the last of them. The text of a token
    can depend on the one before it, so the last few tokens are decoded again.

    Args:
      tokenizer: what the ids are of.
      before: ids in front of the first piece; their text is not given again.

    Attributes:
      context: how many tokens are decoded again with the ones after them.
    """

    context = 16

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(before)[-self.context :]
        # In characters, without a torn one at the end.
        self._shown = len(tokenizer.decode(self._ids).rstrip("\ufffd"))

    def add(self, ids: list[int]) -> str:
        """The text that these further ids complete."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        known = len(text.rstrip("\ufffd"))
        new = text[self._shown : known]
        self._shown = max(self._shown, known)
        if known == len(text) and len(self._ids) > 4 * self.context:
            self._ids = self._ids[-self.context :]
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def copy(self) -> TextStream:
        """An independent stream at the same position."""
        other = TextStream(self._tokenizer)
        other._ids, other._shown = list(self._ids), self._shown
        return other

    def rest(self) -> str:
        """The text that was held back, for when no more ids come."""
        return self._tokenizer.decode(self._ids)[self._shown :]


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
