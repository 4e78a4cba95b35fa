"""The streaming merger: plan from headers, execute tile by tile, verify by another path, report what was done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftarray.merging.merger import merge as merge
from peftarray.merging.report import MergeReport as MergeReport
from peftarray.merging.report import TensorReport as TensorReport
from peftarray.merging.verification import Verification as Verification
from peftarray.merging.verification import verify as verify

if TYPE_CHECKING:
    from peftarray.merging.quantisation import quantize_checkpoint as quantize_checkpoint


def __getattr__(name: str) -> Any:
    # A merge loads no codecs, unless its base is quantised.
    if name != "quantize_checkpoint":
        message = f"module 'peftarray.merging' has no attribute {name!r}"
        raise AttributeError(message)
    from peftarray.merging.quantisation import quantize_checkpoint

    return quantize_checkpoint
