"""Array types for public signatures: jaxtyping's where it is installed, plain arrays elsewhere.

`Float[Array, "b t d"]` is read by people always and checked in the tests, where jaxtyping is
installed with beartype; running a model needs neither. Letters: b batch, t query time, s key time,
h head, k key width, v value width, d model width, f feed-forward width, w vocabulary, n layer.
"""

from jax import Array

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class _AnyShape:
        def __class_getitem__(cls, item):
            return item[0]

    Bool = Float = Int = _AnyShape

__all__ = ["Array", "Bool", "Float", "Int", "power_of_two"]


def power_of_two(least: int) -> int:
    """The smallest power of two not less than `least`; lengths rounded so need few programs."""
    return 1 << max(0, least - 1).bit_length()
