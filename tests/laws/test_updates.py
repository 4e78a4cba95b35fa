"""What a method says that its update adds to an output is what its own path adds."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray.layers import contract

from .cases import CASES, IDS


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_apply_is_the_base_and_the_update(case):
    method, layer, x = case.method, case.layer, case.inputs()
    w = layer.view(case.weight())
    prepared = method.prepare(case.params(), layer)
    update = method.apply_update(prepared, x, None if method.adds_apart() else w, layer)
    total = contract(x, w, layer) + update
    np.testing.assert_allclose(total, method.apply(prepared, x, w, layer), atol=1e-10)
