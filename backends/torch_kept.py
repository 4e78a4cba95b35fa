"""Stacks that a layer keeps from one batch to the next, and how it is known that they are still right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftarray.slots import Factors

__all__ = ["KeptFactors"]


@dataclass(frozen=True, eq=False)
class KeptFactors:
    """Stacks of the adapters of a batch, and what they were made of.

    Attributes:
        names, scales: of the adapters.
        stacks: their factors.
        tables: which table of a module holds each array, and under which name.
        arrays: these very arrays, so that no other gets the address of one.
        versions: how often each had been written into.
    """

    names: tuple[str, ...]
    scales: tuple[float, ...]
    stacks: Factors
    tables: Sequence[tuple[dict[str, Any], str]]
    arrays: Sequence[torch.Tensor]
    versions: Sequence[int]

    @classmethod
    def of(
        cls, held: Sequence[tuple[nn.Module, str]], names: tuple[str, ...], scales: tuple[float, ...], stacks: Factors
    ) -> KeptFactors:
        """What was made of the arrays that modules hold under these names."""
        tables: list[tuple[dict[str, Any], str]] = [
            (m._parameters if m._parameters.get(last) is not None else m._buffers, last) for m, last in held
        ]
        arrays = [table[last] for table, last in tables]
        return cls(names, scales, stacks, tables, [a.detach() for a in arrays], [a._version for a in arrays])

    def holds(self, names: tuple[str, ...], scales: tuple[float, ...]) -> bool:
        """Whether the stacks are those of these adapters as they are now, and no gradient is asked for."""
        if names != self.names or scales != self.scales:
            return False
        wants = torch.is_grad_enabled()
        for (table, last), array, version in zip(self.tables, self.arrays, self.versions, strict=True):
            now = table.get(last)
            if now is None or now.is_inference() or now.data_ptr() != array.data_ptr() or now._version != version:
                return False
            if wants and now.requires_grad:
                return False
        return True
