"""Formulas that some libraries have in one piece, against the same formulas in the plainest form."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray.arrays import add_matmul, add_product, by_rows, row_norms, spaced, thin_product

ROWS, COLUMNS = 301, 2048  # more than one block, and a last one that is not full


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_sums_and_products(asarray, to_numpy, dtype, rank):
    draw = np.random.default_rng(0)
    shapes = (ROWS, COLUMNS), (ROWS, rank), (rank, COLUMNS)
    base, left, right = (draw.standard_normal(shape).astype(dtype) for shape in shapes)
    moved = [asarray(array) for array in (base, left, right)]
    product = left.astype(float) @ right.astype(float)
    tolerance = {"rtol": 0, "atol": 5e-5 if dtype is np.float32 else 1e-12}
    np.testing.assert_allclose(to_numpy(thin_product(*moved[1:])), product, **tolerance)
    np.testing.assert_allclose(to_numpy(thin_product(moved[1], spaced(moved[2]))[:, :COLUMNS]), product, **tolerance)
    np.testing.assert_allclose(to_numpy(add_matmul(*moved)), base + product, **tolerance)
    scaled = add_product(moved[0], moved[1][:, :1], moved[0])
    np.testing.assert_allclose(to_numpy(scaled), base + left[:, :1] * base, **tolerance)
    np.testing.assert_allclose(to_numpy(row_norms(moved[0])), np.sqrt((base.astype(float) ** 2).sum(1)), **tolerance)
    assert add_matmul(*moved).dtype == moved[0].dtype


def test_short_and_long_numbers_meet_as_in_the_plain_formula(asarray, to_numpy):
    base, left, right = asarray(np.ones((2, 3))), *(asarray(np.ones(s, np.float32)) for s in ((2, 1), (1, 3)))
    assert add_product(base, left, right).dtype == base.dtype
    np.testing.assert_array_equal(to_numpy(add_product(base, left, right)), 2)


@pytest.mark.parametrize("rows", [0, 1, 128, ROWS])
def test_blocks_of_rows_make_the_whole(asarray, to_numpy, rows):
    matrix = np.random.default_rng(0).standard_normal((rows, COLUMNS))
    moved = asarray(matrix)
    made = by_rows(lambda block: moved[block, ...] * 2, moved)
    np.testing.assert_array_equal(to_numpy(made), 2 * matrix)
