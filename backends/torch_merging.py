"""Adapters merged into the weights of a torch module: put there, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peftarray.backends.torch_holding import tied_heads
from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_tree import own_module
from torch import nn

__all__ = ["Swap", "effective_tensors", "settle_ties"]


@dataclass(frozen=True, eq=False)
class Swap:
    """A parameter of the model's own, and the effective one.

    Attributes:
        module, key: whose parameter, and under which name.
        own: the model's.
        effective: as adapters make it.
    """

    module: nn.Module
    key: str
    own: nn.Parameter
    effective: nn.Parameter

    def merge(self) -> None:
        """Let the module have the effective one."""
        # Not by setattr, which would look at each: a list of swaps is made whole or not at all.
        self.module._parameters[self.key] = self.effective

    def unmerge(self) -> None:
        """Let the module have its own one again."""
        self.module._parameters[self.key] = self.own


def effective_tensors(
    root: nn.Module, layers: Iterable[AdaptedLayer], names: tuple[str, ...], scales: Mapping[str, float], *, safe: bool
) -> tuple[Swap, ...]:
    """What merging these adapters would change; nothing is changed yet.

    Raises:
        NumberError: an effective parameter holds NaN or infinity, and `safe`.
        UnsupportedError: a layer stores its weight packed.
    """
    found = []
    with torch.no_grad():
        for layer in {id(layer): layer for layer in layers}.values():
            module = own_module(layer)
            for key, made in layer.effective(names, scales, safe=safe).items():
                own = module._parameters[key]
                assert own is not None
                # A new parameter: another layer that shares the old one keeps it.
                found.append(Swap(module, key, own, made))
        merged = {(id(swap.module), swap.key): swap.effective for swap in found}
        for _, _, head in tied_heads(root):
            follows = merged.get((id(own_module(head.embedding)), "weight"))
            own = head.base_layer._parameters["weight"]
            if follows is not None and own is not None:
                found.append(Swap(head.base_layer, "weight", own, follows))
    return tuple(found)


def settle_ties(module: Any) -> None:
    """Let a model that no longer ties its head to its embedding say so, or it would tie them when it is loaded."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "tie_word_embeddings", None) is True:
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        if head is not None and head.weight is not embedding.weight:
            config.tie_word_embeddings = False
