"""The streaming merger: plan from headers, execute tile by tile, verify by another path, report what was done."""

from __future__ import annotations

from peftarray.merging.merger import merge as merge
from peftarray.merging.report import MergeReport as MergeReport
from peftarray.merging.report import TensorReport as TensorReport
from peftarray.merging.verification import Verification as Verification
from peftarray.merging.verification import verify as verify
