"""Checkpoints are converted from one layout to another with the same outputs, or refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_checkpoints import FIXTURES, assert_same_tensors, copy_of, leaves, new, tensors

from retnet_jax import interop
from retnet_jax.config import ModelConfig
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.interop import presets
from retnet_jax.interop.tables import config_values


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
def test_conversions_and_back_give_the_same_tensors(case, layouts, tmp_path):
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
def test_inexact_conversions_are_refused_with_the_reasons(case, layout, reasons, tmp_path):
    with pytest.raises(ConfigError, match=f"{layout} cannot express this model") as error:
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
def test_pre_and_post_norm_of_torchscale_options(preset, sizes, options, post_norm, tmp_path):
    """Versions of torchscale differ in how deepnorm and subln override the option."""
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


def test_norm_options_that_torchscale_would_override_are_refused(tmp_path):
    for sizes in ({"post_norm": True}, {"deepnorm": True, "ffn_norm": None}):
        model = new(presets.paper(d_model=8, n_heads=2, **sizes))
        with pytest.raises(ConfigError, match=r"model\.post_norm is"):
            interop.torchscale.save(model, tmp_path / "out")


def test_a_transformer_is_saved_only_in_the_own_layout(tmp_path):
    model = new(ModelConfig(d_model=32, mixer="attention"))
    with pytest.raises(ConfigError, match="this is a Transformer"):
        interop.fla.save(model, tmp_path / "out")
    interop.save(model, tmp_path / "own", "own")
    for ours, theirs in zip(leaves(model), leaves(interop.load(tmp_path / "own")), strict=True):
        assert (ours == theirs).all()


def test_folding_the_head_norm_keeps_the_outputs(tmp_path):
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
    with pytest.raises(ConfigError, match="the head norm of this model has no scale"):
        interop.convert(tmp_path / "out", tmp_path / "twice", "fla", fold_head_norm=True)


def test_tokenizer_files_are_copied_and_nothing_is_overwritten(tmp_path):
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
