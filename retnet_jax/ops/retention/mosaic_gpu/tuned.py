"""The tilings that were the fastest of those measured on a device, in the table `tuned.json`.

`python -m benchmarks.accelerator --sweep` measures them and writes the table: by kind of device,
then by kernel (the name of a `Walk` or of `Scores`), entries as from `entry`. An entry counts for
the device, the widths and the length that were measured. All else keeps the default, which is
`Tiling.of` or `default_stages`. No entry changes a bit of the results.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from retnet_jax.ops.retention.mosaic_gpu.scores import default_stages
from retnet_jax.ops.retention.mosaic_gpu.tiling import Tiling
from retnet_jax.parallel.mesh import device_kind

TABLE = Path(__file__).with_name("tuned.json")
Choice = dict[str, int]  # values of some fields of a Tiling, or of `stages`


class Walk(NamedTuple):
    """What the tiling of `walk` depends on; the package's docstring has A and B."""

    contracted: int  # A
    written: int  # B
    length: int  # tokens in a row
    reverse: bool

    def __str__(self) -> str:
        direction = "backwards" if self.reverse else "forwards"
        return f"walk {self.contracted} to {self.written} {direction}, {self.length} tokens"


class Scores(NamedTuple):
    """What the stages of `scores` depend on."""

    width: int  # of q and k
    length: int  # tokens in a row

    def __str__(self) -> str:
        return f"scores {self.width}, {self.length} tokens"


def tiling(walk: Walk) -> Tiling:
    """The tiling to use on the current device."""
    return Tiling.of(walk.contracted, walk.written)._replace(**_measured(walk))


def stages(scores: Scores) -> int:
    """The `stages` of `decayed_scores` to use on the current device."""
    return _measured(scores).get("stages", default_stages(scores.width))


def _measured(kernel: Walk | Scores) -> Choice:
    """The entry's choice for the current device; empty if there is no entry."""
    found = _table(TABLE).get(device_kind(), {}).get(str(kernel))
    return {} if found is None else found["choice"]


@functools.cache
def _table(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())
