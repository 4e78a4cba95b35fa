"""What quantising a checkpoint did, in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["QuantisationReport", "QuantisedTensor"]


@dataclass(frozen=True)
class QuantisedTensor:
    """One weight that was quantised.

    Attributes:
        name: its name.
        shape: its shape.
        nbytes_before, nbytes: bytes before and after, scales included.
        error: |W' - W| / |W|, over all entries; None where nothing was written.
    """

    name: str
    shape: tuple[int, ...]
    nbytes_before: int
    nbytes: int
    error: float | None

    @property
    def bits(self) -> float:
        """Bits a number, scales included."""
        return self.nbytes * 8 / max(1, math.prod(self.shape))


@dataclass(frozen=True)
class QuantisationReport:
    """The whole of it.

    Attributes:
        out: the folder that was written (or would be).
        codec: with its settings.
        layout: what `quant_method` says.
        tensors: the weights that were quantised.
        copied: tensors that were copied byte for byte.
        nbytes_before, nbytes: bytes of all weights before and after.
        memory: bytes that the work was planned to hold at once.
        seconds: wall time.
        resumed: shards that an earlier run had finished.
        dry_run: whether nothing was written.
    """

    out: str
    codec: str
    layout: str
    tensors: tuple[QuantisedTensor, ...]
    copied: int
    nbytes_before: int
    nbytes: int
    memory: int
    seconds: float
    resumed: int = 0
    dry_run: bool = False

    @property
    def worst(self) -> QuantisedTensor | None:
        """The weight with the largest error; None where nothing was written."""
        known = [tensor for tensor in self.tensors if tensor.error is not None]
        return max(known, key=lambda tensor: tensor.error or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = asdict(self)
        for tensor, values in zip(self.tensors, found["tensors"], strict=True):
            values["bits"] = tensor.bits
        return found
