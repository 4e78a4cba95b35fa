"""How LoKr splits a dimension, against PEFT's search for the two numbers."""

from __future__ import annotations

import pytest

from peftarray.methods.lokr import split

layer = pytest.importorskip("peft.tuners.lokr.layer")


@pytest.mark.parametrize("dimension", [*range(1, 130), 720, 768, 1024, 1733, 4096, 14336])
def test_every_factor_gives_pefts_numbers(dimension):
    for factor in [*range(-2, 131), dimension, dimension + 1]:
        assert split(dimension, factor) == layer.factorization(dimension, factor), factor
