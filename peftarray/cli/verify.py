"""`peftarray verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["verify"]


def verify(
    base: Annotated[Path, typer.Argument(help="The base that was merged into.", readable=False)],
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="The adapters, in the order of the scales.", readable=False),
    ],
    merged: Annotated[Path, typer.Argument(help="The merged checkpoint to check.", readable=False)],
    scale: Annotated[list[float] | None, typer.Option(help="As it was given to merge.")] = None,
    rows: Annotated[int | None, typer.Option(help="Look at so many rows of each tensor; default: all.")] = None,
    allow_unmatched: Annotated[bool, typer.Option("--allow-unmatched", help="As it was given to merge.")] = False,
    base_as: Annotated[str | None, typer.Option(metavar="WHAT", help="As it was given to merge.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Recompute a merged checkpoint in float64 and compare. Exits with 3 if it does not hold up."""
    from peftarray.cli.render import verification_text
    from peftarray.merging import verify as run

    scales = scale or [1.0]
    found = run(
        base,
        adapters,
        merged,
        scale=scales[0] if len(scales) == 1 else scales,
        rows=rows,
        allow_unmatched=allow_unmatched,
        base_as=base_as,
    )
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else verification_text(found))
    if not found.passed:
        raise typer.Exit(3)
