"""The command line: one file a command, no logic. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from peftarray.cli.combine import combine
from peftarray.cli.demo import demo
from peftarray.cli.inspect import inspect
from peftarray.cli.merge import merge
from peftarray.cli.quantize import quantize
from peftarray.cli.verify import verify

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="peftarray",
    help="Merge, combine, quantise, verify and inspect adapter weights, without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (merge, combine, quantize, verify, inspect, demo):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from peftarray import __version__

        typer.echo(f"peftarray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    """Merge, combine, quantise, verify and inspect adapter weights, without torch."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 bad input, 2 wrong usage, 3 a quality gate failed."""
    from peftarray.allocation import keep_freed_memory
    from peftarray.errors import PeftError

    keep_freed_memory()
    try:
        app()
    except PeftError as error:
        print(f"peftarray: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except MemoryError:
        print("peftarray: out of memory; --dry-run says how much a merge needs; use fewer --threads", file=sys.stderr)
        sys.exit(1)


def run() -> NoReturn:
    """`main` as a process: ends without taking the interpreter apart, which takes a tenth of a small merge's time."""
    status: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read the output has gone
        status = status or 1
    os._exit(status if isinstance(status, int) else int(status is not None))
