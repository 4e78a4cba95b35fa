"""Training: optimisers, schedules, precision and the loop, the same for every array library."""

from __future__ import annotations

from peftarray.training.clipping import clip_by_norm, clip_by_value, global_norm
from peftarray.training.optimizer import Group, Optimizer, lora_plus
from peftarray.training.optimizers import SGD, Adafactor, AdamW, Lion
from peftarray.training.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_with_restarts,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
)

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Group",
    "Lion",
    "Optimizer",
    "Schedule",
    "clip_by_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "global_norm",
    "inverse_sqrt",
    "linear",
    "lora_plus",
    "one_cycle",
    "polynomial",
]
