"""Attention and rotary positions: each beside its plain formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from peftarray.arrays import Array, device, namespace
from peftarray.autodiff.fused.memory import into, row_max
from peftarray.autodiff.primitive import primitive
from peftarray.autodiff.rules import Needs, Result, Wanted
from peftarray.errors import ShapeError

__all__ = ["attention", "rope"]

# So many tokens at a time: their scores stay in the cache, and causal ones end at the last key that they see.
_TOKENS = 64
# Sums of so large exponentials are far from the limits of float32.
_LARGEST_SCORE = 60.0


def _rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions: the first half of the last axis and the second, turned by an angle as pairs.

    `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        x: `(..., t, d)`.
        cos, sin: of the angles, `(t, d / 2)` or any shape that fits `(..., t, d / 2)`; constants.

    Source: Su et al., RoFormer, 2021, section 3.2.2, arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return namespace(x, cos).concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


@primitive(formula=_rope)
def rope(xp: Any, needs: Needs, x: Array, cos: Array, sin: Array) -> Result:
    return _turned(xp, x, cos, sin), lambda g: (_turned(xp, g, cos, -sin), None, None)


def _turned(xp: Any, x: Array, cos: Array, sin: Array) -> Array:
    """`(a, b) (cos, cos) + (b, a) (-sin, sin)`: few passes, and long ones."""
    pairs = xp.reshape(x, (*x.shape[:-1], 2, x.shape[-1] // 2))
    turned = pairs * xp.stack([cos, cos], axis=-2)
    turned += xp.flip(pairs, axis=-2) * xp.stack([-sin, sin], axis=-2)
    return xp.reshape(turned, x.shape)


def _attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, causal: bool = False, scale: float | None = None
) -> Array:
    """Scaled dot-product attention: `softmax(scale q k^T + mask) v`, with grouped heads.

    Args:
        q: `(..., heads, t, d)`.
        k, v: `(..., groups, s, d)`; each serves `heads / groups` heads in a row.
        mask: added to the scores, of a shape that fits `(..., heads, t, s)`. Where it forbids, it holds a large
            negative number; -inf also, as long as no row is all -inf.
        causal: row i of the last t sees no later row of s.
        scale: `1 / sqrt(d)` if None.

    Returns:
        `(..., heads, t, d)`.

    Raises:
        ShapeError: the groups do not divide the heads, or a causal row would see nothing.

    Source: Vaswani et al., Attention Is All You Need, 2017, equation 1, arXiv:1706.03762; Ainslie et al., GQA, 2023,
    section 2.2, arXiv:2305.13245.
    """
    xp = namespace(q, k, v, mask)
    _check_heads(q, k, causal)
    scores = _in_groups(xp, q, k) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = xp.reshape(scores, (*q.shape[:-1], k.shape[-2]))
    scores = scores if mask is None else scores + mask
    scores = scores + _later(xp, scores, q.shape[-2], k.shape[-2]) if causal else scores
    exponentials = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = exponentials / xp.sum(exponentials, axis=-1, keepdims=True)
    return xp.reshape(_in_groups(xp, weights, k) @ v, (*q.shape[:-1], v.shape[-1]))


@primitive(formula=_attention)
def attention(
    xp: Any,
    needs: Needs,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Result:
    _check_heads(q, k, causal)
    (heads, t, d), (groups, s) = q.shape[-3:], k.shape[-3:-1]
    scale = d**-0.5 if scale is None else scale
    q, k_by_channel = _tokens_first(xp, q, groups), _by_channel(xp, k)
    k_by_channel *= scale
    if mask is not None:
        mask = xp.broadcast_to(mask, (*mask.shape[:-2], t, s))
        one_for_all = mask.ndim == 2 or mask.shape[-3] == 1
        mask = mask[..., None, :] if one_for_all else _tokens_first(xp, mask, groups)
    value = _by_tokens(xp, q, heads, v.shape[-1])
    value_by_tokens = _tokens_first(xp, value, groups)
    ones = xp.ones(s, dtype=q.dtype, device=device(q))
    blocks = []
    for start in range(0, t, _TOKENS):
        tokens = slice(start, min(start + _TOKENS, t))
        seen = s - t + tokens.stop if causal else s
        weights = _rows(xp, q, tokens) @ k_by_channel[..., :seen]
        grid = xp.reshape(weights, (*q[..., tokens, :, :].shape[:-1], seen))
        if mask is not None:
            grid += mask[..., tokens, :, :seen]
        if causal:
            weights += _later(xp, q, tokens.stop - start, seen, heads // groups)
        if not _exponentials_are_safe(weights):
            weights -= row_max(xp, weights)
        into(weights, xp.exp, weights)
        weights /= (weights @ ones[:seen])[..., None]  # a product is quicker than a sum
        value_by_tokens[..., tokens, :, :] = xp.reshape(weights @ v[..., :seen, :], (*grid.shape[:-1], v.shape[-1]))
        if any(needs):
            blocks.append((tokens, weights))
    wants_q, wants_k, wants_v, wants_mask = (*needs, False)[:4]

    def pull(g: Array) -> Wanted:
        g, v_by_channel = _tokens_first(xp, g, groups), _by_channel(xp, v)
        to_q, to_k, to_v = _by_tokens(xp, q, heads, d), None, None
        to_q_by_tokens = _tokens_first(xp, to_q, groups)
        to_mask = xp.zeros((*to_q.shape[:-1], s), dtype=g.dtype, device=device(g)) if wants_mask else None
        for tokens, weights in reversed(blocks):  # the last tokens see all keys
            rows, seen = _rows(xp, g, tokens), weights.shape[-1]
            if wants_v:
                to_v = _added(to_v, weights.mT @ rows)
            if not (wants_q or wants_k or wants_mask):
                continue
            to_scores = rows @ v_by_channel[..., :seen]
            to_scores -= xp.vecdot(to_scores, weights)[..., None]
            to_scores *= weights
            if wants_q:
                made = to_scores @ k[..., :seen, :]
                to_q_by_tokens[..., tokens, :, :] = xp.reshape(made, q[..., tokens, :, :].shape)
            if wants_k:
                to_k = _added(to_k, to_scores.mT @ _rows(xp, q, tokens))
            if to_mask is not None:
                grid = xp.reshape(to_scores, (*q[..., tokens, :, :].shape[:-1], seen))
                _tokens_first(xp, to_mask, groups)[..., tokens, :, :seen] = grid
        for made in (to_q if wants_q else None, to_k):
            if made is not None:
                made *= scale
        return to_q if wants_q else None, to_k, to_v, to_mask

    return value, pull


def _check_heads(q: Array, k: Array, causal: bool) -> None:
    heads, groups = q.shape[-3], k.shape[-3]
    if heads % groups:
        message = f"attention: {heads} heads cannot share {groups} groups of keys; the groups must divide the heads"
        raise ShapeError(message)
    if causal and q.shape[-2] > k.shape[-2]:
        message = (
            f"attention: {q.shape[-2]} causal rows see {k.shape[-2]} keys, the first of them none; give each a key"
        )
        raise ShapeError(message)


def _in_groups(xp: Any, x: Array, k: Array) -> Array:
    """Heads `(..., heads, t, d)` that share keys, as rows of one matrix: `(..., groups, heads / groups * t, d)`."""
    return x if x.shape[-3] == k.shape[-3] else xp.reshape(x, (*x.shape[:-3], k.shape[-3], -1, x.shape[-1]))


def _tokens_first(xp: Any, x: Array, groups: int) -> Array:
    """A view `(..., groups, t, heads / groups, d)` of `(..., heads, t, d)`."""
    heads, t, d = x.shape[-3:]
    return xp.moveaxis(xp.reshape(x, (*x.shape[:-3], groups, heads // groups, t, d)), -3, -2)


def _rows(xp: Any, x: Array, tokens: slice) -> Array:
    """Some tokens of `_tokens_first`, as rows of one matrix a group."""
    part = x[..., tokens, :, :]
    return xp.reshape(part, (*part.shape[:-3], part.shape[-3] * part.shape[-2], part.shape[-1]))


def _exponentials_are_safe(scores: Array) -> bool:
    """Whether the exponentials of scores neither overflow nor vanish from a whole row, whatever is subtracted of it.

    To see the maximum of all, and one score of each row, is quick on the host alone.
    """
    return (
        isinstance(scores, np.ndarray)
        and bool(scores.max() < _LARGEST_SCORE)
        and bool(scores[..., 0].min() > -_LARGEST_SCORE)
    )


def _by_channel(xp: Any, k: Array) -> Array:
    """A copy `(..., d, s)` of `(..., s, d)`: small products of rows with it take half the time."""
    turned = xp.empty((*k.shape[:-2], k.shape[-1], k.shape[-2]), dtype=k.dtype, device=device(k))
    turned[...] = k.mT
    return turned


def _added(total: Array | None, more: Array) -> Array:
    """A sum over blocks, each of which sees no more keys than those before."""
    if total is None:
        return more
    total[..., : more.shape[-2], :] += more
    return total


def _by_tokens(xp: Any, q: Array, heads: int, d: int) -> Array:
    """A new array `(..., heads, t, d)` with a token's heads side by side in memory, as the next product reads it."""
    lead, t = q.shape[:-4], q.shape[-3]
    return xp.moveaxis(xp.empty((*lead, t, heads, d), dtype=q.dtype, device=device(q)), -2, -3)


def _later(xp: Any, like: Array, t: int, s: int, heads: int = 1) -> Array:
    """What a causal mask adds to scores, -inf at later places: `(t * heads, s)`, the heads of a token in a row."""
    forbidden = xp.triu(xp.full((t, s), -math.inf, dtype=like.dtype, device=device(like)), k=s - t + 1)
    return forbidden if heads == 1 else xp.repeat(forbidden, heads, axis=0)
