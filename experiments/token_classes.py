"""Classes of tokens by what stands in their context, and distances to what is repeated.

Every token that is scored is in one of the classes:

    new          it does not occur in its context
    seen         it occurs in its context, but never after the token before it
    common pair  the token before it and it occur in its context as a pair, and the pair is common
                 in the training documents, so that the parameters can know it
    rare pair    as before, but the pair is rare in the training documents: to predict it, a model
                 must recall what followed the token before it

The last class is "associative recall hits" of arXiv 2312.04927, with another bound. Classes depend
on the text and the context's length only, so different models are compared on the same tokens.
"""

import functools
from typing import NamedTuple

import numpy as np

from retnet_jax.data import open_store
from retnet_jax.evaluation.perplexity import windows

CLASSES = ("new", "seen", "common pair", "rare pair")
NEW, SEEN, COMMON, RARE = range(len(CLASSES))
RARE_AT_MOST = 20  # occurrences of a rare pair in all training documents


class Repeats(NamedTuple):
    """For each token d_1 ... d_n of a document, where it occurred before: int64 [n].

    Attributes:
      token: The last j < i with d_j = d_i; -1 if there is none.
      pair: The last j < i with d_{j-1} = d_{i-1} and d_j = d_i; -1 if there is none.
    """

    token: np.ndarray
    pair: np.ndarray

    def distance(self) -> np.ndarray:
        """Number of tokens from each pair back to the same pair; 0 if there is none."""
        here = np.arange(1, len(self.pair) + 1)
        return np.where(self.pair < 0, 0, here - self.pair)


def repeats(document: np.ndarray) -> Repeats:
    """Where the tokens d_1 ... d_n of a document d_0 ... d_n occurred before."""
    pair = _last_before(pairs(document))
    return Repeats(_last_before(document)[1:], np.where(pair < 0, -1, pair + 1))


def pairs(tokens: np.ndarray) -> np.ndarray:
    """A number for each pair of consecutive tokens, equal for equal pairs: int64 [n]."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] << 32 | tokens[1:]


def _last_before(ids: np.ndarray) -> np.ndarray:
    """The last earlier place of the same id; -1 if there is none."""
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    found = np.full(len(ids), -1)
    found[order[1:][same]] = order[:-1][same]
    return found


def context_starts(tokens: int, length: int, stride: int | None = None) -> np.ndarray:
    """The first place of the context of each token d_1 ... d_n in the windows of `window_nll`."""
    starts = np.zeros(tokens, np.int64)
    for window in windows(tokens, length, stride):
        starts[window.stop - window.scored : window.stop] = window.start
    return starts


def token_classes(document: np.ndarray, starts: np.ndarray, common: np.ndarray) -> np.ndarray:
    """The class of each token d_1 ... d_n of a document: int64 [n], indices into CLASSES.

    Args:
      document: Token ids d_0 ... d_n.
      starts: The first place of each token's context, from `context_starts`.
      common: The pairs that are common in training, ascending, from `common_pairs`.
    """
    before, here = repeats(document), pairs(document)
    place = np.minimum(np.searchsorted(common, here), len(common) - 1)
    is_common = common[place] == here if len(common) else np.zeros(len(here), bool)
    of_pair = np.where(is_common, COMMON, RARE)
    found = np.where(before.token >= starts, SEEN, NEW)
    return np.where(before.pair - 1 >= starts, of_pair, found)


@functools.lru_cache(maxsize=1)
def common_pairs(store: str) -> np.ndarray:
    """The pairs with more than RARE_AT_MOST occurrences in a store's training documents."""
    train = open_store(store).train
    found, counts = np.unique(pairs(train.read(0, train.token_count)), return_counts=True)
    return found[counts > RARE_AT_MOST]
