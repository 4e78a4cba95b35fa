"""A network with one layer of each kind, and PEFT's adapters on it as if trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from transformers.pytorch_utils import Conv1D

NAMES = ("linear", "conv1d", "conv", "point", "table")


class Net(torch.nn.Module):
    """One layer of each kind; none is square."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(7, 9)
        self.conv1d = Conv1D(8, 6)
        self.conv = torch.nn.Conv2d(4, 6, (3, 2))
        self.point = torch.nn.Conv2d(5, 6, 1)
        self.table = torch.nn.Embedding(11, 8)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def live_model(configs: list[Any], net: Any = None, seed: int = 0) -> Any:
    """A PEFT model with an adapter for each configuration, called "0", "1" ..., with random values."""
    torch.manual_seed(seed)
    with quiet():
        model = peft.get_peft_model(net or Net(), configs[0], adapter_name="a0")
        for place, config in enumerate(configs[1:], start=1):
            model.add_adapter(f"a{place}", config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw) + (1.0 if "magn" in name else 0))
    return model
