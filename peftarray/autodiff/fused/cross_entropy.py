"""The loss of a language model's head without its logits: beside the plain formula."""

from __future__ import annotations

from typing import Any

from peftarray.arrays import Array, namespace
from peftarray.autodiff.fused.memory import into
from peftarray.autodiff.primitive import primitive
from peftarray.autodiff.rules import Needs, Result
from peftarray.autodiff.rules.scatter import add_rows
from peftarray.errors import PeftError

__all__ = ["frozen_cross_entropy", "linear_cross_entropy"]

# So many rows of logits at a time at most, and so many entries: fewer make thin products, more only memory.
_ROWS, _ENTRIES = 256, 1 << 24


def _linear_cross_entropy(hidden: Array, weight: Array, targets: Array, *, ignore_index: int = -100) -> Array:
    """The mean cross-entropy of `softmax(hidden weight^T)`, without the array of all logits.

    With `z` the logits of a row and `t` its target, a row has `log(sum(exp(z))) - z_t`.

    Args:
        hidden: `(..., d)`.
        weight: `(classes, d)`.
        targets: `(...)`, whole numbers.
        ignore_index: rows with this target do not count.

    Returns:
        The mean over the rows that count.

    Raises:
        PeftError: no row counts.
    """
    xp = namespace(hidden, weight)
    rows, targets, share = _rows(xp, hidden, targets, ignore_index)
    logits = rows @ weight.mT
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    chosen = xp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return xp.sum((xp.log(xp.sum(xp.exp(logits), axis=-1)) - chosen) * share)


@primitive(formula=_linear_cross_entropy)
def linear_cross_entropy(
    xp: Any, needs: Needs, hidden: Array, weight: Array, targets: Array, *, ignore_index: int = -100
) -> Result:
    shape, classes = hidden.shape, weight.shape[0]
    hidden, targets, share = _rows(xp, hidden, targets, ignore_index)
    wants_hidden, wants_weight, _ = needs
    losses, to_hidden, to_weight = [], [], None
    step = max(1, min(_ROWS, _ENTRIES // classes))
    for start in range(0, hidden.shape[0], step):
        part = slice(start, min(start + step, hidden.shape[0]))
        loss, over_rows, over_classes = _block(xp, needs, hidden[part, :], weight, targets[part], share[part][:, None])
        losses.append(loss)
        to_hidden.append(over_rows)
        if wants_weight:
            to_weight = over_classes if to_weight is None else _added(to_weight, over_classes)
    if wants_weight:
        to_weight = _added(to_weight, -add_rows(xp, hidden * share[:, None], targets, classes))
    whole = xp.reshape(xp.concat(to_hidden, axis=0), shape) if wants_hidden else None
    return (
        xp.sum(xp.concat(losses, axis=0) * share),
        lambda g: (None if whole is None else whole * g, None if to_weight is None else to_weight * g, None),
    )


def _frozen_cross_entropy(hidden: Array, targets: Array, *, weight: Array, ignore_index: int = -100) -> Array:
    """`linear_cross_entropy` of a frozen weight, which may be an object that stands in for one and has no gradient.

    Args:
        hidden, targets: as above.
        weight: `(classes, d)`, such as a quantised one.
        ignore_index: as above.
    """
    return _linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index)


@primitive(formula=_frozen_cross_entropy)
def frozen_cross_entropy(
    xp: Any, needs: Needs, hidden: Array, targets: Array, *, weight: Array, ignore_index: int = -100
) -> Result:
    wants = (needs[0], False, False)
    value, pull = linear_cross_entropy.rule.function(xp, wants, hidden, weight, targets, ignore_index=ignore_index)
    assert pull is not None
    return value, lambda g: (pull(g)[0], None)


def _block(
    xp: Any, needs: Needs, rows: Array, weight: Array, targets: Array, share: Array
) -> tuple[Array, Array | None, Array | None]:
    """The losses of some rows, their gradient, and that of the weight but for what the targets add to it."""
    logits = rows @ weight.mT
    top = xp.max(logits, axis=-1, keepdims=True)
    logits -= top
    into(logits, xp.exp, logits)
    total = xp.sum(logits, axis=-1, keepdims=True)
    chosen = namespace(weight).take(weight, targets, axis=0)
    losses = (xp.log(total) + top)[:, 0] - xp.vecdot(rows, chosen)
    # The gradient of a row's logits is its softmax, less one at the target.
    part = share / total
    return (
        losses,
        (logits @ weight) * part - chosen * share if needs[0] else None,
        logits.mT @ (rows * part) if needs[1] else None,
    )


def _added(total: Array, more: Array) -> Array:
    total += more
    return total


def _rows(xp: Any, hidden: Array, targets: Array, ignore_index: int) -> tuple[Array, Array, Array]:
    """Rows `(n, d)`, their targets with zero where they do not count, and their shares of the mean `(n,)`."""
    targets = namespace(targets).reshape(targets, (-1,))
    counts = targets != ignore_index
    share = xp.astype(counts, hidden.dtype)
    try:
        number: Any = int(namespace(targets).count_nonzero(counts))
    except TypeError:  # a compiler knows no numbers; with none the loss is NaN
        number = xp.sum(share)
    if type(number) is int and number == 0:
        message = f"every target is {ignore_index}, which does not count; give at least one row that does"
        raise PeftError(message)
    share = share / number
    return xp.reshape(hidden, (-1, hidden.shape[-1])), xp.where(counts, targets, 0), share
