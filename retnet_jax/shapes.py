"""Array types for signatures, and names for the common ones.

`Float[Array, "b t d"]` lists the dimensions of an array. The tests, which install jaxtyping and
beartype, check them; where jaxtyping is missing the types are plain arrays, so a model runs without
it. Letters: b batch, t query time, s key time, h head, k key width, v value width, d model width,
f feed-forward width, w vocabulary, n layer.
"""

from typing import TYPE_CHECKING

from jax import Array

if TYPE_CHECKING:
    # As jaxtyping does: type checkers see the plain array, and the dimensions are a note.
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as Key
else:
    try:
        from jaxtyping import Bool, Float, Int, Key
    except ImportError:

        class _AnyShape:
            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = Key = _AnyShape

__all__ = [
    "Activations",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Keys",
    "LogDecay",
    "Logits",
    "Queries",
    "RandomKeys",
    "RetentionMatrix",
    "SegmentIds",
    "Tokens",
    "Values",
    "power_of_two",
]

Tokens = Int[Array, "b t"]
SegmentIds = Int[Array, "b t"]  # the document of each token, 0 for padding; see `retention`
Activations = Float[Array, "b t d"]
Logits = Float[Array, "b t w"]
Queries = Float[Array, "b t h k"]
Keys = Float[Array, "b t h k"]
Values = Float[Array, "b t h v"]
LogDecay = Float[Array, " h"]  # log gamma of each head
RetentionMatrix = Float[Array, "b h k v"]  # S, the state of one layer

RandomKeys = Key[Array, " b"]  # typed keys of `jax.random`, one for each row


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`.

    Lengths that are rounded up to one need few compiled programs.
    """
    return 1 << max(0, least - 1).bit_length()
