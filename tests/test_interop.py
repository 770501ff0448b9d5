"""Checkpoints of other implementations: in and out, converted, refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from retnet_jax import interop, load_pretrained
from retnet_jax.config import MeshConfig, ModelConfig
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.interop import Description, presets
from retnet_jax.interop.tables import LayoutSource, config_values
from retnet_jax.model import build_model
from retnet_jax.parallel.mesh import make_mesh

FIXTURES = Path(__file__).parent / "fixtures"
CASES = {
    "torchscale": [
        *(f"torchscale_head/{case}" for case in ("a_h4", "b_shared", "c_h1", "f_deepnorm")),
        "torchscale_legacy/l_paper",
        "torchscale_legacy/l_nosubln",
    ],
    "fla": ["fla/default", "fla/variant"],
    "syncdoth": ["syncdoth/glu", "syncdoth/ffn"],
}
ALL = [(layout, case) for layout, cases in CASES.items() for case in cases]


def new(config):
    """A model at the start of its training."""
    return jax.jit(lambda: build_model(config, rngs=nnx.Rngs(0)))()


def tensors(directory):
    """All tensors of a directory's safetensors files."""
    names = ("weights.safetensors", "model*.safetensors")
    return {
        name: value
        for pattern in names
        for path in sorted(directory.glob(pattern))
        for name, value in load_file(path).items()
    }


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        if "retnet_rel_pos" in name:  # derived; torch computes it in float32
            np.testing.assert_allclose(actual[name], value, rtol=1e-6)
        else:
            assert actual[name].tobytes() == value.tobytes(), name


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def copy_of(case, directory):
    shutil.copytree(FIXTURES / case, directory, ignore=shutil.ignore_patterns("io.*", "grads*"))
    return directory


def edit_config(directory, **values):
    config = config_values(directory) | values
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    (path,) = directory.glob("*.safetensors")
    found = load_file(path)
    change(found)
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, path)


# In and out.


@pytest.mark.parametrize(("layout", "case"), ALL)
def test_import_and_export_are_inverse(layout, case, tmp_path):
    model = interop.load(FIXTURES / case)
    interop.save(model, tmp_path / "out", layout)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(FIXTURES / case))
    again = interop.load(tmp_path / "out")
    assert again.config == model.config
    assert load_pretrained(tmp_path / "out").config == model.config


