"""The main job on a small real model: an adapter merged into its base, checked, and tried on images neither has seen.

The base reads upright 8x8 digits; PEFT trained the LoRA adapter on the same digits turned by a quarter
(`docs/examples/train_demo.py` makes both). The images are a part of the test set of "Optical Recognition of
Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import peftarray as pa
from peftarray.stores.checkpoint import Checkpoint

if TYPE_CHECKING:
    from peftarray.merging import MergeReport, Verification

__all__ = ["DemoResult", "TaskAccuracy", "accuracy", "held_out", "run", "scores"]


@dataclass(frozen=True)
class TaskAccuracy:
    """Share of the held-out images of one task that are named rightly, by the base and by the merged checkpoint."""

    task: str
    before: float
    after: float


@dataclass(frozen=True)
class DemoResult:
    """What `run` found.

    Attributes:
        tasks: the upright digits, which the base was trained on, then the turned ones, which the adapter was.
        images: how many held-out images stand behind each share.
        report: what `pa.merge` returned.
        verification: what `pa.verify` returned.
        seconds: the time of the whole run.
    """

    tasks: tuple[TaskAccuracy, ...]
    images: int
    report: MergeReport
    verification: Verification
    seconds: float


def run(out: Path) -> DemoResult:
    """Merge the shipped adapter into the shipped base, verify the result and compare the two on held-out images.

    Args:
        out: the folder for the merged checkpoint; it must not exist.
    """
    start = time.perf_counter()
    with as_file(files(__name__) / "assets") as assets:
        base, adapter = assets / "base", assets / "adapter"
        report = pa.merge(base, adapter, out)
        verification = pa.verify(base, adapter, out)
        upright, labels = held_out(assets)
        tasks = {"upright": upright, "turned": np.rot90(upright, axes=(1, 2))}
        found = tuple(
            TaskAccuracy(task, accuracy(base, images, labels), accuracy(out, images, labels))
            for task, images in tasks.items()
        )
    return DemoResult(found, len(labels), report, verification, time.perf_counter() - start)


def held_out(assets: Path) -> tuple[np.ndarray, np.ndarray]:
    """The upright images, `(images, 8, 8)` of 0..16, that no training saw, and their labels, `(images,)` of 0..9."""
    with np.load(assets / "digits.npz", allow_pickle=False) as digits:
        return digits["images"], digits["labels"]


def scores(checkpoint: Path, images: np.ndarray) -> np.ndarray:
    """What the network in a checkpoint folder gives for each image and class, `(images, 10)`, in float32."""
    x = images.reshape(len(images), -1).astype(np.float32) / np.float32(16)
    with Checkpoint.open(checkpoint) as tensors:
        for layer in ("embed", "hidden"):
            x = np.maximum(x @ tensors.read(f"{layer}.weight").T + tensors.read(f"{layer}.bias"), 0)
        return x @ tensors.read("head.weight").T + tensors.read("head.bias")


def accuracy(checkpoint: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images that the network in a checkpoint folder names rightly."""
    return float((scores(checkpoint, images).argmax(axis=1) == labels).mean())
