"""The plan of an evaluation: all its options, checked, with their defaults filled in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from retnet_jax.errors import ConfigError
from retnet_jax.evaluation.perplexity import windows
from retnet_jax.evaluation.recall_probes import DISTANCES
from retnet_jax.evaluation.task_requests import SHOT_MODES
from retnet_jax.evaluation.tasks import TASKS, VARIANTS

PARTS = ("perplexity", "tasks", "recall")
PROTOCOLS = ("window", "sliding", "stateful")
# The smallest value of each numeric field of a plan.
_LEAST = {
    **{"window_length": 1, "stride": 1, "context_lengths": 128, "shots": 0, "seed": 0},
    **{"max_length": 1, "distances": 1, "trials": 2, "batch_size": 1},
}


@dataclass(frozen=True)
class Plan:
    """The options of an evaluation.

    Attributes:
      parts: Parts of the evaluation, from PARTS.
      protocols: Protocols of perplexity, from PROTOCOLS.
      window_length: Number of tokens in a window.
      stride: Number of tokens scored in each window of the sliding protocol.
      context_lengths: Context lengths at which the same last 128 tokens are scored.
      tasks: Names of the tasks.
      task_data: Source of the tasks' rows, as in `read_rows`.
      shots: Numbers of examples before a question; each number is evaluated separately.
      shot_mode: How examples are drawn, as in `draw_shots`.
      variant: Variant of the tasks' texts, from VARIANTS.
      seed: Seed of the examples and of the recall probes.
      max_length: Largest number of tokens of a request, as in `PrefixTrie`.
      distances: Distances of the recall probes, in tokens.
      trials: Number of trials of each probe and distance.
      batch_size: Rows in a batch.

    Raises:
      ConfigError: for an unknown name, and for a number out of range.
    """

    parts: Sequence[str] = ("perplexity",)
    protocols: Sequence[str] = ("window", "stateful")
    window_length: int = 2048
    stride: int = 1024
    context_lengths: Sequence[int] = ()
    tasks: Sequence[str] = tuple(TASKS)
    task_data: str | None = None
    shots: Sequence[int] = (0,)
    shot_mode: str = "per-document"
    variant: str = "lm_eval"
    seed: int = 1234
    max_length: int | None = None
    distances: Sequence[int] = DISTANCES
    trials: int = 64
    batch_size: int = 4

    def __post_init__(self):
        check_names("parts", self.parts, PARTS)
        check_names("protocols", self.protocols, PROTOCOLS)
        check_names("tasks", self.tasks, TASKS)
        check_names("shot_mode", [self.shot_mode], SHOT_MODES)
        check_names("variant", [self.variant], VARIANTS)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, Sequence) else [value]:
                if number is not None and number < least:
                    raise ConfigError(f"{name}={value}: must be >= {least}")
        if "sliding" in self.protocols:
            windows(1, self.window_length, self.stride)  # raises for a stride that does not fit

    @property
    def needs_text(self) -> bool:
        """Whether documents are needed, for perplexity or as filler of the recall probes."""
        return "perplexity" in self.parts or "recall" in self.parts

    def label(self, protocol: str) -> str:
        """The name of a protocol with its lengths, for tables."""
        if protocol == "window":
            return f"window of {self.window_length}"
        if protocol == "sliding":
            return f"sliding {self.window_length} by {self.stride}"
        return protocol


def make_plan(
    trained_length: int,
    *,
    parts: Sequence[str] = Plan.parts,
    window_length: int | None = None,
    stride: int | None = None,
    shots: Sequence[int] | None = None,
    **fields: Any,
) -> Plan:
    """Makes a plan and fills in defaults that depend on the model or on other options.

    Args:
      trained_length: Training length of the model, in tokens.
      parts: Parts from PARTS, or "paper" for perplexity and tasks.
      window_length: Number of tokens in a window; None: `trained_length`.
      stride: Number of tokens scored in a sliding window; None: half of `window_length`.
      shots: Numbers of examples; None: 0, and with "paper" 0 and 4.
      fields: Other fields of `Plan`.

    Raises:
      ConfigError: as `Plan`.
    """
    if window_length is None:
        window_length = trained_length
    if stride is None:
        stride = -(-window_length // 2)
    if shots is None:
        shots = (0, 4) if "paper" in parts else (0,)
    fields |= {name: _once_each(x) for name, x in fields.items() if isinstance(x, list | tuple)}
    return Plan(
        parts=_once_each(expanded(parts)),
        window_length=window_length,
        stride=stride,
        shots=_once_each(shots),
        **fields,
    )


def expanded(parts: Iterable[str]) -> list[str]:
    """The parts with "paper" replaced by perplexity and tasks."""
    found = []
    for part in parts:
        found += ("perplexity", "tasks") if part == "paper" else (part,)
    return found


def check_names(option: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Raises `ConfigError` if there are no names, or if one is unknown."""
    if not names:
        raise ConfigError(f"{option} is empty; give at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is not one of {', '.join(known)}")


def _once_each(values: Iterable) -> tuple:
    return tuple(dict.fromkeys(values))
