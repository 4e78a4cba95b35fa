"""Which adapters of a torch module act: one state that all its layers read, so that a switch is one assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peftarray.backends.torch_rows import Rows

__all__ = ["Acting", "Switch"]


@dataclass(frozen=True)
class Acting:
    """What acts now.

    Attributes:
        active: names of the adapters that are set.
        scales: name -> what its update is multiplied by, where that is not 1.
        enabled: whether they act.
        merged: names of the adapters that the layers' own weights hold.
        rows: while a batch runs of which each row names its adapter.
        index: the slot that acts, or one for each row, where the layers have slots.
    """

    active: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    enabled: bool = True
    merged: tuple[str, ...] = ()
    rows: Rows | None = None
    index: torch.Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that act in their layers."""
        return self.active if self.enabled and not self.merged else ()

    @property
    def whole(self) -> tuple[str, ...]:
        """The adapters whose copies of whole modules act."""
        return (self.merged or self.active) if self.enabled else ()


class Switch:
    """Holds what acts. The layers of a module and the module itself have the same one.

    Attributes:
        now: replaced by one assignment.
    """

    def __init__(self) -> None:
        self.now = Acting()
