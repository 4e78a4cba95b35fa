"""What a training did, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftarray.errors import ConfigError, OutputError

__all__ = ["History"]


@dataclass(eq=False)
class History:
    """The record of a training, and what it made.

    Attributes:
        params: the trained arrays, in the form that `fit` was given.
        state: the optimiser's.
        losses: the mean loss of each step's batches.
        rates: the optimiser's rate at each step, before groups.
        norms: the norm of each step's gradients before they were clipped.
        evaluations: (steps done, mean loss over the batches for evaluation).
        skipped: steps, from 0 on, whose gradients overflowed in float16, so that nothing was changed.
        stopped: why it ended before its last step; empty if it did not.
    """

    params: Any = None
    state: Any = None
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    stopped: str = ""

    @property
    def steps(self) -> int:
        """How many were done."""
        return len(self.losses)

    def __repr__(self) -> str:
        ends = f", loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}" if self.losses else ""
        evaluated = f", evaluated {self.evaluations[-1][1]:.4g}" if self.evaluations else ""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"<History of {self.steps} steps{ends}{evaluated}{skipped}{self.stopped and f', {self.stopped}'}>"

    def plot(self, file: str | Path | None = None) -> Any:
        """A picture of losses, rate and gradient norm over the steps.

        Args:
            file: where to write it; None writes nothing.

        Returns:
            The figure of matplotlib.

        Raises:
            ConfigError: matplotlib is not installed.
            OutputError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            message = "a picture needs matplotlib, which is not installed; pip install 'peftarray[plot]'"
            raise ConfigError(message) from None
        figure = Figure(figsize=(8, 6), layout="constrained")
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        loss.plot(self.losses, linewidth=1, label="training")
        if self.evaluations:
            loss.plot(*zip(*self.evaluations, strict=True), marker="o", label="evaluation")
        for number, step in enumerate(self.skipped):
            loss.axvline(step, color="tab:red", linewidth=0.5, label=None if number else "skipped")
        loss.set(ylabel="loss")
        loss.legend()
        rate.plot(self.rates, color="tab:green")
        rate.set(ylabel="rate", xlabel="step")
        norm = rate.twinx()
        norm.plot(self.norms, linewidth=0.7, color="tab:gray")
        norm.set(ylabel="gradient norm", yscale="log" if min(self.norms, default=0) > 0 else "linear")
        if file is not None:
            try:
                figure.savefig(file, dpi=120)
            except (OSError, ValueError) as error:
                message = f"{file} cannot be written ({error}); give a .png, .pdf or .svg in a folder that exists"
                raise OutputError(message) from None
        return figure
