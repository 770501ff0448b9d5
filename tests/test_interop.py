"""Checkpoints of other implementations are loaded, and saved as they were."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from foreign_checkpoints import (
    FIXTURES,
    assert_same_tensors,
    copy_of,
    edit_config,
    edit_tensors,
    leaves,
    new,
    tensors,
)

from retnet_jax import interop, load_pretrained
from retnet_jax.config import MeshConfig
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.interop import Description, presets
from retnet_jax.interop.tables import LayoutSource, config_values
from retnet_jax.parallel.mesh import make_mesh

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
def test_a_model_trained_here_is_saved_with_foreign_names_and_loads_bit_for_bit(case, tmp_path):
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
def test_half_precision_files_round_once(name, dtype, tmp_path):
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


def test_a_large_model_is_split_into_files_with_an_index(tmp_path):
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
def test_default_feed_forward_width_of_fla(values, width):
    # Two thirds of ratio * hidden_size, rounded up to a multiple of 256; None means 4.
    assert interop.fla.read_config({"hidden_size": 384} | values, {}).model.ffn_width == width


@pytest.mark.parametrize(("width", "expanded"), [(100, 58), (60, 123), (1000, 1001), (48, 96)])
def test_written_expansion_factors_give_the_same_widths(width, expanded):
    config = presets.fla(d_model=width, n_heads=1, key_dim=width, value_dim=expanded)
    written = interop.fla.LAYOUT.write_config(Description(config))
    assert int(width * written["expand_v"]) == expanded
    assert interop.fla.read_config(written, {}).model == dataclasses.replace(
        config, ffn_dim=config.ffn_width
    )


def test_fused_gates_of_older_fla_are_split(tmp_path):
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


def test_torch_files_of_fairseq_and_plain_ones(tmp_path):
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


def test_a_pickle_with_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    directory = copy_of("torchscale_head/a_h4", tmp_path / "evil")
    (directory / "weights.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Evil()}, directory / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt cannot be loaded as tensors only"):
        interop.load(directory)
    assert not (tmp_path / "executed").exists()


def test_sharded_loading_equals_unsharded_loading(monkeypatch):
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


def test_load_pretrained_changes_only_fields_without_parameters(tmp_path):
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
