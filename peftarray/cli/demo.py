"""`peftarray demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the merged checkpoint in this new folder.")
    ] = None,
) -> None:
    """Merge a real adapter into a small real model, check the result, and try both on images."""
    import tempfile

    from peftarray.cli.render import report_text, verification_text
    from peftarray.demo import run

    typer.echo("A small network reads 8x8 digits; a LoRA adapter, trained with PEFT, reads them turned by a quarter.")
    with tempfile.TemporaryDirectory() as folder:
        found = run(out or Path(folder) / "merged")
    typer.echo("\npeftarray merge base adapter -o merged")
    typer.echo(report_text(found.report, every_tensor=True))
    typer.echo("\npeftarray verify base adapter merged")
    typer.echo(verification_text(found.verification))
    typer.echo(f"\n{found.images} held-out images, named rightly:\n  {'':<10} {'base':>7} {'merged':>7}")
    for task in found.tasks:
        typer.echo(f"  {task.task:<10} {100 * task.before:6.1f}% {100 * task.after:6.1f}%")
    kept = f"the merged checkpoint is in {out}" if out else "nothing was kept; -o FOLDER keeps the merged checkpoint"
    typer.echo(f"\ndone in {found.seconds:.1f} s, with NumPy alone; {kept}")
    if not found.verification.passed:
        raise typer.Exit(3)
