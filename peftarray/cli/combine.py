"""`peftarray combine`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["combine"]


def combine(
    adapters: Annotated[
        list[Path],
        # typer's own check of permissions is a usage error; here it is bad input, in one line.
        typer.Argument(metavar="ADAPTER...", help="Adapter folders as PEFT saves them.", readable=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.", readable=False)],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Weight of an adapter, once for each; negative: subtract; default: 1."),
    ] = None,
    kind: Annotated[
        str,
        typer.Option("--type", help="How: cat (an exact sum), svd, slerp, ties, dare_ties ...; see docs/combining.md."),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Cut every module to this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Cut to the ranks that keep this share of the squared norm.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of entries that stay, where TYPE leaves some out.")
    ] = None,
    epsilon: Annotated[float, typer.Option(help="Of DELLA: spread of the drop rates within a row.")] = 0.1,
    gamma: Annotated[float, typer.Option(help="Of Breadcrumbs: share of the largest entries that is left out.")] = 0.01,
    majority_sign: Annotated[str, typer.Option(help="Which sign wins an election: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="Of what is left out at random.")] = 0,
    base: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that they are for; DoRA, and methods but LoRA, need it.", readable=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Combine adapters into one LoRA adapter, in PEFT's layout."""
    from peftarray.cli.render import combination_text
    from peftarray.combining import combine_folders

    report = combine_folders(
        adapters,
        out,
        weight,
        combination=kind,
        rank=rank,
        energy=energy,
        density=density,
        epsilon=epsilon,
        gamma=gamma,
        majority_sign=majority_sign,
        seed=seed,
        base=base,
    )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else combination_text(report))
