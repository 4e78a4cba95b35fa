"""Training: optimisers, schedules, precision and the loop, the same for every array library."""

from __future__ import annotations

from peftarray.training.adalora import AdaLoraBudget
from peftarray.training.batches import Batches
from peftarray.training.callbacks import Moment, early_stopping
from peftarray.training.clipping import clip_by_norm, clip_by_value, global_norm
from peftarray.training.fitting import Trainable, fit
from peftarray.training.history import History
from peftarray.training.optimizer import Group, Optimizer, lora_plus
from peftarray.training.optimizers import SGD, Adafactor, AdamW, Lion
from peftarray.training.penalties import orthogonality_penalty
from peftarray.training.precision import LossScale, Precision
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
    "AdaLoraBudget",
    "Adafactor",
    "AdamW",
    "Batches",
    "Group",
    "History",
    "Lion",
    "LossScale",
    "Moment",
    "Optimizer",
    "Precision",
    "Schedule",
    "Trainable",
    "clip_by_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "early_stopping",
    "fit",
    "global_norm",
    "inverse_sqrt",
    "linear",
    "lora_plus",
    "one_cycle",
    "orthogonality_penalty",
    "polynomial",
]
