"""Causal softmax attention that never holds the scores [t t], where a library has a kernel for it.

    backend   rows of one document each   several documents, padding
    TPU       splash attention of jax     splash attention of jax
    GPU       cuDNN, through jax          none: jax's public interface takes no documents
    CPU       none                        none                              (jax-ml/jax#29731)

The kernels take whole rows of bfloat16 with an empty cache. In all other cases `attention.py`
computes attention in XLA with the scores in memory, for packed rows on a GPU too. cuDNN's kernel
has run on an H200 (docs/measurements.md); splash attention has not been run on a TPU.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from retnet_jax.parallel.mesh import axis_size, backend, many_devices
from retnet_jax.parallel.sharding import activation_spec, local_shape
from retnet_jax.shapes import Array, Float, Int

KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # by backend
SHORTEST_ROW = 128  # tokens; shorter rows run in XLA unless a kernel is named
LANES = 128
WIDEST_HEAD = 256
# The largest tile of scores has this many tokens on each side, as in MaxText. With 1024 and heads
# of 256 the backward pass needs more than the 16 MiB of a v4's VMEM.
LARGEST_TILE = 512


def flash_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    document: Int[Array, "b t"] | None = None,
    implementation: str | None = None,
    window: int | None = None,
) -> Float[Array, "b t h k"]:
    """Attention of each token to its document, up to itself.

    Args:
      q: Queries [b t h k], rotated, and scaled by k^-1/2.
      k: Keys [b t g k], rotated. Query head h uses key head h // (h/g).
      v: Values [b t g k].
      document: A number for each document of a row, and another one for padding, whose output is
        meaningless; None: each row is one document.
      implementation: "splash", which a CPU interprets, slowly, or "cudnn"; None: the backend's.
      window: Number of tokens of its document that a token sees, itself included; None: all.
        Tokens are counted in the row, so there must be no padding between two of one document.

    Returns:
      y in v's dtype. For `jax.checkpoint`, y and the other residuals of the backward pass have the
      name "retention"; those of "cudnn" are recognised by the policy `is_cudnn`.

    Raises:
      NotImplementedError: for an implementation that cannot run here, with the reason.
    """
    name = KERNELS.get(backend()) if implementation is None else implementation
    reason = unsupported(name, q, one_document=document is None)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r} cannot run here: {reason}")
    run = partial(_splash if name == "splash" else _cudnn, window=window)
    if not many_devices():
        return run(q, k, v, document)
    if k.shape[2] != q.shape[2]:  # so that each device has the key heads of its query heads
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    wide = activation_spec("bthk", q.shape)
    rows = None if document is None else activation_spec("bt", document.shape)
    # XLA does not look into a kernel to split it.
    return jax.shard_map(run, in_specs=(wide, wide, wide, rows), out_specs=wide, check_vma=False)(
        q, k, v, document
    )


def best(q: Array | jax.ShapeDtypeStruct, one_document: bool) -> str | None:
    """The implementation to use for queries of this shape and dtype; None: XLA."""
    return KERNELS[backend()] if _why_not(q, one_document) is None else None


def explain_choice(q: Array | jax.ShapeDtypeStruct, one_document: bool) -> str:
    """The implementation that `best` chooses, and why it is not the backend's: a sentence."""
    reason = _why_not(q, one_document)
    if reason is None:
        return f"attention runs in the kernel {KERNELS[backend()]}"
    return f"attention runs in XLA, with all scores in memory: {reason}"


def _why_not(q: Array | jax.ShapeDtypeStruct, one_document: bool) -> str | None:
    """Why the backend's implementation is not used; None if it is."""
    name = KERNELS.get(backend())
    if name is None:
        return f"there is no kernel for {backend()!r}"
    if q.dtype != jnp.bfloat16:  # float32 is for exact work
        return f"the kernel {name} is chosen for bfloat16, not for {q.dtype}"
    if q.shape[1] < SHORTEST_ROW:  # their scores take little memory
        return f"the kernel {name} is chosen for rows of {SHORTEST_ROW} tokens or more"
    reason = unsupported(name, q, one_document)
    return None if reason is None else f"the kernel {name} cannot run: {reason}"


def unsupported(
    name: str | None, q: Array | jax.ShapeDtypeStruct, one_document: bool
) -> str | None:
    """Why an implementation cannot run such queries on the current platform; None if it can."""
    if name not in KERNELS.values():
        return f"there is none of that name for {backend()!r}, only {list(KERNELS.values())}"
    if axis_size("seq") > 1:
        return "positions are split over devices"
    if name == "cudnn":
        return _unsupported_by_cudnn(q, one_document)
    if backend() not in ("tpu", "cpu"):
        return f"it is for TPUs (and interpreted on a CPU), not for {backend()!r}"
    if q.shape[1] % LANES:
        return f"rows of {q.shape[1]} tokens are not a multiple of {LANES}"
    if q.shape[3] > WIDEST_HEAD:
        return f"heads of {q.shape[3]} are wider than {WIDEST_HEAD}"
    return None


def _splash(q, k, v, document, window=None):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, h = q.shape[1:3]
    tile = math.gcd(t, LARGEST_TILE)
    mask = splash.CausalMask((t, t))
    if window is not None:
        mask = splash.LocalMask((t, t), window_size=(window - 1, 0), offset=0)
    if k.shape[2] != h:
        k, v = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (k, v))
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    # It lists the tiles that are not masked: seconds for 32,768 tokens, once for all layers.
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * h),
        block_sizes=splash.BlockSizes(**dict.fromkeys(sizes, tile)),
        residual_checkpoint_name="retention",
        interpret=backend() == "cpu",
    )

    def row(q, k, v, document) -> Any:  # y alone, as the kernel saves no residuals
        ids = None if document is None else splash.SegmentIds(document, document)
        return kernel(q, k, v, segment_ids=ids)

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(row)(q, k, v, document), 1, 2)


def _cudnn(q, k, v, document=None, window=None):
    del document
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=1.0,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def is_cudnn(primitive, *_, **__) -> bool:
    """A policy of `jax.checkpoint` that keeps the outputs of cuDNN, which have no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


def _unsupported_by_cudnn(q, one_document: bool) -> str | None:
    if backend() != "gpu" or jax.default_backend() != "gpu":
        return f"it needs a GPU in this machine, not {backend()!r} on {jax.default_backend()!r}"
    if not one_document:
        return "jax's public interface to cuDNN takes no documents"
    # jax checks versions, dtypes and head widths when it traces the call.
    local = jax.ShapeDtypeStruct(local_shape("bthk", q.shape), q.dtype)
    try:
        jax.eval_shape(lambda *qkv: jax.vjp(_cudnn, *qkv)[1](qkv[0]), local, local, local)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
