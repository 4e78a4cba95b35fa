"""How much of a model is trained, in PEFT's words."""

from __future__ import annotations

__all__ = ["trainable_summary"]


def trainable_summary(trainable: int, total: int) -> str:
    """PEFT's words for how many numbers training changes.

    Example:
        >>> trainable_summary(24, 88)
        'trainable params: 24 || all params: 88 || trainable%: 27.2727'
    """
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