@pytest.mark.parametrize(
    "case", ["fla/default", "torchscale_head/a_h4", "torchscale_legacy/l_paper"]
)
def test_a_model_trained_here_has_their_keys_and_comes_back_bit_for_bit(case, tmp_path):
    layout = "fla" if "fla" in case else "torchscale"
    config = interop.load(FIXTURES / case).config
    model = new(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(model, state):
        def loss(model):
            logits, _ = model(tokens[:, :-1])
            labels = tokens[:, 1:]
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(model, updates), state, value

    state, losses = optimizer.init(model), []
    for _ in range(3):
        model, state, loss = step(model, state)
        losses.append(loss)
    assert losses[-1] < losses[0]
    interop.save(model, tmp_path / "out", layout)
    found, expected = tensors(tmp_path / "out"), tensors(FIXTURES / case)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
    again = interop.load(tmp_path / "out")
    assert again.config == config
    for ours, theirs in zip(leaves(model), leaves(again), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", "<f2")])
def test_half_precision_files(name, dtype, tmp_path):
    model = interop.load(FIXTURES / "fla/default")
    interop.fla.save(model, tmp_path / "half", dtype=name)
    half = tensors(tmp_path / "half")
    assert {x.dtype for x in half.values()} == {np.dtype(dtype)}
    again = interop.load(tmp_path / "half")
    for whole, rounded in zip(leaves(model), leaves(again), strict=True):
        assert rounded.dtype == np.float32
        assert (whole.astype(dtype).astype(np.float32) == rounded).all()
    interop.fla.save(again, tmp_path / "again", dtype=name)
    assert_same_tensors(tensors(tmp_path / "again"), half)
    interop.convert(tmp_path / "half", tmp_path / "own", "own")
    assert {x.dtype for x in tensors(tmp_path / "own").values()} == {np.dtype(dtype)}


def test_files_divided_over_an_index(tmp_path):
    model = interop.load(FIXTURES / "fla/default")
    interop.fla.save(model, tmp_path / "parts", max_file_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * model.config.parameter_count()
    assert set(index["weight_map"].values()) == set(files)
    assert_same_tensors(tensors(tmp_path / "parts"), tensors(FIXTURES / "fla/default"))
    for ours, theirs in zip(leaves(model), leaves(interop.load(tmp_path / "parts")), strict=True):
        assert (ours == theirs).all()
    (tmp_path / "parts" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-0000\d.safetensors is missing"):
        interop.load(tmp_path / "parts")


@pytest.mark.parametrize(
    ("values", "width"), [({}, 512), ({"hidden_ratio": None}, 1024), ({"hidden_ratio": 3}, 768)]
)
def test_the_feed_forward_width_that_fla_derives(values, width):
    # Two thirds of ratio * hidden_size, up to a multiple of 256; without a ratio it is 2.
    assert interop.fla.read_config({"hidden_size": 384} | values, {}).model.ffn_width == width


@pytest.mark.parametrize(("width", "expanded"), [(100, 58), (60, 123), (1000, 1001), (48, 96)])
def test_expansions_survive_any_rounding(width, expanded):
    config = presets.fla(d_model=width, n_heads=1, key_dim=width, value_dim=expanded)
    written = interop.fla.LAYOUT.write_config(Description(config))
    assert int(width * written["expand_v"]) == expanded
    assert interop.fla.read_config(written, {}).model == dataclasses.replace(
        config, ffn_dim=config.ffn_width
    )


def test_gates_that_older_fla_fused_are_split(tmp_path):
    directory = copy_of("fla/default", tmp_path / "old")

    def fuse(found):
        for layer in range(2):
            name = f"model.layers.{layer}.mlp."
            up = found.pop(name + "up_proj.weight")
            found[name + "gate_proj.weight"] = np.concatenate(
                [found[name + "gate_proj.weight"], up]
            )

    edit_tensors(directory, fuse)
    old, new = interop.load(directory), interop.load(FIXTURES / "fla/default")
    for ours, theirs in zip(leaves(old), leaves(new), strict=True):
        assert (ours == theirs).all()


def test_unfused_head_norm_of_fla_keeps_its_name(tmp_path):
    directory = copy_of("fla/default", tmp_path / "unfused")

    def rename(found):
        for name in [name for name in found if "g_norm_swish_gate" in name]:
            found[name.replace("g_norm_swish_gate", "g_norm")] = found.pop(name)

    edit_tensors(directory, rename)
    edit_config(directory, fuse_norm=False)
    model = interop.load(directory)
    for ours, theirs in zip(
        leaves(model), leaves(interop.load(FIXTURES / "fla/default")), strict=True
    ):
        assert (ours == theirs).all()
    interop.save(model, tmp_path / "out", "fla_unfused")
    assert_same_tensors(tensors(tmp_path / "out"), tensors(directory))
    assert config_values(tmp_path / "out")["fuse_norm"] is False


def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    expected = interop.load(FIXTURES / "torchscale_head/a_h4")
    interop.torchscale.save(expected, tmp_path / "fairseq", torch_file=True)
    content = torch.load(tmp_path / "fairseq/model.pt", weights_only=True)
    assert "decoder.layers.1.retention.g_proj.weight" in content["model"]
    # As fairseq saves it: options inside, no config.json.
    import argparse

    options = argparse.Namespace(**config_values(FIXTURES / "torchscale_head/a_h4"))
    torch.save(content | {"cfg": {"model": options}}, tmp_path / "fairseq/model.pt")
    (tmp_path / "fairseq/config.json").unlink()
    shutil.copytree(tmp_path / "fairseq", tmp_path / "old")
    del options.vocab_size  # fairseq's dictionary knows it
    options.max_target_positions = options.moe_freq = None
    torch.save(
        content | {"args": options},
        tmp_path / "old/model.pt",
        _use_new_zipfile_serialization=False,
    )
    plain = copy_of("torchscale_head/a_h4", tmp_path / "plain")
    state = {
        name: torch.from_numpy(value).to(torch.bfloat16) for name, value in tensors(plain).items()
    }
    torch.save(state, plain / "checkpoint.pth")
    (plain / "weights.safetensors").unlink()
    for directory, dtype in (
        (tmp_path / "fairseq", np.float32),
        (tmp_path / "old", np.float32),
        (plain, ml_dtypes.bfloat16),
    ):
        for ours, theirs in zip(leaves(interop.load(directory)), leaves(expected), strict=True):
            assert (ours == theirs.astype(dtype)).all()


def test_a_pickle_is_loaded_as_tensors_alone(tmp_path):
    torch = pytest.importorskip("torch")
    directory = copy_of("torchscale_head/a_h4", tmp_path / "evil")
    (directory / "weights.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Evil()}, directory / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt cannot be loaded as tensors alone"):
        interop.load(directory)
    assert not (tmp_path / "executed").exists()


def test_sharded_import_equals_the_whole(monkeypatch):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    whole = interop.load(FIXTURES / "fla/default")
    matrices = {leaf.shape for leaf in jax.tree.leaves(whole) if leaf.size > 1000}
    before, read, copies = jax.live_arrays(), LayoutSource.read, []

    def watched(self, *place):
        old = set(map(id, before))
        copies.extend(
            array.shape
            for array in jax.live_arrays()
            if id(array) not in old and array.shape in matrices and array.is_fully_replicated
        )
        return read(self, *place)

    monkeypatch.setattr(LayoutSource, "read", watched)
    sharded = interop.load(FIXTURES / "fla/default", mesh)
    assert copies == []  # at no time
    assert len(mesh.devices.flat) == 8
    split = 0
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()
        assert len(ours.addressable_shards) == 8
        if ours.size > 1000:
            split += 1
            assert {shard.data.size for shard in ours.addressable_shards} == {ours.size // 8}
    assert split == 10  # embedding, head and eight stacks of matrices
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (8, 5)))
    with jax.set_mesh(mesh):
        logits, _ = jax.jit(lambda model: model(tokens))(sharded)
    np.testing.assert_allclose(logits, whole(tokens)[0], rtol=0, atol=1e-4)


def test_what_changes_no_parameter_can_be_given(tmp_path):
    model = load_pretrained(FIXTURES / "fla/default", dtype="bfloat16", chunk_size=7, remat="full")
    assert (model.config.dtype, model.config.chunk_size, model.config.remat) == (
        "bfloat16",
        7,
        "full",
    )
    with pytest.raises(ConfigError, match="n_layers=3 needs other parameters"):
        load_pretrained(FIXTURES / "fla/default", n_layers=3)
    with pytest.raises(ConfigError, match="layers=3: model has no such field"):
        load_pretrained(FIXTURES / "fla/default", layers=3)


# Conversions.


@pytest.mark.parametrize(
    ("case", "layouts"),
    [
        ("fla/default", ("own", "fla_unfused", "own", "fla")),
        ("fla/variant", ("fla", "own", "fla")),
        ("torchscale_head/b_shared", ("own", "syncdoth", "own", "torchscale")),
        ("torchscale_head/f_deepnorm", ("syncdoth", "torchscale")),
        ("torchscale_legacy/l_paper", ("own", "torchscale")),
        ("syncdoth/glu", ("torchscale", "own", "syncdoth")),
        ("syncdoth/ffn", ("own", "syncdoth")),
    ],
)
def test_conversions_come_back_to_the_same_tensors(case, layouts, tmp_path):
    source, expected = FIXTURES / case, interop.load(FIXTURES / case)
    for number, layout in enumerate(layouts):
        target = tmp_path / f"{number}"
        interop.convert(source, target, layout, max_file_bytes=50_000)
        source = target
        for ours, theirs in zip(leaves(interop.load(target)), leaves(expected), strict=True):
            assert ours.tobytes() == theirs.tobytes()
    assert interop.load(target).config == expected.config
    assert_same_tensors(tensors(target), tensors(FIXTURES / case))


@pytest.mark.parametrize(
    ("case", "layout", "reasons"),
    [
        ("fla/default", "torchscale", ["rotation is 'rope'.*no permutation", "row_normalizer"]),
        ("fla/default", "syncdoth", ["rotation", "head_norm_scale is True.*--fold_head_norm"]),
        ("torchscale_head/a_h4", "fla", ["rotation is 'torchscale'", "row_normalizer is True"]),
        ("torchscale_legacy/l_paper", "syncdoth", ["norm is 'layer'", "mixer_bias"]),
        ("torchscale_legacy/l_paper", "fla", ["ffn is 'gelu'", "embedding_scale"]),
        ("syncdoth/ffn", "torchscale", ["ffn is 'gelu', torchscale has 'swiglu'", "ffn_bias"]),
    ],
)
def test_what_is_not_exact_is_refused_with_the_reasons(case, layout, reasons, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot be written as {layout}") as error:
        interop.convert(FIXTURES / case, tmp_path / "out", layout)
    for reason in reasons:
        assert re.search(reason, str(error.value)), str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("preset", "sizes", "options", "post_norm"),
    [
        ("torchscale", {"deepnorm": True, "post_norm": True}, {"deepnorm": True}, True),
        ("torchscale", {"deepnorm": True}, {"deepnorm": True}, False),
        ("torchscale", {"post_norm": True}, {"decoder_normalize_before": False}, True),
        (
            "paper",
            {"deepnorm": True, "post_norm": True, "ffn_norm": None},
            {"deepnorm": True},
            True,
        ),
        ("paper", {}, {"decoder_normalize_before": False}, False),
    ],
)
def test_where_torchscales_norms_are(preset, sizes, options, post_norm, tmp_path):
    """Its versions differ in what deepnorm and subln make of decoder_normalize_before."""
    config = getattr(presets, preset)(d_model=8, n_layers=1, n_heads=2, vocab_size=5, **sizes)
    interop.torchscale.save(new(config), tmp_path / "in")
    values = config_values(tmp_path / "in")
    for name in ("deepnorm", "subln", "decoder_normalize_before"):
        del values[name]
    (tmp_path / "in/config.json").write_text(json.dumps(values | options))
    found = interop.load(tmp_path / "in").config
    assert (found.post_norm, found.deepnorm, found.ffn_norm) == (
        post_norm,
        config.deepnorm,
        config.ffn_norm,
    )


def test_norms_that_torchscale_of_2023_would_move_are_refused(tmp_path):
    for sizes in ({"post_norm": True}, {"deepnorm": True, "ffn_norm": None}):
        model = new(presets.paper(d_model=8, n_heads=2, **sizes))
        with pytest.raises(ConfigError, match=r"model\.post_norm is"):
            interop.torchscale.save(model, tmp_path / "out")


def test_a_transformer_is_refused(tmp_path):
    model = new(ModelConfig(d_model=32, mixer="attention"))
    with pytest.raises(ConfigError, match="this is a Transformer"):
        interop.fla.save(model, tmp_path / "out")
    interop.save(model, tmp_path / "own", "own")
    for ours, theirs in zip(leaves(model), leaves(interop.load(tmp_path / "own")), strict=True):
        assert (ours == theirs).all()


def test_the_head_norm_folds_into_the_output_projection(tmp_path):
    interop.convert(FIXTURES / "fla/default", tmp_path / "out", "fla", fold_head_norm=True)
    assert config_values(tmp_path / "out")["elementwise_affine"] is False
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 9)))
    with jax.enable_x64(True):
        before, after = (
            interop.load(directory, dtype="float64")(tokens)[0]
            for directory in (FIXTURES / "fla/default", tmp_path / "out")
        )
    # The folded projection is rounded to float32 once more.
    assert 0 < np.abs(before - after).max() < 1e-5 * np.abs(before).max()
    with pytest.raises(ConfigError, match="no scale in the head norm"):
        interop.convert(tmp_path / "out", tmp_path / "twice", "fla", fold_head_norm=True)


