"""Draws of OFT: blocks by size or number, shared and bounded ones, the rotation itself and its series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "OFTConfig"
KINDS = ("linear", "conv2d", "embedding")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets.

    Of convolutions PEFT takes square kernels without dilation or groups. What it makes for others has the wrong number
    of blocks, which nothing shows where all of them are one.
    """
    by_number = draw(st.booleans())
    count = draw(st.integers(1, 45))
    return {
        "r": count if by_number else 0,
        "oft_block_size": 0 if by_number else count,
        "use_cayley_neumann": draw(st.booleans()),
        "num_cayley_neumann_terms": draw(st.integers(1, 8)),
        "coft": draw(st.booleans()),
        "eps": draw(st.sampled_from([0, 6e-5, 0.1, 3.0])),
        "block_share": kind != "conv2d" and draw(st.booleans()),
        "init_weights": draw(st.booleans()),
        "module_dropout": draw(st.sampled_from([0.0, 0.5])),
    }
