"""Functions of transformers whose derivative is quicker written by hand, each beside its plain formula.

They run on plain and on traced arrays. On libraries with an autograd of their own the formula runs, and they follow it.
"""

from __future__ import annotations

from peftarray.autodiff.fused.activations import gelu, log_softmax, silu_mul, softmax
from peftarray.autodiff.fused.attention import attention, rope
from peftarray.autodiff.fused.cross_entropy import linear_cross_entropy
from peftarray.autodiff.fused.norms import layer_norm, rms_norm

__all__ = [
    "attention",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "rope",
    "silu_mul",
    "softmax",
]
