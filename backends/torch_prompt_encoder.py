"""The arrays of a soft prompt as a torch module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peftarray.prompts import Prompt
from peftarray.prompts.prompt import EMBEDDINGS

__all__ = ["PromptArrays"]

_ROWS = "embedding.weight"
"""What PEFT's encoders call the rows that files call `prompt_embeddings`."""


class PromptArrays(nn.Module):
    """The arrays of a prompt, under the names that PEFT's encoders give them."""

    def __init__(self, config: Prompt, arrays: Mapping[str, torch.Tensor], *, trainable: bool) -> None:
        super().__init__()
        table = config.params()
        self._paths = {name: _ROWS if name == EMBEDDINGS else name for name in arrays}
        for name, array in arrays.items():
            holder, _, last = self._paths[name].rpartition(".")
            is_trained = trainable and name in table and not table[name].frozen
            self._within(holder).register_parameter(last, nn.Parameter(array, requires_grad=is_trained))

    def arrays(self) -> dict[str, torch.Tensor]:
        """The arrays by the names of the prompt's table."""
        found = {}
        for name, path in self._paths.items():
            holder, _, last = path.rpartition(".")
            found[name] = getattr(self.get_submodule(holder), last)
        return found

    def _within(self, path: str) -> nn.Module:
        inner: nn.Module = self
        for name in filter(None, path.split(".")):
            if name not in dict(inner.named_children()):
                inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        return inner
