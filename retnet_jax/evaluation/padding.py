"""Lengths are rounded up, so that few programs are compiled."""


def power_of_two(least: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, least - 1).bit_length()
