"""Draws of VeRA: projections in the file, or from their seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "VeraConfig"
KINDS = ("linear", "conv1d_transposed")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets."""
    return {
        "r": draw(st.integers(1, 9)),
        "projection_prng_key": draw(st.sampled_from([0, 1, -1, 2**32 + 5, 2**64 - 1]) | st.integers(0, 2**32)),
        "save_projection": draw(st.booleans()),
        "d_initial": draw(st.sampled_from([0.1, 1.0, -0.5])),
        "init_weights": draw(st.booleans()),
    }
