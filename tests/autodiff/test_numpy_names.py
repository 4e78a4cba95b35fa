"""Model code that calls NumPy itself, by its functions or methods: the same code runs on torch as the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftarray.autodiff import value_and_grad

CODE = {
    "ufuncs": (lambda a, b: np.power(np.absolute(a), 1.5) + np.true_divide(b, 2.0) + np.arctan2(a, b), None),
    "arc": (lambda a, b: np.arctan(a) + np.arcsinh(b) + np.conjugate(a), None),
    "products": (lambda a, b: np.dot(a, b.T) + np.inner(a, b) + np.matmul(a, np.transpose(b)), None),
    "three axes": (
        lambda a, b: np.dot(a, np.stack([b.T, b.T])),
        lambda a, b: torch.tensordot(a, torch.stack([b.T, b.T]), dims=([-1], [-2])),
    ),
    "dot of a number": (lambda a, b: np.dot(a[0, 0], b), lambda a, b: a[0, 0] * b),
    "einsum": (
        lambda a, b: np.einsum("ij,kj->ik", a, b) * np.einsum("ij,ij", a, b),
        lambda a, b: torch.einsum("ij,kj->ik", a, b) * torch.einsum("ij,ij", a, b),
    ),
    "einsum over an axis": (
        lambda a, b: np.einsum("ij,kl->jl", a, b),
        lambda a, b: torch.einsum("ij,kl->jl", a, b),
    ),
    "extremes": (lambda a, b: np.amax(a, axis=1) * np.amin(b), lambda a, b: torch.amax(a, 1) * torch.amin(b)),
    "shapes": (
        lambda a, b: np.concatenate([np.swapaxes(a, 0, 1), np.reshape(b, (3, 2))], -1) + np.ravel(a)[0],
        lambda a, b: torch.cat([a.T, b.reshape(3, 2)], -1) + a.ravel()[0],
    ),
    "split": (
        lambda a, b: np.split(a, 3, axis=-1)[1] * np.split(b, [1, 2], -1)[2] + np.copy(b),
        lambda a, b: a[:, 1:2] * b[:, 2:] + b,
    ),
    "spread": (
        lambda a, b: np.var(a, axis=0, ddof=1) + np.std(b, ddof=2) + a.std(1, ddof=1)[0] + np.take(a, 1, axis=0),
        lambda a, b: a.var(0, correction=1) + b.std(correction=2) + a.std(1)[0] + a[1],
    ),
    "running sums": (
        lambda a, b: np.cumsum(a)[:3] + np.cumsum(b, axis=1),
        lambda a, b: torch.cumsum(a.ravel(), 0)[:3] + torch.cumsum(b, 1),
    ),
    "norms": (
        lambda a, b: np.linalg.norm(a) + np.linalg.norm(b, axis=1, keepdims=True) + np.linalg.norm(a, ord=1),
        lambda a, b: (
            torch.linalg.norm(a) + torch.linalg.norm(b, dim=1, keepdim=True) + torch.linalg.matrix_norm(a, ord=1)
        ),
    ),
    "where": (
        lambda a, b: np.where(a > b, a * b, np.maximum(a, 0.0)),
        lambda a, b: torch.where(a > b, a * b, a.clamp(min=0)),
    ),
    "rows": (
        lambda a, b: np.take(a, np.asarray([1, 0, 1]), axis=0) + b[np.asarray([0, 0, 1])],
        lambda a, b: a[[1, 0, 1]] + b[[0, 0, 1]],
    ),
    "methods": (
        lambda a, b: (
            a.reshape(3, 2).T.sum(0) + b.mean(axis=0) + a.transpose(1, 0).max(1) + a.ravel().var() + b.flatten()[0]
        ),
        lambda a, b: a.reshape(3, 2).T.sum(0) + b.mean(0) + a.T.amax(1) + a.var(correction=0) + b.ravel()[0],
    ),
    "more methods": (
        lambda a, b: a.swapaxes(0, 1).dot(b).astype(np.float64).clip(-1, 1).cumsum(axis=1) + a.transpose().copy() @ b,
        lambda a, b: (a.T @ b).clamp(-1, 1).cumsum(1) + a.T @ b,
    ),
    "complex numbers": (lambda a, b: (a + 1j * b).real * (a * 1j - b).imag, lambda a, b: a * a),
    "in place by name": (lambda a, b: add_in_place(a * 1.0, b), lambda a, b: a + b),
    "NumPy's own numbers": (lambda a, b: np.float64(2.0) * a + np.float32(0.5) * b, lambda a, b: 2 * a + b * 0.5),
    "a NumPy array on the left": (lambda a, b: np.ones((2, 2)) @ a - np.ones(3) * b, lambda a, b: a.sum(0) - b),
}


def add_in_place(x, y):
    x += y
    return x


@pytest.mark.parametrize(("code", "reference"), CODE.values(), ids=CODE)
def test_numpy_code_trains_unchanged(code, reference):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 3)), random.standard_normal((2, 3))

    def loss(arrays):
        y = code(*arrays)
        return np.sum(y * np.cos(np.arange(y.size)).reshape(y.shape))

    value, found = value_and_grad(loss, [a, b], unused="zero")
    np.testing.assert_allclose(value, np.sum(code(a, b) * np.cos(np.arange(code(a, b).size)).reshape(code(a, b).shape)))
    if reference is None:  # torch has no such names: slopes along a direction
        way = [random.standard_normal((2, 3)) for _ in range(2)]
        ahead, behind = (loss([a + e * way[0], b + e * way[1]]) for e in (1e-6, -1e-6))
        slope = sum(np.sum(g * w) for g, w in zip(found, way, strict=True))
        assert abs((ahead - behind) / 2e-6 - slope) < 1e-7
        return
    tensors = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    y = reference(*tensors)
    (y * torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)).sum().backward()
    for mine, tensor in zip(found, tensors, strict=True):
        theirs = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(mine, theirs, atol=1e-12)
