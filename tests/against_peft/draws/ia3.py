"""Draws of IA3: gains of outputs and of inputs. Which targets are feedforward is drawn by pattern: all, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "IA3Config"
KINDS = ("linear", "conv1d_transposed", "conv2d", "conv3d")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets."""
    return {
        "feedforward_modules": draw(st.sampled_from([[], ".*", "none of them"])),
        "init_ia3_weights": draw(st.booleans()),
    }
