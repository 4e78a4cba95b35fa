"""The derivatives of the array API standard's functions, a file for each family."""

from __future__ import annotations

from peftarray.autodiff.rules.creation import CREATION
from peftarray.autodiff.rules.elementwise import ELEMENTWISE
from peftarray.autodiff.rules.family import Family, Needs, Result, Rule, Wanted
from peftarray.autodiff.rules.fft import FFT
from peftarray.autodiff.rules.indexing import INDEXING
from peftarray.autodiff.rules.linalg import LINALG
from peftarray.autodiff.rules.products import PRODUCTS
from peftarray.autodiff.rules.reductions import REDUCTIONS
from peftarray.autodiff.rules.shapes import SHAPES

__all__ = ["FAMILIES", "Family", "Needs", "Result", "Rule", "Wanted"]

# Where in a library's namespace -> what is there.
FAMILIES = {
    "": CREATION.with_(ELEMENTWISE, REDUCTIONS, SHAPES, INDEXING, PRODUCTS),
    "fft": FFT,
    "linalg": LINALG,
}
