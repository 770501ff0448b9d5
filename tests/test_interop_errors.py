"""Foreign checkpoints that are damaged or unsupported are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from foreign_checkpoints import FIXTURES, copy_of, edit_config, edit_tensors
from safetensors.numpy import save_file

from retnet_jax import interop
from retnet_jax.errors import CheckpointError, ConfigError


def test_all_wrong_tensors_are_listed_and_nothing_is_written(tmp_path):
    directory = copy_of("fla/default", tmp_path / "in")

    def damage(found):
        del found["model.norm.weight"], found["model.layers.1.attn.q_proj.weight"]
        found["model.layers.0.attn.q_conv1d.weight"] = np.zeros((32, 4), np.float32)
        found["lm_head.weight"] = found["lm_head.weight"][:90]

    edit_tensors(directory, damage)
    with pytest.raises(CheckpointError) as error:
        interop.convert(directory, tmp_path / "out", "own")
    lines = str(error.value).split("\n  ")
    assert lines[0].endswith("the tensors are not those of the fla model in its config:")
    assert lines[1:] == [
        "lm_head.weight: expected (96, 32), found (90, 32)",
        "model.layers.0.attn.q_conv1d.weight: expected nothing, found (32, 4)",
        "model.layers.1.attn.q_proj.weight: expected (32, 32), found nothing",
        "model.norm.weight: expected (32,), found nothing",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("fla/default", {"attn": {"layers": [1]}}, "has no field num_heads"),
        ("fla/default", {"attn": [{"layers": [1], "num_heads": 2, "qk_norm": True}]}, "qk_norm"),
        ("fla/default", {"attn": {"layers": [7], "num_heads": 2}}, "layer 7 is not one of"),
        ("fla/default", {"attnres_block_size": 2}, "attention residuals"),
        ("fla/default", {"use_short_conv": 1}, "use_short_conv=1 is no bool"),
        ("fla/default", {"feature_map": "elu"}, "model.feature_map='elu' is not one of 'linear'"),
        ("fla/default", {"feature_map": 1}, "feature_map=1 is no str"),
        ("fla/default", {"num_kv_heads": 3}, "n_kv_heads=3 does not divide model.n_heads=4"),
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
def test_unsupported_features_are_refused_by_name(case, values, message, tmp_path):
    directory = copy_of(case, tmp_path / "in")
    edit_config(directory, **values)
    with pytest.raises(ConfigError, match=message):
        interop.load(directory)


def test_wrong_buffers_and_tied_heads_are_refused(tmp_path):
    directory = copy_of("torchscale_head/b_shared", tmp_path / "in")

    def other(found):
        found["retnet_rel_pos.decay"] = found["retnet_rel_pos.decay"] * 2
        found["output_projection.weight"] = found["output_projection.weight"] + 1

    edit_tensors(directory, other)
    with pytest.raises(CheckpointError) as error:
        interop.load(directory)
    assert "retnet_rel_pos.decay: expected the values that follow from the config" in str(
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


def test_directories_without_a_known_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no directory"):
        interop.load(tmp_path / "nowhere")
    directory = copy_of("fla/default", tmp_path / "in")
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json is not an index"):
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
    with pytest.raises(CheckpointError, match=r"unknown layout.*transformer.wte.weight"):
        interop.load(directory)
    save_file({"embedding": np.zeros(3, np.int32)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="embedding has dtype I32"):
        interop.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        interop.load(directory)
    for name in ("a.pt", "b.bin"):
        (directory / name).touch()
    with pytest.raises(CheckpointError, match=r"several PyTorch files \(a.pt, b.bin\)"):
        interop.load(directory)


@pytest.mark.compiles(80, reason="a model outside of jit")
def test_score_clamp_needs_the_parallel_form_without_a_state():
    model = interop.load(FIXTURES / "torchscale_head/c_h1", score_clamp="absolute")
    tokens = jnp.ones((1, 3), int)
    _, state = model(tokens, form="parallel")
    for arguments in ({"form": "chunkwise"}, {"form": "parallel", "state": state}):
        with pytest.raises(ValueError, match="set score_clamp=None"):
            model(tokens, **arguments)
