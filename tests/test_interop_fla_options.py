"""Options of fla's RetNet: recorded logits, states and gradients; conversions."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from foreign_checkpoints import FIXTURES, copy_of, edit_config
from safetensors.numpy import load_file, save_file
from test_parity import FLOAT32_FLA, FLOAT64, difference, prefill_then_steps, run
from tolerances import assert_close, relative_difference

from retnet_jax import interop
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.interop import presets
from retnet_jax.interop.parameter_source import ModelSource
from retnet_jax.model import RetNet
from retnet_jax.model.mixer import ConvolvedState

CASES = {
    "conv": {"short_conv": 4},
    "kv": {"n_kv_heads": 2},
    "feature": {"feature_map": "relu"},
    "nogate": {"output_gate": False},
    "all": {"short_conv": 4, "n_kv_heads": 2, "feature_map": "gelu"},
    "conv_ignored": {},
}


@functools.cache
def recorded(case):
    return load_file(FIXTURES / "fla_options" / case / "io.safetensors")


@functools.cache
def load(case):
    return interop.load(FIXTURES / "fla_options" / case)


def options(model):
    names = ("short_conv", "n_kv_heads", "feature_map", "output_gate")
    default = type(model.config)()
    return {
        name: getattr(model.config, name)
        for name in names
        if getattr(model.config, name) != getattr(default, name)
    }


def assert_states(model, state, io, tokens):
    """The state of the first layer is the recorded one."""
    matrix = state.layers.matrix if model.config.short_conv else state.layers
    if tokens == 37:
        assert_close(matrix[0], io["layer0_recurrent_state_f32_T37"])
    if model.config.short_conv:
        for name in "qkv":
            last = getattr(state.layers, name)[0]  # [b last h k]
            theirs = io[f"layer0_conv_state_{name}_f32_T{tokens}"]  # [b (h k) last+1]
            ours = last.reshape(*last.shape[:2], -1).swapaxes(1, 2)
            assert_close(ours, theirs[..., 1:])


@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    io, model = recorded(case), load(case)
    assert options(model) == CASES[case]
    logits, state = run(model, io["tokens_T37"], form="chunkwise")
    assert difference(logits, io["logits_f64_T37"]) <= FLOAT32_FLA
    assert_states(model, state, io, 37)
    steps = prefill_then_steps(model, io["tokens_T37"])
    assert difference(steps, io["logits_prefill20_then_steps_f32_T37"][:, 20:]) <= FLOAT32_FLA
    if "tokens_T100" in io:
        longer, _ = run(model, io["tokens_T100"], form="chunkwise")
        assert difference(longer, io["logits_f64_T100"]) <= FLOAT32_FLA
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], io["tokens_T37"][:, 1:]
    ).mean()
    assert_close(loss[None], io["loss_f32_T37"])
    if "layer0_conv_state_q_f32_T2" in io:
        _, short = run(model, io["tokens_T37"][:, :2], form="chunkwise")
        assert isinstance(short.layers, ConvolvedState)
        assert_states(model, short, io, 2)


@pytest.mark.parametrize("case", CASES)
def test_float64(case):
    io = recorded(case)
    expected = io["logits_f64_T37"]
    with jax.enable_x64(True):
        model = interop.load(FIXTURES / "fla_options" / case, dtype="float64", chunk_size=16)
        for form in ("parallel", "chunkwise", "recurrent") if case == "all" else ("chunkwise",):
            logits, _ = run(model, io["tokens_T37"], form=form)
            assert difference(logits, expected) <= FLOAT64 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["conv", "all"])
def test_gradients(case):
    """They were computed in float64 and rounded to float32."""
    tokens = jnp.asarray(recorded(case)["tokens_T37"])
    expected = load_file(FIXTURES / "fla_options" / case / "grads_T37.safetensors")

    @jax.jit
    @jax.grad
    def gradient_of_loss(model):
        logits, _ = model(tokens)
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        ).mean()

    with jax.enable_x64(True):
        model = interop.load(FIXTURES / "fla_options" / case, dtype="float64")
        gradient = gradient_of_loss(model)
    layout = interop.fla.UNFUSED if case == "all" else interop.fla.LAYOUT
    found = {
        tensor.name: np.concatenate([np.asarray(piece) for piece in tensor.pieces])
        for tensor in layout.tensors(ModelSource(gradient), None)
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_difference(found[name], value) <= 1e-6, name


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_the_same_after_conversion_and_back(case, tmp_path):
    source = FIXTURES / "fla_options" / case
    interop.convert(source, tmp_path / "own", "own")
    layout = "fla_unfused" if case == "all" else "fla"
    allowed = {"fla_ignores_conv": True} if "short_conv" in CASES[case] else {}
    interop.convert(tmp_path / "own", tmp_path / "back", layout, **allowed)
    before, after = (load_file(x / "model.safetensors") for x in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    given = json.loads((source / "config.json").read_text())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    if case == "conv_ignored":
        given["use_short_conv"] = False
    for name in (
        *("use_short_conv", "conv_size", "num_kv_heads", "feature_map", "use_output_gate"),
        *("fuse_norm", "elementwise_affine"),
    ):
        assert written[name] == given[name], name
    assert (tmp_path / "back" / "README.md").exists() == bool(allowed)


def test_what_fla_would_drop_is_refused_and_the_readme_says_so(tmp_path):
    source = FIXTURES / "fla_options" / "conv"
    with pytest.raises(ConfigError, match="fla's RetNetForCausalLM builds no convolutions"):
        interop.convert(source, tmp_path / "out", "fla")
    assert not (tmp_path / "out").exists()
    interop.convert(source, tmp_path / "out", "fla", fla_ignores_conv=True)
    assert "drops their weights" in (tmp_path / "out" / "README.md").read_text()
    found = interop.load(tmp_path / "out")
    assert found.config == load("conv").config


@pytest.mark.parametrize(("layout", "preset"), [("torchscale", "paper"), ("syncdoth", "syncdoth")])
def test_layouts_without_the_options_refuse_them(layout, preset):
    config = getattr(presets, preset)(
        **{"vocab_size": 23, "d_model": 16, "n_layers": 1, "n_heads": 2},
        **{"short_conv": 3, "n_kv_heads": 1, "feature_map": "relu", "output_gate": False},
        **{"qk_norm": True, "head_norm": False},
    )
    with pytest.raises(ConfigError) as error:
        interop.LAYOUTS[layout].write_config(interop.Description(config))
    for line in (
        f"model.short_conv is 3, {layout} has None",
        f"model.n_kv_heads is 1, {layout} has None",
        f"model.feature_map is 'relu', {layout} has None",
        f"model.output_gate is False, {layout} has True",
        f"model.qk_norm is True, {layout} has False",
        f"model.head_norm is False, {layout} has True",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("layout", interop.LAYOUTS)
@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"qk_norm": True}, "model.qk_norm is True, .* has False"),
        ({"head_norm": False, "head_norm_scale": False}, "model.head_norm is False, .* has True"),
        ({"head_norm_epsilon": 0.01}, "model.head_norm_epsilon is 0.01, .* has None"),
        ({"decay": "none"}, "model.decay is 'none', .* has 'powers_of_two': .* decays are fixed"),
        ({"init": "torchscale"}, None),
    ],
)
def test_every_layout_refuses_what_only_this_project_has(layout, options, refused):
    """`init` is accepted: the function of a model does not depend on it."""
    preset = getattr(presets, layout.removesuffix("_unfused"))
    sizes = {"vocab_size": 23, "d_model": 16, "n_layers": 1, "n_heads": 2}
    description = interop.Description(preset(**(sizes | options)))
    if refused is None:
        interop.LAYOUTS[layout].write_config(description)
        return
    with pytest.raises(ConfigError, match=refused):
        interop.LAYOUTS[layout].write_config(description)


@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_maps_with_parameters(name, tmp_path):
    config = presets.fla(
        **{"vocab_size": 23, "d_model": 16, "n_layers": 2, "n_heads": 2, "feature_map": name},
        **{"key_dim": 16, "value_dim": 32, "ffn_dim": 32},
    )
    model = jax.jit(lambda: RetNet(config, rngs=nnx.Rngs(0)))()
    learned = model.layers.mixer.feature_map
    for parameter in ("weight",) if name == "prelu" else ("alpha_p", "alpha_n"):
        setattr(learned, parameter, nnx.Param(jnp.array([[0.3], [0.7]])))
    interop.save(model, tmp_path / "fla", "fla")
    found = load_file(tmp_path / "fla" / "model.safetensors")
    prefix = "model.layers.1.attn.feature_map_fn."
    expected = {"weight": 0.7} if name == "prelu" else {"alpha_p": 0.7, "alpha_n": 0.7}
    assert {x for x in found if x.startswith(prefix) and found[x].ndim} == {
        prefix + x for x in expected
    }
    for parameter, value in expected.items():
        np.testing.assert_array_equal(found[prefix + parameter], np.float32([value]))
    back = interop.load(tmp_path / "fla")
    assert back.config == config
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    if name == "xielu":
        assert found[prefix + "beta"] == np.float32(0.5)
        assert found[prefix + "eps"] == np.float32(-1e-6)
        path = tmp_path / "fla" / "model.safetensors"
        save_file(found | {prefix + "beta": np.array(0.6, np.float32)}, path)
        with pytest.raises(CheckpointError, match=r"beta: expected the values that follow"):
            interop.load(tmp_path / "fla")
        save_file({x: value for x, value in found.items() if value.ndim}, path)
        assert interop.load(tmp_path / "fla").config == config


def test_convolutions_that_the_config_does_not_have_are_refused(tmp_path):
    directory = copy_of("fla_options/conv", tmp_path / "in")
    edit_config(directory, use_short_conv=False)
    with pytest.raises(CheckpointError, match=r"q_conv1d.weight: expected nothing, found \(36, 1"):
        interop.load(directory)
    edit_config(directory, use_short_conv=True, conv_size=3)
    with pytest.raises(CheckpointError, match=r"expected \(36, 1, 3\), found \(36, 1, 4\)"):
        interop.load(directory)
