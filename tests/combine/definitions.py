"""What each combination is, in float64 NumPy, written apart from the package: from the factors of LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Factors = tuple[np.ndarray, np.ndarray, float]
"""`up (out, r)`, `down (r, in)` and the scale of their product."""


def updates(sources: Sequence[Factors]) -> list[np.ndarray]:
    return [scale * up.astype(np.float64) @ down.astype(np.float64) for up, down, scale in sources]


def exact_sum(sources: Sequence[Factors], weights: Sequence[float]) -> np.ndarray:
    return sum(weight * update for weight, update in zip(weights, updates(sources), strict=True))


def keep_largest(x: np.ndarray, density: float) -> np.ndarray:
    count = int(density * x.size)
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    kept = np.zeros(x.size)
    kept[order[:count]] = x.reshape(-1)[order[:count]]
    return kept.reshape(x.shape)


def mean_of_winners(tensors: Sequence[np.ndarray], weights: Sequence[float], method: str = "total") -> np.ndarray:
    """TIES after trimming: a negative weight is the negated tensor with a positive one."""
    signed = [np.sign(weight) * tensor for tensor, weight in zip(tensors, weights, strict=True)]
    votes = np.array([tensor if method == "total" else np.sign(tensor) for tensor in signed]).sum(0)
    winner = np.where(votes >= 0, 1, -1)
    total, count = np.zeros_like(signed[0]), np.zeros_like(signed[0])
    for tensor, weight in zip(signed, weights, strict=True):
        agrees = np.sign(tensor) == winner
        total += agrees * tensor * abs(weight)
        count += agrees
    return total / np.maximum(count, 1)


def weighted(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    return sum(weight * tensor for tensor, weight in zip(tensors, weights, strict=True))


def of_factors(
    sources: Sequence[Factors],
    weights: Sequence[float],
    merge: Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray] = weighted,
    drop: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> np.ndarray:
    """Each factor merged by itself with the root of weight and scale, whose sign is on one side."""
    parts = [weight * scale for weight, (_, _, scale) in zip(weights, sources, strict=True)]
    roots = [abs(part) ** 0.5 for part in parts]
    up = merge([drop(up.astype(np.float64)) for up, _, _ in sources], roots)
    down = merge(
        [drop(down.astype(np.float64)) for _, down, _ in sources],
        [root * np.sign(part) for root, part in zip(roots, parts, strict=True)],
    )
    return up @ down


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def lost(matrix: np.ndarray, rank: int) -> float:
    """The share of a matrix's Frobenius norm that its best approximation of this rank lacks."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))


def slerp(sources: Sequence[Factors], t: float) -> np.ndarray:
    first, second = updates(sources)
    cosine = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


def knots(
    sources: Sequence[Factors],
    weights: Sequence[float],
    merge: Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray],
    drop: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The updates side by side, decomposed; what is each one's own of the right vectors is merged."""
    side_by_side = np.concatenate(updates(sources), axis=1)
    left, values, right = np.linalg.svd(side_by_side, full_matrices=False)
    rank = int((values > 1e-9 * values[0]).sum())
    own = np.split(right[:rank], len(sources), axis=1)
    return (left[:, :rank] * values[:rank]) @ merge([drop(part) for part in own], weights)


def without_outliers(x: np.ndarray, density: float, gamma: float) -> np.ndarray:
    order = np.argsort(-np.abs(x), axis=None, kind="stable")
    first = int(gamma * x.size)
    chosen = order[first : first + int(density * x.size)]
    kept = np.zeros(x.size)
    kept[chosen] = x.reshape(-1)[chosen]
    return kept.reshape(x.shape)
