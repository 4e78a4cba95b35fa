"""Draws by a key: the same for every library, compiled or not, and as even and independent as dropout needs."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray.draws import KeyedDraws, dropout, step_key
from peftarray.errors import ConfigError


def kept(key, stream="", count=1 << 18, rate=0.5):
    return dropout(np.ones(count, np.float32), rate, key, stream=stream) > 0


def test_libraries_draw_the_same(asarray, to_numpy):
    x = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    expected = dropout(x, 0.3, step_key(5, 7), stream="layers.0.q_proj")
    found = dropout(asarray(x), 0.3, step_key(5, 7), stream="layers.0.q_proj")
    np.testing.assert_array_equal(to_numpy(found), expected)
    draws = KeyedDraws(step_key(5, 7)).uniform((40, 30), asarray(x))
    np.testing.assert_array_equal(to_numpy(draws), KeyedDraws(step_key(5, 7)).uniform((40, 30), x))


def test_a_compiled_step_takes_the_key_as_an_argument():
    jax = pytest.importorskip("jax")
    x = np.ones((64, 64), np.float32)
    compiled = jax.jit(lambda x, key: dropout(x, 0.3, key, stream="a"))
    for step in range(3):
        expected = dropout(x, 0.3, step_key(0, step), stream="a")
        np.testing.assert_array_equal(np.asarray(compiled(x, step_key(0, step))), expected)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate(rate):
    share = 1 - kept(3, rate=rate).mean()
    assert share == pytest.approx(rate, abs=5 * (rate * (1 - rate) / (1 << 18)) ** 0.5)


def test_the_mean_is_kept():
    assert dropout(np.ones(1 << 18, np.float32), 0.25, 3).mean() == pytest.approx(1, abs=0.01)


def test_steps_streams_and_neighbours_are_independent():
    masks = [kept(step_key(0, step), stream) for step in range(4) for stream in ("a", "b")]
    shifted = [masks[0][lag:][: 1 << 17] for lag in (0, 1, 2, 64, 576, 4096)]
    for rows in (masks, shifted):
        off = np.corrcoef(np.array(rows, np.float32)) - np.eye(len(rows))
        assert np.abs(off).max() < 5 * len(rows[0]) ** -0.5


def test_a_part_draws_the_same_when_it_is_run_again():
    draws = KeyedDraws(step_key(0, 0))
    like = np.ones(1, np.float32)
    first = draws.within("layers.0").uniform((8,), like)
    draws.uniform((8,), like)
    np.testing.assert_array_equal(draws.within("layers.0").uniform((8,), like), first)
    assert (draws.within("layers.1").uniform((8,), like) != first).any()


@pytest.mark.parametrize("rate", [1.0, -0.1, "half", True])
def test_bad_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="it must be a number from 0 to below 1"):
        dropout(np.ones(2), rate, 0)
