"""`peftarray inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["inspect"]


def inspect(
    path: Annotated[
        Path, typer.Argument(help="An adapter folder, a checkpoint folder or a .safetensors file.", readable=False)
    ],
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw norms and spectra into FILE (.png).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Show what is in an adapter or a checkpoint: method, ranks, scales, norms, dtypes."""
    from peftarray.cli.render import inspection_text
    from peftarray.inspection import inspect as run

    found = run(path)
    if plot is not None:
        from peftarray.plots import plot_inspection

        plot_inspection(found, plot)
    typer.echo(json.dumps(found.to_dict(), indent=2, default=str) if as_json else inspection_text(found))
