"""Tiny torch models of one kind of layer, drawn; what PEFT adapts in the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from peftarray import Layer, Window

NAMES = ("block.first", "block.second")
_CONVOLUTIONS = {"conv1d": torch.nn.Conv1d, "conv2d": torch.nn.Conv2d, "conv3d": torch.nn.Conv3d}


class Pair(torch.nn.Module):
    """Two layers side by side, each with an input of its own."""

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict({"first": first, "second": second})

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.block["first"](first), self.block["second"](second)


@dataclass(frozen=True)
class Model:
    """A pair of layers of one kind.

    Attributes:
        kind: of both layers.
        module: the model.
        shapes: of an input for each layer.
    """

    kind: str
    module: Pair
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Row numbers for an embedding, and normal values for other layers."""
        draw = torch.Generator().manual_seed(7)
        if self.kind == "embedding":
            rows = [self.layer(name).num_embeddings for name in NAMES]
            return tuple(torch.randint(n, shape, generator=draw) for n, shape in zip(rows, self.shapes, strict=True))
        return tuple(torch.randn(shape, generator=draw, dtype=dtype) for shape in self.shapes)

    def layer(self, name: str) -> Any:
        return self.module.get_submodule(name)

    @property
    def is_dilated(self) -> bool:
        return any(d != 1 for name in NAMES for d in getattr(self.layer(name), "dilation", ()))

    def tensors(self, dtype: Any) -> dict[str, np.ndarray]:
        """Every tensor of the model by its name."""
        return {name: tensor.detach().numpy().astype(dtype) for name, tensor in self.module.state_dict().items()}

    def described(self) -> dict[str, Layer]:
        """What the weights do not say of the layers: how a convolution slides."""
        if self.kind not in _CONVOLUTIONS:
            return {}
        found = {}
        for name in NAMES:
            module = self.layer(name)
            window = Window(module.stride, module.padding, module.dilation, module.groups)
            found[name] = Layer(name, "conv", tuple(module.weight.shape), bias=module.bias is not None, window=window)
        return found


@st.composite
def models(draw: st.DrawFn, kind: str) -> Model:
    """Layers of even sizes, not square where the kind leaves a choice, with a bias or without."""
    torch.manual_seed(draw(st.integers(0, 99)))
    parts = [draw(_layer(kind)) for _ in NAMES]
    return Model(kind, Pair(*(module for module, _ in parts)).eval(), tuple(shape for _, shape in parts))


@st.composite
def _layer(draw: st.DrawFn, kind: str) -> tuple[torch.nn.Module, tuple[int, ...]]:
    sizes = st.sampled_from([2, 4, 6, 8, 12, 16])
    fan_in, out, bias = draw(sizes), draw(sizes), draw(st.booleans())
    if kind == "linear":
        return torch.nn.Linear(fan_in, out, bias=bias), (2, 3, fan_in)
    if kind == "conv1d_transposed":
        module: torch.nn.Module = Conv1D(out, fan_in)
        torch.nn.init.normal_(module.bias)
        return module, (2, 3, fan_in)
    if kind == "embedding":
        return torch.nn.Embedding(fan_in + 7, out), (2, 5)
    rank = int(kind[-2])
    window = draw(_windows(rank, math.gcd(fan_in, out)))
    module = _CONVOLUTIONS[kind](fan_in, out, bias=bias, **window)
    return module, (2, fan_in, *(9 for _ in range(rank)))


@st.composite
def _windows(draw: st.DrawFn, rank: int, common: int) -> dict[str, Any]:
    """Half of them as most models have them: a square kernel, no dilation, no groups."""
    if draw(st.booleans()):
        return {name: draw(st.integers(low, 3)) for name, low in (("kernel_size", 1), ("stride", 1), ("padding", 0))}
    each = {"kernel_size": (1, 3), "stride": (1, 3), "padding": (0, 2), "dilation": (1, 2)}
    window = {name: draw(st.tuples(*[st.integers(*bounds)] * rank)) for name, bounds in each.items()}
    return window | {"groups": draw(st.sampled_from([1, 1, common]))}
