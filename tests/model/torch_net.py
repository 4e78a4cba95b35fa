"""The model of `cases` as a torch module, with the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftarray import AdapterConfig, get_peft_model

from .cases import LAYERS, VOCABULARY, WIDTH, base_weights

__all__ = ["Net", "randomise", "several"]


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = _Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o_proj(torch.tanh(self.q_proj(x))) * self.norm.weight


class Net(nn.Module):
    """Takes row numbers, gives logits."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.model.layers = nn.ModuleList(nn.ModuleDict({"self_attn": _Attention()}) for _ in range(LAYERS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()
        self.load_state_dict({name: torch.from_numpy(array) for name, array in base_weights().items()})
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
            self._tied_weights_keys = ["lm_head.weight"]
        self.config = {"tie_word_embeddings": tied}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer["self_attn"](x)
        return self.lm_head(x)


def randomise(module: nn.Module) -> nn.Module:
    """Move every trained parameter away from its first value."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return module


def several(configs: Mapping[str, AdapterConfig], *names: str, **options: bool) -> Any:
    """A model with these of the table's adapters under their own names; the last is active."""
    first, *others = names
    model = randomise(get_peft_model(Net(**options), configs[first], adapter_name=first))
    for seed, name in enumerate(others, start=1):
        model.add_adapter(name, configs[name], seed=seed)
        model.set_adapter(name)
        randomise(model)
    return model.eval()
