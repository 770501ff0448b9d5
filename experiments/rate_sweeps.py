"""Which learning rates a sweep tries, and which one it chooses."""

from collections.abc import Callable, Sequence

# Bits per byte by which a rate at the end of a sweep must be better than the next one for a rate
# beyond it to be tried.
WORTH_ANOTHER = 0.01

Loss = Callable[[float], float | None]  # of a rate; None: its run is missing


def rates_to_try(first: Sequence[float], loss: Loss) -> list[float]:
    """The rates of a sweep, ascending; one more while a rate at an end is best by WORTH_ANOTHER.

    Args:
      first: The rates that are tried first, two or more.
      loss: Function that returns the validation loss of a rate, in bits per byte.
    """
    rates = sorted(first)
    while True:
        losses = [found for x in rates if (found := loss(x)) is not None]
        if len(losses) < len(rates):
            return rates
        best = losses.index(min(losses))
        if best == 0 and losses[1] - losses[0] > WORTH_ANOTHER:
            rates.insert(0, rates[0] / 2)
        elif best == len(rates) - 1 and losses[-2] - losses[-1] > WORTH_ANOTHER:
            rates.append(2 * rates[-1])
        else:
            return rates


def best_rate(first: Sequence[float], loss: Loss) -> float | None:
    """The best rate of a sweep; None: it is not complete."""
    complete = all(loss(rate) is not None for rate in rates_to_try(first, loss))
    return best_so_far(first, loss) if complete else None


def best_so_far(first: Sequence[float], loss: Loss) -> float | None:
    """The best rate that was tried, which may be at the end; None: a first one is missing."""
    found = [(bits, rate) for rate in rates_to_try(first, loss) if (bits := loss(rate)) is not None]
    return min(found)[1] if len(found) >= len(first) else None
