"""The entry: checks, and the choice of a form and an implementation."""

from functools import partial
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.ops.retention import on_mesh, xla
from retnet_jax.ops.retention.on_mesh import SplitDocuments, split_documents
from retnet_jax.parallel.mesh import backend, many_devices
from retnet_jax.parallel.sharding import local_shape
from retnet_jax.shapes import Array, Float, Int

FORMS = ("parallel", "chunkwise", "recurrent")
IMPLEMENTATIONS = ("xla", "pallas_tpu", "mosaic_gpu")
SHORTEST_ROW = 128  # that kernels are chosen for
KERNELS = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}  # of a backend


def retention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: Float[Array, "b h k v"] | None = None,
    segment_ids: Int[Array, "b t"] | SplitDocuments | None = None,
    form: str = "chunkwise",
    chunk_size: int | None = None,
    implementation: str | None = None,
    finite_decay: bool = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Retention of each head, and its state after the last token.

    Args:
      q: queries, rotated and scaled. float32 or bfloat16, as k and v.
      k: keys, rotated.
      v: values.
      log_decay: log gamma of each head, float32, negative; -inf: nothing is remembered.
      state: S before the first token, float32, of the document that each row opens with; None: 0.
      segment_ids: documents and padding. 0 is padding, which neither writes nor decays the state
        and whose output is 0; a change of id from one real token to the next is a border, where
        the state is 0. None: each row is one document. `split_documents(segment_ids)` serves many
        calls: it numbers the documents once.
      form: "parallel" (Eq. 5, O(t^2)), "chunkwise" (Eq. 7) or "recurrent" (Eq. 6).
      chunk_size: tokens in a chunk of the chunkwise form, of any length; None: the fastest.
      implementation: "xla", or the kernels of the chunkwise form "pallas_tpu" and "mosaic_gpu",
        which a CPU interprets, slowly; None: the backend's kernel for bfloat16 rows that it can
        run, else "xla".
      finite_decay: it is known that log_decay has no -inf, so that nothing is done about it.

    Returns:
      y in v's dtype, and the state after each row's last real token, float32.

    Raises:
      ValueError: for arguments whose shapes, dtypes or values do not fit, naming them.
      NotImplementedError: for an implementation by name that cannot run them here, with the reason.

    Its gradient is for reverse mode (`jax.grad`, `jax.vjp`). Forward mode (`jax.jvp`,
    `jax.jacfwd`, `jax.hessian`) has form="parallel" alone; jax refuses it for the others.
    """
    _check(q, k, v, log_decay, state, segment_ids)
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not one of {', '.join(map(repr, FORMS))}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is none of {IMPLEMENTATIONS} or None")
    if chunk_size is not None and form != "chunkwise":
        raise ValueError(f"chunk_size={chunk_size} is for form='chunkwise', not form={form!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is less than 1")
    split = segment_ids
    if split is not None and not isinstance(split, SplitDocuments):
        split = split_documents(split)
    if not finite_decay:
        log_decay = jnp.maximum(log_decay, _FORGETS)
    chosen = _choose(implementation, form, q, k, v, chunk_size)
    if chosen is xla and q.shape[1] == 1 and split is None:
        form = "recurrent"  # one pass over the state
    local = {
        "parallel": xla.parallel,
        "chunkwise": partial(chosen.chunkwise, chunk_size=chunk_size),
        "recurrent": xla.recurrent,
    }[form]
    if form == "chunkwise" and on_mesh.parts(q.shape[1]) > 1:
        return on_mesh.sequence_parallel(local, q, k, v, log_decay, state, split)
    if chosen is not xla and many_devices():  # XLA does not look into a kernel to split it
        return on_mesh.on_each_device(local, q, k, v, log_decay, state, split)
    return local(q, k, v, log_decay, state, None if split is None else split.documents)


def explain_choice(q, k, v, chunk_size: int | None = None) -> str:
    """Which implementation the chunkwise form runs, and why not the backend's kernel: a sentence.

    Args:
      q: queries [b t h k] or their shape and dtype, as `jax.ShapeDtypeStruct`; of whole batches,
        with the mesh set.
      k: keys, likewise.
      v: values, likewise.
      chunk_size: as of `retention`.
    """
    name, reason = _automatic("chunkwise", q, k, v, chunk_size)
    if reason is None:
        return f"retention runs in the kernel {name}"
    return f"retention runs in XLA: {reason}"


def _choose(implementation: str | None, form: str, q, k, v, chunk_size: int | None):
    """The module whose `chunkwise` runs."""
    name = implementation
    if name is None:
        name, _ = _automatic(form, q, k, v, chunk_size)
    elif name != "xla":
        if form != "chunkwise":
            raise NotImplementedError(
                f"implementation={name!r} has form='chunkwise', not form={form!r}; 'xla' has"
            )
        if reason := _unsupported(name, q, k, v, chunk_size):
            raise NotImplementedError(f"implementation={name!r} cannot run here: {reason}")
    return xla if name == "xla" else _kernel(name)


def _automatic(form: str, q, k, v, chunk_size: int | None) -> tuple[str, str | None]:
    """The implementation where none is named, and why it is "xla", if it is."""
    name = KERNELS.get(backend())
    if name is None:
        return "xla", f"there is no kernel for {backend()!r}"
    if form != "chunkwise":
        return "xla", f"the kernel {name} has form='chunkwise', not form={form!r}"
    if q.dtype != jnp.bfloat16:  # float32 is for exact work
        return "xla", f"the kernel {name} is chosen for bfloat16, not for {q.dtype}"
    if q.shape[1] < SHORTEST_ROW:  # a short row has no chunks
        return "xla", f"the kernel {name} is chosen for rows of {SHORTEST_ROW} tokens or more"
    if reason := _unsupported(name, q, k, v, chunk_size):
        return "xla", f"the kernel {name} cannot run: {reason}"
    return name, None


def _unsupported(name: str, q, k, v, chunk_size: int | None) -> str | None:
    shapes = (jax.ShapeDtypeStruct(local_shape("bth.", x.shape), x.dtype) for x in (q, k, v))
    return _kernel(name).unsupported(*shapes, chunk_size)


def _kernel(name: str) -> ModuleType:
    return import_module(f"{__package__}.{name}")


# Log gamma in place of -inf: gamma^n is 0 for the same n, in float64 too, and gamma^0 is 1, where
# exp(0 * -inf) is NaN.
_FORGETS = -1e4


def _check(q, k, v, log_decay, state, segment_ids) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q {q.shape} and v {v.shape} must have the dimensions [b t h k], [b t h v]"
        )
    b, t, h, width = q.shape
    if isinstance(segment_ids, SplitDocuments):
        segment_ids = segment_ids.documents.index
    if t == 0:
        raise ValueError(f"q {q.shape} has no tokens; at least one is needed")
    expected = {
        "k": (k, (b, t, h, width)),
        "v": (v, (b, t, h, v.shape[3])),
        "log_decay": (log_decay, (h,)),
        "state": (state, (b, h, width, v.shape[3])),
        "segment_ids": (segment_ids, (b, t)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} {array.shape} does not fit q {q.shape}: {shape} would")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}; float32 or bfloat16 is needed")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}; one is needed"
        )
    for name, array in (("log_decay", log_decay), ("state", state)):
        if array is not None and array.dtype != _state_dtype(q):
            raise ValueError(
                f"{name} is {array.dtype}; for {q.dtype} inputs it is {_state_dtype(q)}"
            )


def _state_dtype(q):
    """float32 for all but float64 inputs, which stand for reference computations."""
    return np.promote_types(np.float32, q.dtype)
