"""Draws of BOFT: blocks by size or number. Without its compiled kernel PEFT trains one factor, whatever is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "BOFTConfig"
KINDS = ("linear", "conv2d")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets, for an even number of inputs.

    Of convolutions PEFT takes square kernels without groups.
    """
    by_number = draw(st.booleans())
    count = draw(st.integers(1, 2))
    return {
        "boft_block_num": count if by_number else 0,
        "boft_block_size": 0 if by_number else count,
        "boft_n_butterfly_factor": draw(st.sampled_from([1, 1, 2])) if by_number and count == 2 else 1,
        "init_weights": draw(st.booleans()),
        "boft_dropout": draw(st.sampled_from([0.0, 0.5])),
    }
