"""General-purpose compressors as a baseline: a model that predicts text could compress it."""

import gzip
import lzma


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a text, not empty, after `gzip -9` and `xz -9`, their headers included.

    Unlike a model evaluated document by document, they also use what came in documents before, as
    far as their windows reach: 32 KiB and 64 MiB.
    """
    sizes = {
        "gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
