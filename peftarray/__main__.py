"""`python -m peftarray`."""

from peftarray.cli import run

run()
