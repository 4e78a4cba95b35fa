"""Draws of LoKr: how the dimensions are split, which factors are decomposed, and the Tucker form of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "LoKrConfig"
KINDS = ("linear", "conv1d", "conv2d")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets."""
    alphas = st.integers(1, 20) | st.sampled_from([0.5, 2.5])
    tucker = draw(st.booleans())
    # PEFT cannot merge what it made of a core of rank 1: `torch.kron` takes its strides for another layout.
    least = 2 if tucker and kind != "linear" else 1
    return {
        "r": draw(st.integers(least, 6)),
        "alpha": draw(alphas),
        "use_effective_conv2d": tucker,
        "decompose_both": draw(st.booleans()),
        # One that divides a dimension becomes the size of the first factor, even if that is then the larger one.
        "decompose_factor": draw(st.sampled_from([-1, -1, 0, 1, 2, 3, 4, 5, 6, 8, 12])),
        "init_weights": draw(st.sampled_from([True, False, "lycoris"])),
        "rank_pattern": draw(st.dictionaries(st.just(".*"), st.integers(least, 5), max_size=1)),
        "alpha_pattern": draw(st.dictionaries(st.just(".*"), alphas, max_size=1)),
    }
