"""Options in any text and of any type: accepted ones train, others are refused by name."""

import contextlib
import dataclasses
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from properties import holds_for, sizes

from retnet_jax import config as options_of
from retnet_jax.config import Config, OptimizerConfig, TrainConfig
from retnet_jax.config.as_json import config_from_json, options, to_json
from retnet_jax.errors import ConfigError
from retnet_jax.programs.overrides import apply, option_from_text
from retnet_jax.training.clock import Clock, peak_flops
from retnet_jax.training.optim import learning_rate_factor, make_optimizer

NAN, INF = float("nan"), float("inf")
VALUES = [
    *(NAN, INF, -INF, 0, 0.0, -1, -0.5, 1, 3, 0.3, 1e300, -1e300, 1e-300, 1e-50, 1e30, 3.5e38),
    *(10**400, -(10**400), 2**31, 2**40, True, False, None, "x", "", "1", "nan", b"x", 1j),
    *(np.float32(0.5), np.float32(NAN), np.float64(0.5), np.float64(INF), np.int64(3)),
    *(np.bool_(True), np.zeros(2)),
    *((), [], [1], ("a",), (1.5,), (1, 2), (0.1, 0.2), (0.1, NAN), (True,), (None,), (10**400,)),
    *({}, {"a": 0.5}, {"a": NAN}, {"a": 10**400}, {"a": "x"}, {"a": True}, {1: 0.5}),
]
TEXTS = [
    *("nan", "inf", "-inf", "NaN", "1e400", "1e-50", "0", "-1", "", "None", "true", "x", "1,2"),
    *("(1,2)", "{}", "{'a':nan}", "a:nan", "a:inf", "a:0.5", "1/0", "0/0", "1e308/1e-308", "\0"),
    *("1" + "0" * 400, "1" * 5000, "1e6", "0.3", "[[", "\n", "nan,nan", "é", "\udcff"),
]
JSON = [
    *("NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "1" * 5000, "null", "true", "1.5"),
    *("-1", "0", '"x"', '"\\ud800"', "[]", "{}", "[NaN]", "[1e400, 1]", "[[1]]", '{"a": NaN}'),
    *('{"a": 1%s}' % ("0" * 400), "[" * 5000, '"\\u0000"', "[true]", "1e-50"),
]


def with_option(name, value):
    config = Config()
    apply(config, [(name, value)])
    return config


def is_sound(config):
    """Whether a config is accepted: then its numbers are finite and its types are declared."""
    config.check()
    json.dumps(dataclasses.asdict(config), allow_nan=False)
    read = config_from_json(to_json(config))  # this asks for the types of the fields
    return read == config and np.isfinite(np.float32(numbers_in(dataclasses.asdict(read)))).all()


def numbers_in(values):
    if isinstance(values, dict | tuple):
        inner = values.values() if isinstance(values, dict) else values
        return [number for value in inner for number in numbers_in(value)]
    return [values] if isinstance(values, int | float) else []


@pytest.mark.parametrize("name", options())
def test_an_option_is_a_value_of_its_type_or_an_error_with_its_name(name):
    field = name.rpartition(".")[2]
    for value in VALUES:
        try:
            assert is_sound(with_option(name, value)), value
        except ConfigError as error:
            message = str(error)
        else:
            continue
        assert field in message
        parts = value if isinstance(value, tuple | dict) else ()
        shown = {str(value), *map(repr, [value, *parts, *getattr(parts, "values", tuple)()])}
        # Long integers are told by their length.
        assert any(x in message for x in (*shown, "is empty", "=nan", " bits")), message
    for text in TEXTS:
        with contextlib.suppress(ConfigError):
            assert is_sound(with_option(name, option_from_text(name, text))), text
    section, _, field = name.rpartition(".")
    for text in JSON:
        values = json.loads(to_json(Config()))
        (values[section] if section else values)[field] = "@"
        with contextlib.suppress(ConfigError):
            assert is_sound(config_from_json(json.dumps(values).replace('"@"', text))), text


@pytest.mark.parametrize("section", [x.name for x in dataclasses.fields(Config)])
@pytest.mark.parametrize("value", [None, 3, {"steps": 3}, TrainConfig])
def test_a_section_is_one(section, value):
    with pytest.raises(ConfigError, match=rf"^{section}=.* is not of type "):
        Config(**{section: value}).check()


CHOICES = [x for name in ("OPTIMIZERS", "SCHEDULES", "DTYPES") for x in getattr(options_of, name)]
BY_TYPE = {
    float: st.one_of(
        st.floats(-45, 30).map(lambda power: 10**power),
        st.floats(0, 1),
        st.sampled_from([0.0, 1.0, -1.0, NAN, INF, 1e300, 0.99999999, 0.9999999, 1e-38]),
    ),
    int: st.one_of(st.integers(0, 12), st.sampled_from([-1, 375, 2**31 - 2, 2**31, 2**40])),
    str: st.sampled_from(CHOICES),
}


@st.composite
def optimizers(draw):
    """The default but for some options, and a number of steps."""
    fields = draw(st.lists(st.sampled_from(dataclasses.fields(OptimizerConfig)), max_size=4))
    values = {"warmup_steps": 2} | {field.name: draw(BY_TYPE[field.type]) for field in fields}
    steps = draw(st.one_of(st.integers(1, 20), st.sampled_from([2**31 - 1, 2**31, 10**6])))
    return Config(optimizer=OptimizerConfig(**values), train=TrainConfig(steps=steps))


def is_accepted(config):
    try:
        config.check()
    except ConfigError:
        return False
    return True


class Parameters(NamedTuple):
    """What `make_optimizer` tells apart by names."""

    kernel: jax.Array
    embedding: jax.Array
    scale: jax.Array


RNG = np.random.default_rng(0)
PARAMETERS = Parameters(*(RNG.normal(size=x).astype("f4") for x in ((2, 4, 3), (4, 3), (3,))))
ROWS = Parameters(*(np.arange(x.size).reshape(x.shape) % 4 > 1 for x in PARAMETERS))


@pytest.mark.compiles(150, reason="each operation of the optimiser by itself, so that none is new")
@sizes(60, 1000)
def test_accepted_options_give_finite_rates_and_updates(most):
    seen = {True: 0, False: 0}

    @holds_for(most, config=optimizers())
    def finite(config):
        seen[is_accepted(config)] += 1
        if not is_accepted(config):
            return
        steps, warm_up = config.train.steps, config.optimizer.warmup_steps
        factor = learning_rate_factor(config.optimizer, steps)
        near = {0, 1, warm_up - 1, warm_up, warm_up + 1, steps // 2, steps - 1}
        for step in (step for step in near if 0 <= step < steps):
            for peak in (config.optimizer.learning_rate, config.optimizer.muon_learning_rate):
                rate = np.float32(peak) * np.float32(factor(jnp.int32(step)))
                assert np.isfinite(rate), step
                assert 0 <= rate <= np.float32(peak) * 1.00001, step
        optimizer = make_optimizer(config.optimizer, steps)
        with jax.disable_jit():
            parameters, state = PARAMETERS, optimizer.init(PARAMETERS)
            for size in (0, 1, 1e-6):
                gradients = jax.tree.map(lambda x, row, size=size: size * x * row, PARAMETERS, ROWS)
                updates, state = optimizer.update(gradients, state, parameters)
                parameters = jax.tree.map(np.add, parameters, updates)
                for leaf in jax.tree.leaves((updates, parameters, state)):
                    assert np.isfinite(np.asarray(leaf, "f4")).all(), size

    assert min(seen.values()) > most / 8


@sizes(50, 500)
def test_shares_of_the_time_are_shares_however_clocks_are_set(most):
    """And there is no share of a peak that no data sheet names, as that of CPUs."""
    assert peak_flops(jax.devices()) is None

    @holds_for(
        most, before=st.floats(-1e9, 1e9), trained=st.floats(0, 1e9), steps=st.integers(1, 3)
    )
    def shares(before, trained, steps):
        clock = Clock(100, 1e6, peak_flops(jax.devices()))
        clock.restore(time.time() - before, trained)
        with clock.waiting("evaluation"):
            pass
        for _ in range(steps):
            clock.step()
        lap = clock.lap()
        assert "mfu" not in lap
        assert 0 < lap["goodput"] <= 1
        assert all(0 <= x <= 1 for name, x in lap.items() if name.endswith("_wait"))
        assert lap["training_seconds"] >= trained
