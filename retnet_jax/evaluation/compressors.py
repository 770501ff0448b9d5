"""General-purpose compressors as a baseline: a model's bits per byte are a compression too."""

import gzip
import lzma


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte of a non-empty text after `gzip -9` and `xz -9`, including their headers.

    Unlike a model, which is evaluated document by document, they also use earlier documents as
    context, within their windows of 32 KiB and 64 MiB.
    """
    sizes = {
        "gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
