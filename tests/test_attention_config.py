"""The options of attention layers: as text and JSON, their checks, and the sizes that follow."""

import dataclasses

import numpy as np
import pytest
from test_hybrids import CONFIGS, SIZES, WINDOWED

from retnet_jax.config import Config
from retnet_jax.config.as_json import config_from_json, to_json
from retnet_jax.errors import ConfigError
from retnet_jax.interop import presets
from retnet_jax.model.parameters import parameter_shapes
from retnet_jax.programs.overrides import option_from_text


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_follow_from_the_config(name):
    config = CONFIGS[name]
    for each in (config, config.transformer_twin(), presets.fla(**SIZES | {"n_layers": 4})):
        count = sum(np.prod(shape) for shape in parameter_shapes(each).values())
        assert count == each.parameter_count()
    twin = config.transformer_twin()
    assert not twin.attention_layers
    assert abs(twin.parameter_count() / config.parameter_count() - 1) < 0.02


def test_flops_of_a_window_do_not_grow_with_the_row():
    flops = {
        name: [c.training_flops_per_token(t) for t in (5, 1000, 10**6)]
        for name, c in CONFIGS.items()
    }
    assert flops["window"][2] / flops["window"][1] - 1 < 1e-3
    assert flops["hybrid"][2] / flops["hybrid"][1] - 1 < 1e-3
    wide = dataclasses.replace(CONFIGS["window"], window=None)
    assert wide.training_flops_per_token(5) == flops["window"][0]
    assert flops["both"][2] > 10 * flops["both"][1]


TEXTS = [
    ("1,3:n_heads=4,n_kv_heads=2,window=5", (WINDOWED,)),
    (
        "2:n_heads=2,bias=True,rope_base=500;1:n_heads=4,n_kv_heads=1,window=7",
        CONFIGS["both"].attention_layers,
    ),
    ("()", ()),
]


@pytest.mark.parametrize(("text", "entries"), TEXTS)
def test_attention_layers_as_text_and_json(text, entries):
    assert option_from_text("model.attention_layers", text) == entries
    assert entries == () or ";".join(map(str, entries)) == text
    config = Config(model=dataclasses.replace(CONFIGS["both"], attention_layers=entries))
    assert config_from_json(to_json(config)) == config


@pytest.mark.parametrize(
    "text", ["1", "1:heads=2", "1:window=2", "one:n_heads=2", "1:n_heads=two", "1:n_heads=2,bias=x"]
)
def test_unreadable_attention_layers(text):
    with pytest.raises(ConfigError, match=r"is not LAYERS:SETTINGS such as 1,5:n_heads=8"):
        option_from_text("model.attention_layers", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 4)}, r"attention_layers\[0\].layers=\(1, 4\): layer 4 is not one of the 4"),
        ({"layers": (1, 1)}, "layer 1 is listed twice"),
        ({"layers": ()}, r"attention_layers\[0\].layers is empty"),
        ({"n_heads": 3}, r"attention_layers\[0\].n_heads=3 gives heads of width 16/3"),
        ({"n_kv_heads": 3}, r"attention_layers\[0\].n_kv_heads=3 does not divide"),
        ({"window": 0}, r"attention_layers\[0\].window=0 is less than 1"),
        ({"window": 2.5}, r"attention_layers\[0\].window=2.5 is not of type"),
        ({"rope_base": -1.0}, r"attention_layers\[0\].rope_base=-1.0 is not greater than 0"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    entry = dataclasses.replace(WINDOWED, **changes)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIGS["hybrid"], attention_layers=(entry,)).check()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hybrid", {"window": 4}, "model.window=4 is for model.mixer='attention'"),
        (
            "grouped",
            {"attention_layers": (WINDOWED,)},
            "is for model.mixer='retention', not 'attention'",
        ),
        ("grouped", {"n_kv_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=2"),
    ],
)
def test_options_that_would_do_nothing(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIGS[name], **changes).check()
