"""Draws of LoRA and DoRA: ranks and scales with their patterns, and the first values.

What depends on names or on a bias (block-diagonal factors, targets, trained biases) is drawn in tests/merging.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PEFT = "LoraConfig"
KINDS = ("linear", "conv1d_transposed", "conv1d", "conv2d", "conv3d", "embedding")


def kwargs(draw: Callable[..., Any], kind: str) -> dict[str, Any]:
    """Arguments of PEFT's class but for the targets."""
    alphas = st.integers(1, 20) | st.sampled_from([0.5, 2.5])
    return {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(alphas),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "rank_pattern": draw(st.dictionaries(st.just(".*"), st.integers(1, 5), max_size=1)),
        "alpha_pattern": draw(st.dictionaries(st.just(".*"), alphas, max_size=1)),
    }