def test_tokenizer_files_come_along_and_nothing_is_overwritten(tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (directory / name).write_text(name)
    interop.convert(directory, tmp_path / "out", "own")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        interop.convert(directory, tmp_path / "out", "own")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="layout='hf' is not one of own, fla"):
        interop.convert(directory, tmp_path / "new", "hf")


# What is refused.


def test_all_wrong_tensors_are_listed_before_anything_is_written(tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")

    def damage(found):
        del found["model.norm.weight"], found["model.layers.1.attn.q_proj.weight"]
        found["model.layers.0.attn.q_conv1d.weight"] = np.zeros((32, 4), np.float32)
        found["lm_head.weight"] = found["lm_head.weight"][:90]

    edit_tensors(directory, damage)
    with pytest.raises(CheckpointError) as error:
        interop.convert(directory, tmp_path / "out", "own")
    lines = str(error.value).split("\n  ")
    assert lines[0].endswith("does not hold the fla model that its config describes:")
    assert lines[1:] == [
        "lm_head.weight: (96, 32) is expected, (90, 32) is there",
        "model.layers.0.attn.q_conv1d.weight: nothing is expected, (32, 4) is there",
        "model.layers.1.attn.q_proj.weight: (32, 32) is expected, nothing is there",
        "model.norm.weight: (32,) is expected, nothing is there",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("fla/default", {"attn": {"layers": [1]}}, "hybrid attention"),
        ("fla/default", {"use_short_conv": True}, "short convolutions"),
        ("fla/default", {"feature_map": "relu"}, "feature map"),
        ("fla/default", {"num_kv_heads": 2}, "key heads shared"),
        ("fla/default", {"use_output_gate": False}, "no output gate"),
        ("fla/default", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("fla/default", {"expand_k": 0.51}, "hidden_size=32 times expand_k=0.51"),
        ("fla/default", {"num_heads": 5}, "n_heads=5"),
        ("torchscale_head/a_h4", {"moe_freq": 2}, "moe_freq=2: mixture of experts"),
        ("torchscale_head/a_h4", {"multiway": True}, "multiway"),
        ("torchscale_head/a_h4", {"activation_fn": "tanh"}, "activation_fn='tanh'"),
        ("torchscale_head/a_h4", {"vocab_size": -1}, "vocab_size=-1"),
        ("torchscale_head/a_h4", {"decoder_layers": "2"}, "decoder_layers='2' is no int"),
        (
            "fla/default",
            {"hidden_size": "32", "expand_k": "1"},
            "'32' is no int\n.*'1' is no float",
        ),
        ("syncdoth/glu", {"moe_freq": 2, "multiway": True}, "mixture of experts\n.*multiway"),
        ("syncdoth/glu", {"vocab_size": 96.0}, "vocab_size=96.0 is no int"),
        (
            "syncdoth/ffn",
            {"subln": True},
            "decoder_ffn_embed_dim=64 cannot run",
        ),
    ],
)
def test_features_that_are_not_here_are_refused_by_name(case, values, message, tmp_path):
    directory = copy_of(case, tmp_path / "in")
    edit_config(directory, **values)
    with pytest.raises(ConfigError, match=message):
        interop.load(directory)


def test_buffers_and_tied_heads_that_say_something_else_are_refused(tmp_path):
    directory = copy_of("torchscale_head/b_shared", tmp_path / "in")

    def other(found):
        found["retnet_rel_pos.decay"] = found["retnet_rel_pos.decay"] * 2
        found["output_projection.weight"] = found["output_projection.weight"] + 1

    edit_tensors(directory, other)
    with pytest.raises(CheckpointError) as error:
        interop.load(directory)
    assert "retnet_rel_pos.decay: its values are not those that the config gives" in str(
        error.value
    )
    assert "output_projection.weight: differs from embed_tokens.weight" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_damaged_file_is_refused_by_name(keep, tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing, truncated"):
        interop.load(directory)


def test_directories_that_hold_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="is no directory"):
        interop.load(tmp_path / "nowhere")
    directory = copy_of("fla/default", tmp_path / "in")
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json is no index"):
        interop.load(directory)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config.json holds a list"):
        interop.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not valid JSON"):
        interop.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        interop.load(directory)
    save_file(
        {"transformer.wte.weight": np.zeros((3, 2), np.float32)}, directory / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"no layout.*transformer.wte.weight"):
        interop.load(directory)
    save_file({"embedding": np.zeros(3, np.int32)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="embedding is I32"):
        interop.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        interop.load(directory)
    for name in ("a.pt", "b.bin"):
        (directory / name).touch()
    with pytest.raises(CheckpointError, match=r"several PyTorch files \(a.pt, b.bin\)"):
        interop.load(directory)


@pytest.mark.compiles(80, reason="a model outside of jit")
def test_score_clamp_is_for_the_parallel_form_from_the_beginning():
    model = interop.load(FIXTURES / "torchscale_head/c_h1", score_clamp="absolute")
    tokens = jnp.ones((1, 3), int)
    _, state = model(tokens, form="parallel")
    for arguments in ({"form": "chunkwise"}, {"form": "parallel", "state": state}):
        with pytest.raises(ValueError, match="set score_clamp=None"):
            model(tokens, **arguments)
