"""torch's CPU generator without torch: the same bits for every seed, shape and bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftarray.random import TorchStream

torch = pytest.importorskip("torch")

shapes = st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple)
numbers = st.floats(-8, 8).map(lambda bound: round(bound, 6))


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    calls=st.lists(
        st.tuples(shapes, numbers, numbers, st.sampled_from(["float32", "bfloat16", "float16"])), min_size=1, max_size=4
    ),
)
def test_uniform_draws_are_torchs_to_the_bit(seed, calls):
    stream, generator = TorchStream(seed), torch.Generator().manual_seed(seed)
    for shape, a, b, dtype in calls:
        low, high = sorted((a, b))
        expected = torch.empty(shape, dtype=getattr(torch, dtype)).uniform_(low, high, generator=generator)
        np.testing.assert_array_equal(stream.uniform(shape, low, high, dtype), expected.float().numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_draw_that_rounds_up_to_the_open_bound_becomes_the_lower(dtype):
    found = TorchStream(3).uniform((200_000,), -0.3, 0.7, dtype)
    expected = torch.empty(200_000, dtype=getattr(torch, dtype))
    expected.uniform_(-0.3, 0.7, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(found, expected.float().numpy())
    assert found.max() < torch.tensor(0.7, dtype=expected.dtype).item()


def test_a_matrix_takes_up_where_the_one_before_ended():
    """More values than are drawn at once, by He's bound, as PEFT draws VeRA's projections."""
    from peft.tuners.vera.model import _kaiming_init

    stream, generator = TorchStream(5), torch.Generator().manual_seed(5)
    for shape in ((300, 401), (401, 300), (1, 7)):
        expected = _kaiming_init(shape, generator=generator)
        np.testing.assert_array_equal(stream.kaiming_uniform(shape), expected.numpy())
