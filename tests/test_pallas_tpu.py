"""Kernels compiled for TPUs without having one, and the one-pass operations around retention."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec
from tolerances import assert_close

from retnet_jax.aot import topologies
from retnet_jax.config import MeshConfig, ModelConfig
from retnet_jax.model.multi_scale_retention import MultiScaleRetention
from retnet_jax.ops.gated_norm import gated_norm
from retnet_jax.ops.map_heads import map_heads, on_tpu
from retnet_jax.ops.retention import log_decay, number_documents, pallas_tpu
from retnet_jax.ops.rotation import rotate, rotation
from retnet_jax.parallel.mesh import make_mesh

CHIPS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# Key width, value width, heads. torchscale's heads of 432 and 428 fill whole lanes only if all
# heads are together.
WIDTHS = [(64, 128, 8), (128, 128, 8), (128, 256, 8), (256, 512, 4), (256, 432, 8), (256, 428, 10)]
OFTEN = [("v5e", *widths) for widths in WIDTHS[:4]] + [
    (chip, 256, 512, 4) for chip in CHIPS if chip != "v5e"
]
SELDOM = [(chip, *widths) for chip in CHIPS for widths in WIDTHS]


def on_first(chip):
    return make_mesh(MeshConfig(), topologies.tpus(CHIPS[chip])[:1])


def row_major(mesh, shape, dtype=jnp.bfloat16):
    """An argument in the memory order of activations; one that XLA chooses may need copies."""
    place = Format(Layout(tuple(range(len(shape)))), NamedSharding(mesh, PartitionSpec()))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


@pytest.mark.parametrize(
    ("chip", "k", "v", "heads"),
    OFTEN + [pytest.param(*x, marks=pytest.mark.slow) for x in SELDOM if x not in OFTEN],
)
def test_kernels_compile_without_temporaries(tpu_compiler, chip, k, v, heads):
    """Outputs and gradients, with documents, states and a length that chunks do not divide."""
    # Long rows: XLA copies short ones to the chip first, and counts the copies as temporaries.
    mesh, b, t = on_first(chip), 4, 10_000
    arguments = {
        "q": row_major(mesh, (b, t, heads * k)),
        "k": row_major(mesh, (b, t, heads * k)),
        "v": row_major(mesh, (b, t, heads * v)),
        "state": row_major(mesh, (b, heads, k, v), jnp.float32),
        "d_y": row_major(mesh, (b, t, heads * v)),
        "d_final": row_major(mesh, (b, heads, k, v), jnp.float32),
        "segments": row_major(mesh, (b, t), jnp.int32),
    }
    decay = log_decay("log_spaced", heads, (1 / 32, 1 / 512))

    def step(q, k, v, state, d_y, d_final, segments):
        def run(q, k, v, state):
            q, k, v = (x.reshape(b, t, heads, -1) for x in (q, k, v))
            y, final = pallas_tpu.chunkwise(q, k, v, decay, state, number_documents(segments))
            return y.reshape(b, t, -1), final

        outputs, backward = jax.vjp(run, q, k, v, state)
        return outputs, backward((d_y, d_final))

    results = ("d_y", "d_final"), ("q", "k", "v", "state")
    formats = jax.tree.map(lambda name: arguments[name].format, results)
    with jax.set_mesh(mesh):
        heads_of = (jax.ShapeDtypeStruct((b, t, heads, width), jnp.bfloat16) for width in (k, k, v))
        assert pallas_tpu.unsupported(*heads_of) is None
        compiled = jax.jit(step, out_shardings=formats).lower(**arguments).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    # The document numbers: five for each token, padded to tiles, and their intermediates.
    assert compiled.memory_analysis().temp_size_in_bytes <= b * t * 4 * 128


def test_heads_too_large_for_a_v4_are_refused_with_the_reason(tpu_compiler):
    with jax.set_mesh(on_first("v4")):
        shapes = [
            jax.ShapeDtypeStruct((1, 512, 20, width), jnp.bfloat16) for width in (256, 256, 428)
        ]
        reason = pallas_tpu.unsupported(*shapes)
    assert re.search(r"20 heads of 256/428, .* MiB of VMEM, and TPU v4 has 16", reason)


def test_a_layer_keeps_no_float32_copies(tpu_compiler):
    """Projections, rotation, retention, norm and gate, forward and backward, only in bfloat16."""
    b, t, heads, v = 2, 512, 2, 384
    config = ModelConfig(
        d_model=256, n_heads=heads, key_dim=256, value_dim=heads * v, dtype="bfloat16"
    )
    layer = MultiScaleRetention(config, rngs=nnx.Rngs(0), value_scale=1.0, out_scale=1.0)
    mesh = on_first("v5e")

    def loss(layer, x):
        context, _ = MultiScaleRetention.prepare(config, None, (b, t), None)
        return layer(x, None, context, "chunkwise")[0].astype(jnp.float32).sum()

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        layer,
    )
    with jax.set_mesh(mesh):
        x = row_major(mesh, (b, t, 256))
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(abstract, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') >= 6
    # Values inside fused computations are in registers; those of the entry are in memory.
    entry = text[text.index("ENTRY ") :]
    assert not re.search(rf"= f32\[{b},{t},({heads},{v}|{heads * v})\]", entry)


def gated_norm_arrays(dtype):
    rng = np.random.default_rng(0)
    y, gate, d_out = (jnp.asarray(rng.normal(size=(2, 40, 3, 16)), dtype) for _ in range(3))
    return y, gate, jnp.asarray(rng.random((2, 40, 3)) + 0.5, jnp.float32), d_out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms", None])
def test_gradient_of_the_gated_norm_is_that_of_autodiff(kind, scaled, gated):
    y, gate, scale, d_out = gated_norm_arrays(jnp.float32)
    scale, gate = scale if scaled else None, gate if gated else None

    def plain(y, gate):
        z = y if scale is None else y * scale[..., None]
        z = z - z.mean(-1, keepdims=True) if kind == "layer" else z
        normed = z
        if kind is not None:
            normed = z / jnp.sqrt((z**2).mean(-1, keepdims=True) + 1e-3)
        return normed if gate is None else jax.nn.silu(gate) * normed

    expected, backward = jax.vjp(plain, y, gate)
    found, own_backward = jax.vjp(lambda y, gate: gated_norm(y, gate, scale, kind, 1e-3), y, gate)
    assert_close((found, own_backward(d_out)), (expected, backward(d_out)))


@pytest.mark.parametrize("mesh", [None, {"data": 2, "seq": 2}])
def test_a_kernel_maps_heads_as_xla_does(mesh):
    y, gate, scale, _ = gated_norm_arrays(jnp.bfloat16)
    shared = gate[:, :, :1]

    def function(y, gate, scale, nothing, shared):
        assert nothing is None
        return y * scale + shared, gate * y.sum(-1, keepdims=True)

    run = partial(map_heads, function, y, y, gate, scale, None, shared, outputs=2)
    expected = run()
    if mesh is None:
        found = on_tpu(*run.args, outputs=2)
    else:
        with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[:4])):
            found = jax.jit(lambda: on_tpu(*run.args, outputs=2))()
    assert_close(found, expected, "bfloat16")


@pytest.mark.parametrize("convention", ["rope", "torchscale"])
def test_rotation_rotates_pairs_and_its_gradient_rotates_them_back(convention):
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 8))
    turn = rotation(jnp.arange(9)[None], 8, convention)
    y, backward = jax.vjp(lambda x: rotate(x, turn, convention, 0.5), x)
    assert_close(backward(y)[0], x / 4)
    pairs = (0, 4) if convention == "rope" else (0, 1)
    place = np.arange(9.0)[None, :, None]
    first, second = (np.asarray(x[..., i]) for i in pairs)
    assert_close(2 * y[..., pairs[0]], first * np.cos(place) - second * np.sin(place))
    assert_close(2 * y[..., pairs[1]], second * np.cos(place) + first * np.sin(place))
