"""Which steps are skipped: the planted ones, and not those that a run has by itself.

fixtures/usual_steps.npz holds loss and gradient norm of 2,000 steps in each of several runs without
skipping: NAME_SEED, with "retnet" for the quickstart and "transformer" for its twin.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retnet_jax.training.spikes import judge, nothing_yet

DEVIATIONS = 10.0  # the default of train.spike_deviations
# Steps at ordinary losses whose gradient norm is 12.8 and 366 times the mean. In the first, one row
# is a long run of one token.
LARGE_NORMS = {"retnet_1": [442], "retnet_2": [497]}
USUAL = Path(__file__).parent / "fixtures" / "usual_steps.npz"


@functools.partial(jax.jit, static_argnums=1)
def judged(steps, deviations=DEVIATIONS):
    """Of steps [n 2], loss and norm: whether each is taken [n], and the statistics before it."""

    def body(usual, step):
        good, after = judge(usual, step[0], step[1], deviations, jnp.bool_(True))
        return after, (good, usual)

    return jax.lax.scan(body, nothing_yet(), steps)[1]


@jax.jit
def taken(usual, loss, norm):
    """Whether one more step would be taken, for statistics with a leading axis."""

    def good(*step):
        return judge(*step, DEVIATIONS, jnp.bool_(True))[0]

    return jax.vmap(good)(usual, loss, norm)


def noise(loss_deviation, norm_deviation, count=400):
    rng = np.random.default_rng(0)
    losses = 4 + loss_deviation * rng.standard_normal(count)
    norms = np.exp(norm_deviation * rng.standard_normal(count))
    return jnp.float32(np.stack([losses, norms], axis=1))


@pytest.mark.parametrize("run", list(np.load(USUAL)))
def test_the_steps_of_the_quickstart_are_taken(run):
    steps = np.load(USUAL)[run]
    good, usual = judged(steps)
    skipped = np.flatnonzero(~good) + 1
    assert skipped.tolist() == LARGE_NORMS.get(run, [])
    later = jax.tree.map(lambda x: x[100:], usual)
    means = np.exp(later.mean[:, 1])
    assert not taken(later, later.mean[:, 0] + 3, means).any()
    assert not taken(later, later.mean[:, 0], 10 * means).any()
    assert taken(later, later.mean[:, 0] + 0.15, 9.7 * means).all()


@pytest.mark.parametrize("deviation", [0.001, 0.1, 0.5])
def test_planted_steps_are_skipped_whatever_the_noise_is(deviation):
    steps = noise(deviation, deviation)
    good, usual = judged(steps)
    assert good.all()
    later = jax.tree.map(lambda x: x[100:], usual)
    ones = np.ones(len(later.count), np.float32)
    assert not taken(later, later.mean[:, 0] + 3, ones).any()
    assert not taken(later, 4 * ones, 10.1 * np.exp(later.mean[:, 1])).any()
    assert taken(later, 4 * ones, ones).all()


def test_a_skipped_step_leaves_the_statistics_and_is_counted():
    steps = noise(0.1, 0.1).at[200:203, 0].set(9.0)
    good, usual = judged(steps)
    assert np.flatnonzero(~good).tolist() == [200, 201, 202]
    assert usual.skipped[200:205].tolist() == [0, 1, 2, 3, 0]
    assert usual.count[203] == usual.count[200] == 200
    np.testing.assert_array_equal(usual.mean[203], usual.mean[200])
    np.testing.assert_array_equal(usual.variance[203], usual.variance[200])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(broken):
    steps = noise(0.1, 0.1).at[0, 0].set(broken).at[7, 1].set(broken)
    for deviations in (DEVIATIONS, 0.0):
        good, usual = judged(steps, deviations)
        assert np.flatnonzero(~good).tolist() == [0, 7]
        assert jnp.isfinite(usual.mean).all()
    good, _ = judge(nothing_yet(), jnp.float32(4), jnp.float32(1), 0.0, jnp.bool_(False))
    assert not good


def test_the_first_steps_are_taken_and_without_deviations_all():
    steps = noise(0.1, 0.1).at[49, 0].set(40.0).at[51, 0].set(400.0)
    assert np.flatnonzero(~judged(steps)[0]).tolist() == [51]
    assert judged(steps, 0.0)[0].all()
