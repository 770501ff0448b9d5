"""Convolutions, shared key heads, feature maps, no gate: against a loop over the equations."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from retnet_jax import ModelConfig
from retnet_jax.model.mixer import ConvolvedState
from retnet_jax.model.multi_scale_retention import MultiScaleRetention
from retnet_jax.ops.retention.api import FORMS

SMALL = ModelConfig(vocab_size=29, d_model=12, n_layers=1, n_heads=4, key_dim=16, value_dim=12)
OPTIONS = [
    {"short_conv": 4, "n_kv_heads": 2, "feature_map": "gelu", "output_gate": False},
    {"short_conv": 2, "n_kv_heads": 1, "rotation": "torchscale", "row_normalizer": False}
    | {"qk_norm": True},
    {"short_conv": 3, "feature_map": "xielu", "norm": "rms", "head_norm_scale": True}
    | {"head_norm_epsilon": 0.03, "rotation": "none"},
    {"n_kv_heads": 2, "feature_map": "prelu", "output_gate": False, "mixer_bias": True}
    | {"qk_norm": True, "head_norm": False, "decay": "none"},
]
ROWS, PIECE = 2, 7  # each row is read in two pieces and two single steps


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


FEATURE_MAPS = {
    None: lambda x, _: x,
    "gelu": lambda x, _: x * np.vectorize(lambda y: 0.5 * (1 + math.erf(y / math.sqrt(2))))(x),
    "prelu": lambda x, learned: np.where(x > 0, x, learned["weight"] * x),
    "xielu": lambda x, learned: np.where(
        x > 0,
        softplus(learned["alpha_p"]) * x**2 + x / 2,
        (0.5 + softplus(learned["alpha_n"])) * (np.expm1(np.minimum(x, -1e-6)) - x) + x / 2,
    ),
}


class Reference:
    """One row of a mixer, read token by token in float64."""

    def __init__(self, mixer):
        self.config = mixer.config
        self.parameters = {
            tuple(key.name for key in path if hasattr(key, "name")): np.float64(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(mixer)[0]
        }
        self.begin()

    def begin(self):
        """A new document."""
        config, width = self.config, self.config.short_conv or 1
        heads, k, v = config.n_heads, config.q_width // config.n_heads, config.v_width
        self.place, self.matrix = 0, np.zeros((heads, k, v // heads))
        channels = {"q": config.q_width, "k": config.k_channels, "v": config.v_channels}
        self.last = {name: np.zeros((width - 1, size)) for name, size in channels.items()}

    def read(self, xs, segment_ids):
        """The outputs for some tokens; those of padding are NaN."""
        outputs, before = np.full(xs.shape, np.nan), None
        for n, (x, document) in enumerate(zip(xs, segment_ids, strict=True)):
            if document:
                if before not in (None, document):
                    self.begin()
                outputs[n], before = self.token(x), document
        return outputs

    def token(self, x):
        config = self.config
        q, k, v = (self.projected(name, x) for name in "qkv")
        learned = {path[-2]: p for path, p in self.parameters.items() if "feature_map" in path}
        q, k = (FEATURE_MAPS[config.feature_map](y, learned) for y in (q, k))
        if config.qk_norm:
            q, k = self.normed("q_norm", q), self.normed("k_norm", k)
        scale = q.shape[-1] ** -0.5
        if config.rotation == "torchscale":
            k = scale * k
        else:
            q = scale * q
        if config.rotation != "none":
            q, k = self.turned(q), self.turned(k)
        shared = config.n_heads // config.kv_heads
        gammas = 1 - np.geomspace(*config.decay_range, config.n_heads)
        if config.decay == "none":
            gammas = np.ones(config.n_heads)
        y = np.empty((config.n_heads, v.shape[-1]))
        for head, gamma in enumerate(gammas):
            written = np.outer(k[head // shared], v[head // shared])
            self.matrix[head] = gamma * self.matrix[head] + written
            y[head] = q[head] @ self.matrix[head]
            if config.row_normalizer:
                y[head] /= math.sqrt(sum(gamma**n for n in range(self.place + 1)))
        self.place += 1
        if config.norm == "layer" and config.head_norm and not config.head_norm_scale:
            y -= y.mean(-1, keepdims=True)
        if config.head_norm:
            y /= np.sqrt((y**2).mean(-1, keepdims=True) + config.epsilon_of_heads)
        if config.head_norm_scale:
            y *= self.parameters["head_norm", "scale", "value"]
        y = y.reshape(-1)
        if config.output_gate:
            y = y * silu(self.linear("gate", x))
        return self.linear("out", y)

    def linear(self, name, x):
        bias = self.parameters.get((name, "bias", "value"), 0.0)
        return x @ self.parameters[name, "kernel", "value"] + bias

    def projected(self, name, x):
        u = self.linear(name, x)
        if self.config.short_conv is not None:
            seen = np.concatenate([self.last[name], u[None]])  # [w c]
            weight = self.parameters[f"{name}_conv", "weight", "value"]  # [c w]
            u, self.last[name] = silu((seen * weight.T).sum(0)), seen[1:]
        return u.reshape(self.config.n_heads if name == "q" else self.config.kv_heads, -1)

    def normed(self, name, x):
        mean_square = (x**2).mean(-1, keepdims=True) + self.config.norm_epsilon
        return x / np.sqrt(mean_square) * self.parameters[name, "scale", "value"]

    def turned(self, x):
        pairs = x.shape[-1] // 2
        if self.config.rotation == "rope":
            angle = self.place * 10_000.0 ** -(np.arange(pairs) / pairs)
            a, b = x[:, :pairs], x[:, pairs:]
        else:
            angle = self.place * 10_000.0 ** -np.linspace(0, 1, pairs)
            a, b = x[:, 0::2], x[:, 1::2]
        cos, sin = np.cos(angle), np.sin(angle)
        turned = [a * cos - b * sin, b * cos + a * sin]
        if self.config.rotation == "rope":
            return np.concatenate(turned, -1)
        return np.stack(turned, -1).reshape(x.shape)


@partial(jax.jit, static_argnames="form")
def call(mixer, x, state, segment_ids, form):
    context, layers = mixer.prepare(mixer.config, state, x.shape[:2], segment_ids)
    y, layers = mixer(x, jax.tree.map(lambda a: a[0], layers), context, form)
    return y, context.state(jax.tree.map(lambda a: a[None], layers))


def mixer_of(options):
    config = dataclasses.replace(SMALL, dtype="float64", chunk_size=3, **options)

    @jax.jit
    def made():
        mixer = MultiScaleRetention(config, rngs=nnx.Rngs(0), value_scale=1.0, out_scale=1.0)
        rngs = nnx.Rngs(1)  # no parameter is 0 or 1
        return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(rngs.params(), x.shape), mixer)

    return made()


def segments_of(rng, row, length=PIECE):
    """Documents that begin anywhere; padding on the left, on the right, inside or nowhere."""
    segments = np.cumsum(rng.random(length) < rng.choice([0, 0.3])) + 1
    if row % 2:
        segments[rng.random(length) < 0.3] = 0
    else:
        first, last = sorted(rng.integers(0, length + 1, 2))
        segments[:first] = 0
        segments[last + 1 :] = 0
    return segments


def assert_state(state, references):
    matrix = state.layers.matrix if isinstance(state.layers, ConvolvedState) else state.layers
    assert_close(matrix[0], np.stack([x.matrix for x in references]), "float64")
    assert state.position.tolist() == [x.place for x in references]
    if isinstance(state.layers, ConvolvedState):
        for name in "qkv":
            last = np.asarray(getattr(state.layers, name)[0])  # [b last h k]
            expected = np.stack([x.last[name] for x in references])
            assert_close(last.reshape(expected.shape), expected, "float64")


OFTEN = [*((options, "chunkwise", 5) for options in OPTIONS), (OPTIONS[0], "recurrent", 5)]
SELDOM = [(options, form, 150) for options in OPTIONS for form in FORMS]


@pytest.mark.parametrize(
    ("options", "form", "most"),
    [*OFTEN, *(pytest.param(*x, marks=pytest.mark.slow) for x in SELDOM)],
    ids=str,
)
def test_any_documents_in_any_pieces(options, form, most):
    with jax.enable_x64(True):
        mixer = mixer_of(options)
        empty = jax.jit(lambda: MultiScaleRetention.init_state(mixer.config, ROWS, 0))()

        @settings(max_examples=most, suppress_health_check=[HealthCheck.too_slow])
        @given(st.integers(0, 2**32 - 1))
        def holds(seed):
            rng = np.random.default_rng(seed)
            references, state = [Reference(mixer) for _ in range(ROWS)], empty
            for length in (PIECE, PIECE, 1, 1):
                x = rng.normal(size=(ROWS, length, SMALL.d_model))
                segments = np.stack([segments_of(rng, row, length) for row in range(ROWS)])
                found = call(mixer, x, state, segments.astype(np.int32), form)
                y, state = jax.device_get(found)
                for row, reference in enumerate(references):
                    expected = reference.read(x[row], segments[row])
                    real = segments[row] > 0
                    assert_close(y[row][real], expected[real], "float64")
                assert_state(state, references)

        holds()


@pytest.mark.parametrize("options", OPTIONS[:1], ids=str)
def test_rows_of_one_document_without_a_state(options):
    with jax.enable_x64(True):
        mixer = mixer_of(options)
        x = np.random.default_rng(0).normal(size=(ROWS, PIECE, SMALL.d_model))
        y, state = jax.device_get(call(mixer, x, None, None, "chunkwise"))
        references = [Reference(mixer) for _ in range(ROWS)]
        for row, reference in enumerate(references):
            assert_close(y[row], reference.read(x[row], np.ones(PIECE)), "float64")
        assert_state(state, references)


def test_reference_sees_the_options():
    """Each option changes the reference's outputs: what equals it has the option too."""
    x = np.random.default_rng(0).normal(size=(PIECE, SMALL.d_model))
    everything = {"short_conv": 4, "n_kv_heads": 2, "feature_map": "gelu", "head_norm_scale": True}
    mixer = mixer_of(everything | {"norm": "rms", "qk_norm": True})
    whole = Reference(mixer).read(x, np.ones(PIECE))
    left_out = {"feature_map": None, "output_gate": False, "short_conv": None, "qk_norm": False}
    left_out |= {"head_norm": False, "decay": "none"}
    for name, other in left_out.items():
        reference = Reference(mixer)
        reference.config = dataclasses.replace(mixer.config, **{name: other})
        assert np.abs(reference.read(x, np.ones(PIECE)) - whole).max() > 1e-2
