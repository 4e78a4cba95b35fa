"""Draws of AdaLoRA before any pruning: ranks, scales (one that is not positive means the rank) and schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "AdaLoraConfig"
KINDS = ("linear", "conv1d_transposed", "conv2d")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets."""
    tinit, tfinal = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return {
        "init_r": draw(st.integers(1, 6)),
        "target_r": draw(st.integers(0, 6)),
        "lora_alpha": draw(st.integers(-2, 20) | st.sampled_from([0.5, 2.5])),
        "init_lora_weights": draw(st.booleans()),
        "tinit": tinit,
        "tfinal": tfinal,
        "total_step": tinit + tfinal + draw(st.integers(1, 5)),
        "deltaT": draw(st.integers(1, 3)),
        "beta1": draw(st.sampled_from([0.5, 0.85])),
        "orth_reg_weight": draw(st.sampled_from([0, 0.5])),
    }
