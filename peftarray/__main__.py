"""`python -m peftarray`."""

from peftarray.cli import main

main()
