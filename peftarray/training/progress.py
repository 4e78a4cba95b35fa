"""A training's progress on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from peftarray import trees

__all__ = ["Advance", "Reporter", "amount", "training_progress"]

_SECONDS = 10.0


@dataclass(frozen=True)
class Advance:
    """What one step adds.

    Attributes:
        step: steps done.
        loss: of the step.
        rate: the optimiser's.
        count: how much it went through.
        unit: of what.
    """

    step: int
    loss: float
    rate: float
    count: int
    unit: str


class Reporter(Protocol):
    """Where progress goes."""

    def advance(self, step: Advance) -> None:
        """A step is done."""

    def note(self, text: str) -> None:
        """Something to say between the steps."""


@contextmanager
def training_progress(shown: bool, first: int, total: int | None) -> Iterator[Reporter]:
    """A reporter for the steps from `first` on, of which `total` is the number in all."""
    if not shown:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bar(first, total) as reporter:
            yield reporter
    else:
        lines = _Lines(first, total)
        yield lines
        lines.close()


def amount(batch: Any) -> tuple[int, str]:
    """How much a batch is, and of what: tokens where it has `input_ids`, else the rows of its first array.

    Example:
        >>> import numpy as np
        >>> amount({"input_ids": np.zeros((4, 128), int)}), amount((np.zeros((4, 3)), np.zeros(4)))
        ((512, 'tokens'), (4, 'samples'))
    """
    if isinstance(batch, Mapping) and hasattr(batch.get("input_ids"), "shape"):
        return math.prod(batch["input_ids"].shape), "tokens"
    shapes = [leaf.shape for leaf in trees.leaves(batch) if getattr(leaf, "shape", ())]
    return (shapes[0][0], "samples") if shapes else (1, "batches")


class _Silent:
    def advance(self, step: Advance) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines:
    def __init__(self, first: int, total: int | None) -> None:
        self._first, self._total = first, total
        self._started = self._last = time.monotonic()
        self._count = 0
        self._latest: Advance | None = None

    def advance(self, step: Advance) -> None:
        self._count += step.count
        self._latest = step
        if time.monotonic() - self._last >= _SECONDS:
            self._print()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        if self._latest is None:
            return
        step, self._latest = self._latest, None
        self._last = time.monotonic()
        seconds = self._last - self._started
        whole = "" if self._total is None else f" of {self._total}"
        line = f"step {step.step}{whole}: {_figures(step)}, {self._count / max(seconds, 1e-9):,.0f} {step.unit}/s"
        if self._total is not None and step.step < self._total:
            line += f", {seconds * (self._total - step.step) / (step.step - self._first):.0f} s left"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _bar(first: int, total: int | None) -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=first, figures="", speed="")
        yield _Bar(lambda **fields: progress.update(task, **fields), progress.console.print)


class _Bar:
    def __init__(self, update: Callable[..., None], say: Callable[..., None]) -> None:
        self._update, self._say = update, say
        self._started = time.monotonic()
        self._count = 0

    def advance(self, step: Advance) -> None:
        self._count += step.count
        speed = f"{self._count / max(time.monotonic() - self._started, 1e-9):,.0f} {step.unit}/s"
        self._update(completed=step.step, figures=_figures(step), speed=speed)

    def note(self, text: str) -> None:
        self._say(text, markup=False)


def _figures(step: Advance) -> str:
    return f"loss {step.loss:.4g}, rate {step.rate:.3g}"
