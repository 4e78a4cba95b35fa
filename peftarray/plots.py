"""Pictures of what was found; the only module that imports matplotlib, when it is asked to draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peftarray.errors import ConfigError, OutputError
from peftarray.inspection import Inspection

__all__ = ["plot_inspection"]

_TALLEST = 40


def plot_inspection(found: Inspection, file: Path) -> None:
    """Draw an adapter's updates: their norm by module, and their spectra.

    Raises:
        ConfigError: matplotlib is not installed, or there is nothing to draw.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "a picture needs matplotlib, which is not installed; pip install 'peftarray[plot]'"
        raise ConfigError(message) from None
    factored = [module for module in found.modules if module.rank is not None]
    if not factored:
        message = f"{found.path} has no modules with factors, so there is nothing to draw; --plot is for LoRA adapters"
        raise ConfigError(message)
    modules = factored if len(factored) <= _TALLEST else sorted(factored, key=lambda m: -m.norm)[:_TALLEST]
    figure = Figure(figsize=(12, max(3.5, 0.24 * len(modules) + 1.5)), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(3, 2))
    places = np.arange(len(modules))
    bars.barh(places, [module.norm for module in modules], color="tab:blue")
    bars.set_yticks(places, [module.name for module in modules], fontsize=7)
    bars.invert_yaxis()
    which = "" if len(modules) == len(factored) else f" (the {len(modules)} largest of {len(factored)})"
    bars.set(xlabel="|s B A|, Frobenius norm", title=f"Size of the update{which}")
    for module in factored:
        largest = module.spectrum[0] if module.spectrum and module.spectrum[0] > 0 else 1.0
        values = np.array(module.spectrum[: module.rank]) / largest
        curves.semilogy(range(1, len(values) + 1), np.maximum(values, 1e-8), color="tab:blue", alpha=0.3, linewidth=1)
    curves.set(xlabel="direction", ylabel="singular value / largest", title="Spectrum of each module's update")
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        message = (
            f"{file} cannot be written ({error}); give a file name with .png, .pdf or .svg in a folder that exists"
        )
        raise OutputError(message) from None
