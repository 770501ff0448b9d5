"""What is evaluated of a model, and how: names that are known, and numbers that are settled."""

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
# The smallest value of each field of a plan that is a number, or several.
_LEAST = {
    **{"window_length": 1, "stride": 1, "context_lengths": 128, "shots": 0, "seed": 0},
    **{"max_length": 1, "distances": 1, "trials": 2, "batch_size": 1},
}


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how.

    Attributes:
      parts: of PARTS.
      protocols: of PROTOCOLS.
      window_length: tokens of a window.
      stride: tokens scored in each window of the sliding protocol.
      context_lengths: contexts after which the same last 128 tokens are scored.
      tasks: names of tasks.
      task_data: where their rows are, as in `read_rows`.
      shots: examples before a question; each number gives a result of its own.
      shot_mode: as in `draw_shots`.
      variant: of a task's texts, of VARIANTS.
      seed: of the examples and the recall probes.
      max_length: of a request, as in `PrefixTrie`.
      distances: of the recall probes.
      trials: of each probe and distance.
      batch_size: rows at once.

    Raises:
      ConfigError: for a name that is not known, and a number out of range.
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
                    raise ConfigError(f"{name}={value}: numbers of {least} or more are needed")
        if "sliding" in self.protocols:
            windows(1, self.window_length, self.stride)  # raises for a stride that does not fit

    @property
    def needs_text(self) -> bool:
        """Whether documents are read: for perplexity, or as filler of the recall probes."""
        return "perplexity" in self.parts or "recall" in self.parts

    def label(self, protocol: str) -> str:
        """A protocol with its lengths."""
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
    """A plan from options of which some are not given.

    Args:
      trained_length: tokens of the windows that the model was trained on.
      parts: of PARTS and "paper", which stands for perplexity and tasks.
      window_length: None: as in training.
      stride: None: half a window.
      shots: None: 0, and with "paper" 0 and 4.
      fields: others of `Plan`.

    Raises:
      ConfigError: as `Plan`.
    """
    if window_length is None:
        window_length = trained_length
    if stride is None:
        stride = -(-window_length // 2)
    if shots is None:
        shots = (0, 4) if "paper" in parts else (0,)
    several = {name: x for name, x in fields.items() if isinstance(x, list | tuple)}
    return Plan(
        parts=_once_each(expanded(parts)),
        window_length=window_length,
        stride=stride,
        shots=_once_each(shots),
        **fields | {name: _once_each(x) for name, x in several.items()},
    )


def expanded(parts: Iterable[str]) -> list[str]:
    """Parts with those that "paper" stands for."""
    found = []
    for part in parts:
        found += ("perplexity", "tasks") if part == "paper" else (part,)
    return found


def check_names(option: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Raises `ConfigError` unless there are names, and all of them are known."""
    if not names:
        raise ConfigError(f"{option} is empty; it takes some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is none of {', '.join(known)}")


def _once_each(values: Iterable) -> tuple:
    return tuple(dict.fromkeys(values))
