"""The function `retention`: its checks, and the choice of a form and an implementation."""

from collections.abc import Callable
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
from retnet_jax.shapes import Keys, LogDecay, Queries, RetentionMatrix, SegmentIds, Values

FORMS = ("parallel", "chunkwise", "recurrent")
IMPLEMENTATIONS = ("xla", "pallas_tpu", "mosaic_gpu")
SHORTEST_ROW = 128  # tokens; shorter rows run in XLA unless a kernel is named
KERNELS = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu"}  # by backend


def retention(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None = None,
    segment_ids: SegmentIds | SplitDocuments | None = None,
    form: str = "chunkwise",
    chunk_size: int | None = None,
    implementation: str | None = None,
    finite_decay: bool = False,
) -> tuple[Values, RetentionMatrix]:
    """Retention of each head, and its state after the last token.

    Args:
      q: Queries [b t h k], rotated and scaled. float32 or bfloat16, as k and v.
      k: Keys [b t h k], rotated.
      v: Values [b t h v].
      log_decay: Log gamma of each head, float32, negative. -inf: the head remembers nothing.
      state: S before the first token [b h k v], float32; None: 0. It belongs to the document that
        each row opens with.
      segment_ids: Documents and padding. 0 is padding: it neither writes nor decays the state, and
        its output is 0. Where the id changes from one real token to the next, a new document
        begins, with a state of 0. None: each row is one document. A caller that calls several times
        for the same rows numbers their documents once, with `split_documents(segment_ids)`.
      form: "parallel" (Eq. 5, O(t^2)), "chunkwise" (Eq. 7) or "recurrent" (Eq. 6).
      chunk_size: Tokens in a chunk of the chunkwise form, any number; None: the fastest.
      implementation: "xla", or a kernel of the chunkwise form: "pallas_tpu" or "mosaic_gpu", which
        a CPU interprets, slowly. None: the kernel of the backend for bfloat16 rows that it can run,
        else "xla".
      finite_decay: Whether log_decay is known to have no -inf, so that none need be replaced.

    Returns:
      y in v's dtype, and the state after each row's last real token, float32.

    Raises:
      ValueError: for arguments whose shapes, dtypes or values do not fit, naming them.
      NotImplementedError: for a named implementation that cannot run here, with the reason.

    The gradient is for reverse mode (`jax.grad`, `jax.vjp`). In forward mode (`jax.jvp`,
    `jax.jacfwd`, `jax.hessian`) only form="parallel" works; jax refuses the others.
    """
    _check_arrays(q, k, v, log_decay, state, segment_ids)
    _check_options(form, chunk_size, implementation)
    split = segment_ids
    if split is not None and not isinstance(split, SplitDocuments):
        split = split_documents(split)
    if not finite_decay:
        log_decay = jnp.maximum(log_decay, _FORGETS)
    chosen = _choose(implementation, form, q, k, v, chunk_size)
    if chosen is xla and q.shape[1] == 1 and split is None:
        form = "recurrent"  # one pass over the state
    if form == "chunkwise" and on_mesh.parts(q.shape[1]) > 1:
        path = on_mesh.sequence_parallel
    elif chosen is not xla and many_devices():  # XLA does not look into a kernel to split it
        path = on_mesh.on_each_device
    else:
        path = on_mesh.whole_arrays
    return path(_form(form, chosen, chunk_size), q, k, v, log_decay, state, split)


def _form(form: str, chosen: ModuleType, chunk_size: int | None) -> Callable:
    """The function that computes a form on one device."""
    if form == "chunkwise":
        return partial(chosen.chunkwise, chunk_size=chunk_size)
    return {"parallel": xla.parallel, "recurrent": xla.recurrent}[form]


def explain_choice(q, k, v, chunk_size: int | None = None) -> str:
    """The implementation of the chunkwise form, and why it is not the backend's kernel: a sentence.

    Args:
      q: Queries [b t h k], or their shape and dtype as a `jax.ShapeDtypeStruct`. With a mesh set:
        those of the whole batch.
      k: Keys, in the same way.
      v: Values, in the same way.
      chunk_size: Chunk size, as in `retention`.
    """
    name, reason = _automatic("chunkwise", q, k, v, chunk_size)
    if reason is None:
        return f"retention runs in the kernel {name}"
    return f"retention runs in XLA: {reason}"


def _choose(implementation: str | None, form: str, q, k, v, chunk_size: int | None) -> ModuleType:
    """The module whose `chunkwise` is used."""
    name = implementation
    if name is None:
        name, _ = _automatic(form, q, k, v, chunk_size)
    elif name != "xla":
        if form != "chunkwise":
            raise NotImplementedError(
                f"implementation={name!r} computes form='chunkwise' only, not form={form!r}; "
                "'xla' computes all"
            )
        if reason := _unsupported(name, q, k, v, chunk_size):
            raise NotImplementedError(f"implementation={name!r} cannot run here: {reason}")
    return xla if name == "xla" else _kernel(name)


def _automatic(form: str, q, k, v, chunk_size: int | None) -> tuple[str, str | None]:
    """The implementation to use when none is named; if that is "xla", also the reason."""
    name = KERNELS.get(backend())
    if name is None:
        return "xla", f"there is no kernel for {backend()!r}"
    if form != "chunkwise":
        return "xla", f"the kernel {name} computes form='chunkwise' only, not form={form!r}"
    if q.dtype != jnp.bfloat16:  # float32 is for exact work
        return "xla", f"the kernel {name} is chosen for bfloat16, not for {q.dtype}"
    if q.shape[1] < SHORTEST_ROW:
        return "xla", f"the kernel {name} is chosen for rows of {SHORTEST_ROW} tokens or more"
    if reason := _unsupported(name, q, k, v, chunk_size):
        return "xla", f"the kernel {name} cannot run: {reason}"
    return name, None


def _unsupported(name: str, q, k, v, chunk_size: int | None) -> str | None:
    shapes = (jax.ShapeDtypeStruct(local_shape("bth.", x.shape), x.dtype) for x in (q, k, v))
    return _kernel(name).unsupported(*shapes, chunk_size)


def _kernel(name: str) -> ModuleType:
    return import_module(f"{__package__}.{name}")


# Log gamma in place of -inf. gamma^n is 0 for every n > 0, in float64 too, as with -inf; gamma^0
# is 1, where exp(0 * -inf) would be NaN.
_FORGETS = -1e4


def _check_options(form: str, chunk_size: int | None, implementation: str | None) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not one of {', '.join(map(repr, FORMS))}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is none of {IMPLEMENTATIONS} or None")
    if chunk_size is not None and form != "chunkwise":
        raise ValueError(f"chunk_size={chunk_size} is for form='chunkwise', not form={form!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is less than 1")


def _check_arrays(q, k, v, log_decay, state, segment_ids) -> None:
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
            raise ValueError(
                f"{name} {array.shape} does not fit q {q.shape}; its shape must be {shape}"
            )
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}; it must be float32 or bfloat16")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v have the dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must have the same"
        )
    for name, array in (("log_decay", log_decay), ("state", state)):
        if array is not None and array.dtype != _state_dtype(q):
            raise ValueError(
                f"{name} is {array.dtype}; for {q.dtype} inputs it must be {_state_dtype(q)}"
            )


def _state_dtype(q):
    """float64 for float64 inputs, which reference computations use; else float32."""
    return np.promote_types(np.float32, q.dtype)
