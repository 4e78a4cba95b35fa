"""Every method trains on the tape as it does on torch: the same files, `prepare` and `apply`, by both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftarray import Adapter
from peftarray.arrays import namespace
from peftarray.autodiff import value_and_grad

from ..laws.cases import CASES, IDS, Case


def loss(case: Case, params, weight, x):
    """One number from the adapted layer's output, with another weight for every entry."""
    y = Adapter(case.method, case.layer, params).forward(x, weight)
    xp = namespace(y)
    size = int(np.prod(tuple(y.shape)))
    weights = np.cos(1.0 + np.arange(size)).reshape(tuple(y.shape))
    return xp.sum(y * (torch.tensor(weights) if torch.is_tensor(y) else weights))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_are_torchs(case):
    params, weight, x = case.params(), case.weight(), case.inputs()
    table = case.method.params(case.layer)
    frozen = [name for name in params if table[name].frozen or params[name].dtype.kind != "f"]
    trains_x = x.dtype.kind == "f"
    given = {"params": params} | ({"x": x} if trains_x else {})
    _, found = value_and_grad(
        lambda p: loss(case, p["params"], weight, p.get("x", x)),
        given,
        frozen=[f"params.{name}" for name in frozen],
        unused="zero",
    )
    tensors = {name: torch.tensor(array, requires_grad=name not in frozen) for name, array in params.items()}
    inputs = torch.tensor(x, requires_grad=trains_x)
    loss(case, tensors, torch.tensor(weight), inputs).backward()
    for name, g in found["params"].items():
        if name in frozen:
            assert g is None
            continue
        theirs = tensors[name].grad
        theirs = np.zeros(params[name].shape) if theirs is None else theirs.numpy()
        np.testing.assert_allclose(g, theirs, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(theirs).max()))
    if trains_x:
        np.testing.assert_allclose(found["x"], inputs.grad.numpy(), rtol=1e-9, atol=1e-9)
