"""`peftarray merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["merge"]


def merge(
    base: Annotated[
        Path,
        # typer's own check of permissions is a usage error; here it is bad input, in one line.
        typer.Argument(help="Checkpoint folder (config.json and safetensors), or a .safetensors file.", readable=False),
    ],
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Adapter folders as PEFT saves them.", readable=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.", readable=False)],
    scale: Annotated[
        list[float] | None, typer.Option(help="Factor for the updates; give it once, or once for each adapter.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Write floating tensors as float32, bfloat16 or float16; default: as they are.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Recompute everything in float64 before OUT gets its name.")
    ] = False,
    fail_if_retained_below: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Exit with 3 if less of the update's energy survives rounding."),
    ] = None,
    base_as: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="What a quantised base stands for: dequantised, or original=PATH."),
    ] = None,
    requantise: Annotated[
        bool, typer.Option("--requantise", help="Quantise again what is quantised in the base; see --base-as.")
    ] = False,
    keep_touched_in: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Write quantised weights that change in this dtype; keep the others."),
    ] = None,
    allow_lost_updates: Annotated[
        bool, typer.Option("--allow-lost-updates", help="Requantise even where less than half of an update is held.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Split the result anew, such as 5GB; default: the base's files.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: one a core.")] = None,
    backend: Annotated[
        str, typer.Option(help="Array library that computes the updates: numpy, torch, jax or cupy.")
    ] = "numpy",
    device: Annotated[str | None, typer.Option(help="Its device, such as cuda:0; default: the library's own.")] = None,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Pass over what has no counterpart in the base.")
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show the figures of every changed tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge adapters into a base checkpoint of any size, in constant memory."""
    from peftarray.cli.progress import byte_progress
    from peftarray.cli.render import report_text
    from peftarray.merging import merge as run

    scales = scale or [1.0]
    with byte_progress("merging") as progress:
        report = run(
            base,
            adapters,
            out,
            scale=scales[0] if len(scales) == 1 else scales,
            dtype=dtype,
            dry_run=dry_run,
            threads=threads,
            backend=backend,
            device=device,
            verify=verify,
            fail_if_retained_below=fail_if_retained_below,
            allow_unmatched=allow_unmatched,
            max_shard_size=max_shard_size,
            base_as=base_as,
            requantise=requantise,
            keep_touched_in=keep_touched_in,
            allow_lost_updates=allow_lost_updates,
            planned=progress.planned,
            progress=progress.advance,
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report_text(report, every_tensor=tensors))
