"""`peftarray quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["quantize"]


def quantize(
    base: Annotated[
        Path,
        # typer's own check of permissions is a usage error; here it is bad input, in one line.
        typer.Argument(help="Checkpoint folder (config.json and safetensors), or a .safetensors file.", readable=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.", readable=False)],
    codec: Annotated[str, typer.Option(help="nf4, fp4, int8, fp8, mxfp4, nvfp4, ints or mlx.")] = "nf4",
    block: Annotated[
        str | None, typer.Option(help="Numbers that share a scale; for fp8 rows and columns, as 128x128.")
    ] = None,
    double: Annotated[
        bool | None, typer.Option("--double/--no-double", help="Whether scales are quantised as well (nf4, fp4).")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a number (ints, mlx).")] = None,
    group: Annotated[int | None, typer.Option(help="Columns that share a scale (ints, mlx).")] = None,
    scale: Annotated[str | None, typer.Option(help="What has a scale of its own (fp8): block, row or tensor.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave a module as it is: its name, or the end of it.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Split the result anew, such as 5GB; default: the base's files.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show the error of every weight.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantise the linear weights of a checkpoint of any size."""
    from peftarray.cli.progress import byte_progress
    from peftarray.cli.render import quantisation_text
    from peftarray.merging import quantize_checkpoint

    given: dict[str, Any] = {"double": double, "bits": bits, "group": group, "scale": scale, "block": _block(block)}
    with byte_progress("quantising") as progress:
        report = quantize_checkpoint(
            base,
            out,
            codec,
            skip=skip or (),
            max_shard_size=max_shard_size,
            threads=threads,
            dry_run=dry_run,
            planned=progress.planned,
            progress=progress.advance,
            **{name: value for name, value in given.items() if value is not None},
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else quantisation_text(report, every_tensor=tensors))


def _block(text: str | None) -> int | tuple[int, ...] | str | None:
    """A number, or rows and columns; other words are left to the codec to refuse."""
    if text is None:
        return None
    numbers = text.split("x")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        return text
    return int(numbers[0]) if len(numbers) == 1 else tuple(map(int, numbers))
