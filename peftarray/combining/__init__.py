"""Adapters combined into one: by weighted sums, singular values, votes on signs, and what is left out before."""

from peftarray.combining.folders import CombineReport, KindOfLayer, combine_folders
from peftarray.combining.layer import LoraFit, combine, to_lora
from peftarray.combining.recipe import COMBINATIONS, Recipe
from peftarray.combining.sets import CombinedAdapters, combine_sets

__all__ = [
    "COMBINATIONS",
    "CombineReport",
    "CombinedAdapters",
    "KindOfLayer",
    "LoraFit",
    "Recipe",
    "combine",
    "combine_folders",
    "combine_sets",
    "to_lora",
]
