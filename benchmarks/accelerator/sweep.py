"""Measures the tilings that the Hopper kernels accept, and writes the table of the fastest.

The table is `tuned.json` of `retnet_jax.ops.retention.mosaic_gpu`, from which the kernels read
their tilings. A case is one kernel of one shape with one choice of its tiling; its record has the
times, or the reason why the kernel refuses the choice. The results of a choice must be those of the
default to the bit, and within the tolerance of the tests from a reference in float32 on the CPU.

A kernel's entry is written when all its choices have a record. It has the fastest choice if each of
its rounds was faster than each round of the default, else the default. Kernels with an entry for
this device are skipped. The records of the others are kept, unless the kernels' code or jax has
changed since.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import sections
from benchmarks.accelerator.cases import Case, Results, run
from benchmarks.accelerator.checks import TOLERANCE
from benchmarks.accelerator.kernels import KEYS
from benchmarks.accelerator.timing import REPEATS, on_cpu, rounds
from retnet_jax.ops.retention import log_decay, retention
from retnet_jax.ops.retention.document_index import one_document
from retnet_jax.ops.retention.mosaic_gpu import entry as kernels
from retnet_jax.ops.retention.mosaic_gpu import tuned
from retnet_jax.ops.retention.mosaic_gpu.memory import TILE, TOKENS
from retnet_jax.ops.retention.mosaic_gpu.scores import default_stages
from retnet_jax.ops.retention.mosaic_gpu.tiling import Tiling
from retnet_jax.ops.retention.mosaic_gpu.tuned import Choice, Scores, Walk
from retnet_jax.parallel.mesh import device_kind

# The most important first: lengths of rows, and for each the widths of q and k, and of v.
LENGTHS = (8192, 2048, 32_768, 512)
WIDTHS = ((256, 512), (128, 256), (128, 128), (64, 128))
_IN_ALL = 65_536  # tokens of all rows
_OPTIONS = ((1, 2), (1, 2, 4), (1, 2, 3, 4))  # groups, cluster, chunks_ahead of a Tiling
_CHECKED = 2  # heads of the first row that are compared with the reference


class Measured(NamedTuple):
    """A kernel to measure, and the number of rows and heads of its inputs."""

    kernel: Walk | Scores
    rows: int
    heads: int

    @property
    def default(self) -> Choice:
        """What the kernel uses without an entry."""
        if isinstance(self.kernel, Scores):
            return {"stages": default_stages(self.kernel.width)}
        tiling = Tiling.of(self.kernel.contracted, self.kernel.written)
        return {name: getattr(tiling, name) for name in ("groups", "cluster", "chunks_ahead")}

    def choices(self) -> list[Choice]:
        """The choices to try: the default, then those that differ least from it."""
        if isinstance(self.kernel, Scores):
            tiles = -(-self.kernel.width // TILE)
            found: list[Choice] = [{"stages": stages} for stages in range(1, tiles + 1)]
        else:
            rows = -(-self.kernel.written // TILE)  # in units of 64
            found = [
                {"groups": groups, "cluster": cluster, "chunks_ahead": ahead}
                for groups, cluster, ahead in itertools.product(*_OPTIONS)
                if rows % (groups * cluster) == 0  # no CTA without rows of T
            ]
        default = self.default
        found += [default] if default not in found else []
        return sorted(found, key=lambda x: sum(x[name] != default[name] for name in x))

    def refused(self, choice: Choice) -> str | None:
        """Why the kernel cannot run with a choice; None if it can."""
        if isinstance(self.kernel, Scores):
            return None
        tiling = Tiling.of(self.kernel.contracted, self.kernel.written)._replace(**choice)
        return tiling.refused(self.kernel.written)

    def case_name(self, choice: Choice) -> str:
        return f"{self.kernel}: " + ", ".join(f"{name} {x}" for name, x in choice.items())


Measure = Callable[[Measured, Choice], dict[str, Any]]


def measure(output: Path, tiny: bool, only: str, deadline: float, commit: str, again: bool) -> None:
    """Sweeps in a process started by the supervisor; tiny shapes have a table beside `output`."""
    results = Results(output)
    forget_other_code(results)
    results.forget("cut_off")
    sections.describe(results, tiny, commit)
    table = output.with_name("tuned_tiny.json") if tiny else tuned.TABLE
    found = [x for x in all_kernels(tiny) if re.search(only, str(x.kernel))]
    with sections.exit_if_broken():
        sweep(results, table, found, deadline, again)


def sweep(
    results: Results,
    table: Path,
    found: Iterable[Measured],
    deadline: float,
    again: bool,
    measure_choice: Measure | None = None,
) -> None:
    """Measures the kernels without an entry in the table, or all `again`, and writes entries.

    Args:
      results: Records of all choices.
      table: JSON file of entries.
      found: Kernels to measure, the most important first.
      deadline: When to stop, in seconds since 1970.
      again: Whether to measure kernels that have an entry for this device.
      measure_choice: Function that returns the record of a choice; None: `time_choice`.
    """
    known = {} if again else read_table(table).get(device_kind(), {})
    left = [x for x in found if str(x.kernel) not in known]
    of_case = {x.case_name(choice): x for x in left for choice in x.choices()}
    cases = [
        Case(x.case_name(choice), partial(measure_choice or time_choice, x, choice))
        for x in left
        for choice in x.choices()
    ]
    for x in left:  # the last choice may have ended the process before
        write_entry(results, table, x)
    run(
        results,
        "sweep",
        cases,
        deadline,
        finished=lambda case: write_entry(results, table, of_case[case.name]),
    )


def all_kernels(tiny: bool) -> Iterator[Measured]:
    """The kernels of a forward and a backward pass: y, d_v, d_q and d_k, and the scores."""
    lengths, widths, in_all, keys = LENGTHS, WIDTHS, _IN_ALL, KEYS
    if tiny:
        lengths, widths, in_all, keys = (128,), ((64, 128),), 128, 64
    seen = set()
    for length in lengths:
        for key, value in widths:
            walks = [(key, value, False), (key, value, True)]
            walks += [(value, key, False), (value, key, True)]
            of_widths: list[Walk | Scores] = [Walk(a, b, length, back) for a, b, back in walks]
            of_widths += [Scores(key, length), Scores(value, length)]
            for kernel in of_widths:
                if kernel not in seen:
                    seen.add(kernel)
                    yield Measured(kernel, in_all // length, keys // key)


def forget_other_code(results: Results) -> None:
    """Removes the records of other kernels or of another jax, which cannot be compared."""
    digest = hashlib.sha256()
    for path in sorted(tuned.TABLE.parent.glob("*.py")):
        digest.update(path.read_bytes())
    code = f"jax {jax.__version__}, kernels {digest.hexdigest()[:16]}"
    before = results.data.get("code", code)
    if before != code:
        print(f"sweep: {results.path} was measured with {before}, not {code}: measured again")
        results.data = {"sections": {}}
    results.describe(code=code)


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else {}


def write_entry(results: Results, table: Path, found: Measured) -> None:
    """Writes the entry of a kernel, if all its choices have a record and the default a time."""
    records = results.records("sweep")
    choices = [(choice, records.get(found.case_name(choice))) for choice in found.choices()]
    if any(record is None for _, record in choices):
        return
    timed = [(choice, record) for choice, record in choices if record and "ms" in record]
    default = next((record for choice, record in timed if choice == found.default), None)
    if default is None:
        print(f"sweep: {found.kernel}: no entry, because the default has no time", flush=True)
        return
    choice, best = min(timed, key=lambda x: x[1]["ms"])
    if max(best["samples_ms"]) >= min(default["samples_ms"]):
        choice, best = found.default, default
    entry = {"choice": choice, "ms": best["ms"], "default_ms": default["ms"]}
    entry |= {"rows": found.rows, "heads": found.heads}
    entry |= {name: results.data[name] for name in ("date", "commit", "jax")}
    entries = read_table(table)
    entries.setdefault(device_kind(), {})[str(found.kernel)] = entry
    unfinished = table.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(unfinished, table)


def time_choice(found: Measured, choice: Choice) -> dict[str, Any]:
    """The record of a choice: its times, or the reason why the kernel refuses it.

    Raises:
      NotImplementedError: if the kernel cannot run on this device, with the reason.
      AssertionError: if its results differ from the default's or too much from the reference.
    """
    if reason := found.refused(choice):
        return {"not_here": reason}
    sets = inputs(found)
    q, k, v = sets[0][:3]
    if reason := kernels.unsupported(q, k, v):
        raise NotImplementedError(reason)
    program = jax.jit(lambda sets: [_compute(found, choice, *arrays) for arrays in sets])
    compiled = program.lower(sets).compile()
    results = compiled(sets)[0]
    error = largest_error(found, results)
    assert error <= TOLERANCE, f"differs from XLA by {error:.1e}, more than {TOLERANCE}"
    equal = map(jnp.array_equal, results, _default_results(found))
    assert all(equal), "its results are not those of the default to the bit"
    times = rounds(lambda: compiled(sets), jax.block_until_ready, len(sets), REPEATS)
    return times | {"largest_error": error}


def _compute(found: Measured, choice: Choice, q, k, v, scores, state) -> tuple[jax.Array, ...]:
    """The results of a kernel with a choice: y and the state, or the scores."""
    kernel, decay = found.kernel, _decay(found)
    chunks = one_document(found.rows, kernel.length).chunks(TOKENS)
    if isinstance(kernel, Scores):
        return (kernels.scores_of_chunks(q, k, decay, chunks, choice["stages"]),)
    tiling = Tiling.of(kernel.contracted, kernel.written)._replace(**choice)
    return kernels.recurrence(q, k, v, scores, decay, chunks, state, kernel.reverse, tiling)


@lru_cache(maxsize=1)
def inputs(found: Measured) -> list[tuple]:
    """Two sets of random q, k [b t h a], v [b t h c], their scores and T [b h c a]."""
    kernel = found.kernel
    if isinstance(kernel, Walk):
        a, c = kernel.contracted, kernel.written
    else:
        a, c = kernel.width, TOKENS  # scores have no v
    chunks = one_document(found.rows, kernel.length).chunks(TOKENS)

    @jax.jit
    def draw(key):
        shapes = [(found.rows, kernel.length, found.heads, width) for width in (a, a, c)]
        q, k, v = (
            jax.random.normal(one, shape, jnp.bfloat16)
            for one, shape in zip(jax.random.split(key, 3), shapes, strict=True)
        )
        state = jax.random.normal(key, (found.rows, found.heads, c, a), jnp.float32)
        return q * a**-0.5, k, v, state

    sets = []
    for seed in range(2):
        q, k, v, state = draw(jax.random.key(seed))
        scores = None
        if isinstance(kernel, Walk):
            # Backwards, q and k exchange their roles: d_v is a sum over later queries.
            pair = (k, q) if kernel.reverse else (q, k)
            scores = kernels.scores_of_chunks(*pair, _decay(found), chunks, default_stages(a))
        sets.append((q, k, v, scores, state))
    return sets


@lru_cache(maxsize=1)
def _default_results(found: Measured) -> tuple[jax.Array, ...]:
    return jax.jit(partial(_compute, found, found.default))(*inputs(found)[0])


@lru_cache(maxsize=1)
def _reference(found: Measured) -> list[np.ndarray]:
    """The results for some heads of the first row in float32, by the CPU."""
    q, k, v, _, state = inputs(found)[0]
    arrays = [*(x[:1, :, :_CHECKED] for x in (q, k, v)), state[:1, :_CHECKED]]
    return on_cpu(partial(_exact, found), arrays)


def _exact(found: Measured, q, k, v, state) -> tuple[jax.Array, ...]:
    decay = _decay(found)[:_CHECKED]
    if isinstance(found.kernel, Scores):
        b, t, h, a = q.shape
        q, k = (x.reshape(b, t // TOKENS, TOKENS, h, a) for x in (q, k))
        distance = jnp.arange(TOKENS)[:, None] - jnp.arange(TOKENS)
        power = jnp.exp(decay[:, None, None] * distance)
        products = jnp.einsum("bnlha,bnmha->bhnlm", q, k)
        return (jnp.where(distance >= 0, products * power[:, None], 0.0),)

    def form(q, k, v, state):
        return retention(q, k, v, decay, state.swapaxes(2, 3), implementation="xla")

    if not found.kernel.reverse:
        y, after = form(q, k, v, state)
        return y, after.swapaxes(2, 3)
    # The walk backwards is the gradient of the walk forwards, which is linear in v and the state.
    zeros = jnp.zeros_like(v), jnp.zeros_like(state)
    _, backward = jax.vjp(partial(form, k, q), *zeros)
    return backward((v, state.swapaxes(2, 3)))


def largest_error(found: Measured, results: Iterable[jax.Array]) -> float:
    """The largest |x - r| over the largest |r|, where r is the reference."""
    exact = _reference(found)
    if isinstance(found.kernel, Scores):
        parts = [x[:1, :_CHECKED] for x in results]
    else:
        y, after = results
        parts = [y[:1, :, :_CHECKED], after[:1, :_CHECKED]]
    pairs = zip(parts, exact, strict=True)
    errors = [np.abs(np.asarray(x, np.float32) - r).max() / np.abs(r).max() for x, r in pairs]
    return float(np.max(errors))  # Python's max could miss a NaN


def _decay(found: Measured) -> jax.Array:
    """Log gamma of each head, as fla's."""
    return log_decay("powers_of_two", found.heads, (1 / 32, 1 / 512))
