"""A torch module that stands for another one."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

__all__ = ["Forwarding"]


class Forwarding(nn.Module):
    """A module that stands for another: what it does not have, it has from that one.

    Attributes:
        holds: names of its own that are never asked of the other.
    """

    holds: ClassVar[tuple[str, ...]] = ("base_layer",)

    @property
    def behind(self) -> nn.Module:
        """The module that it stands for."""
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        """What this module has, or else what the other has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in type(self).holds:
                raise
            return getattr(self.behind, name)
