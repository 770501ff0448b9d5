"""Text that comes token by token, from any tokenizer and with any stop strings."""

import itertools

import pytest
from hypothesis import strategies as st
from properties import holds_for, sizes
from test_pretrained_tokenizer import cl100k, gpt, llama, sentencepiece

from retnet_jax.data.tokenizers import ByteTokenizer, TextStream, train_bpe
from retnet_jax.generation.texts import _Row


def byte(directory):
    return ByteTokenizer()


def bpe(directory):
    return train_bpe(["größer → 😀 naïve 你好 return"] * 9, 270)


KINDS = pytest.mark.parametrize("make", [llama, gpt, sentencepiece, cl100k, byte, bpe])
CHARACTERS = "ab cd é😀你\ufffd\n\t▁ ወ\u0301\u200d\0"


def ids_of(tokenizer):
    """Ids of texts, and any ids at all, which are those of no text."""
    known = [i for i in range(min(tokenizer.vocab_size, 400)) if tokenizer.token(i) is not None]
    texts = st.text(CHARACTERS, max_size=120).map(tokenizer.encode)
    known.append(tokenizer.bos_id)
    return st.one_of(texts, st.lists(st.sampled_from(known), max_size=200))


def cut(ids, cuts):
    places = sorted(place % (len(ids) + 1) for place in cuts)
    return [ids[a:b] for a, b in itertools.pairwise([0, *places, len(ids)])]


CUTS = st.one_of(st.lists(st.integers(0, 200), max_size=6), st.just(range(201)))


@KINDS
@sizes(60, 2000)
def test_streamed_text_is_the_decoded_text(most, make, tmp_path):
    tokenizer = make(tmp_path)

    @holds_for(most, ids=ids_of(tokenizer), cuts=CUTS)
    def same(ids, cuts):
        stream = TextStream(tokenizer)
        text = "".join(stream.add(list(part)) for part in cut(ids, cuts)) + stream.rest()
        assert text == tokenizer.decode(ids)


@st.composite
def texts_and_stops(draw):
    """Stop strings, some in the middle of others, and a text of them and of parts of them."""
    stops = draw(st.lists(st.text("abcé😀\ufffd", min_size=1, max_size=5), max_size=2))
    stops += [stop[1:-1] for stop in stops if len(stop) > 2 and draw(st.booleans())]
    parts = [*stops, *(stop[:-1] for stop in stops), *(stop[1:] for stop in stops), "a", "é", "x"]
    return "".join(draw(st.lists(st.sampled_from(parts), max_size=12))), stops


@KINDS
@sizes(100, 2000)
def test_where_a_text_stops_does_not_depend_on_how_it_comes(most, make, tmp_path):
    """At the stop string that is complete first; of several that end there, at the longest."""
    tokenizer = make(tmp_path)

    @holds_for(most, text_and_stops=texts_and_stops(), cuts=CUTS, torn=st.booleans())
    def same(text_and_stops, cuts, torn):
        text, stops = text_and_stops
        ids = tokenizer.encode(text)
        ids = [*ids[:-1], tokenizer.end_id, *ids[:5]] if torn else ids
        row, given = _Row(TextStream(tokenizer), stops), ""
        for part in cut(ids, cuts):
            given += row.add(list(part), [0.0] * len(part), tokenizer.end_ids)
        given += row.rest()
        ends = [place for place, i in enumerate(ids) if i in tokenizer.end_ids]
        whole = tokenizer.decode(ids[: ends[0]] if ends else ids)
        found = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
        end, length = min(found, default=(len(whole), 0))
        assert given == row.continuation.text == whole[: end + length]
        expected = "stop" if found else "end" if ends else "length"
        assert row.continuation.ended_by == expected
