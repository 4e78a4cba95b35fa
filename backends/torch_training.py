"""What `peftarray.fit` trains of a `torch.nn.Module`: the parameters that require a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftarray.errors import ConfigError

__all__ = ["TrainableModule"]


class TrainableModule:
    """A module as `fit` sees it.

    Args:
        module: with parameters that require a gradient; the others stay as they are.
        dtype: that of torch's autocast; None computes as it is.

    Raises:
        ConfigError: none of its parameters does.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._module, self._dtype = module, dtype
        if not self.params:
            message = f"no parameter of {type(module).__name__} requires a gradient; give it an adapter, or unfreeze it"
            raise ConfigError(message)

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """Name -> parameter, as the module names it."""
        return {name: parameter for name, parameter in self._module.named_parameters() if parameter.requires_grad}

    @params.setter
    def params(self, params: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(params[name])

    def with_params(self, params: Mapping[str, torch.Tensor]) -> WithParams:
        """The module, called with other tensors in place of these parameters."""
        return WithParams(self._module, params, self._dtype)

    def in_precision(self, dtype: str) -> TrainableModule:
        """The same under torch's autocast."""
        return TrainableModule(self._module, getattr(torch, dtype))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module, and all within it, are in evaluation mode here."""
        modes = {module: module.training for module in self._module.modules()}
        self._module.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


class WithParams:
    """A module to be called with other parameters. What else one asks of it, it has from the module."""

    def __init__(self, module: nn.Module, params: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
        self._module, self._params, self._dtype = module, dict(params), dtype

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """Name -> the tensor that it is called with."""
        return self._params

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._dtype is None:
            return torch.func.functional_call(self._module, self._params, arguments, options)
        device = next(iter(self._params.values())).device.type
        with torch.autocast(device, dtype=self._dtype):
            return torch.func.functional_call(self._module, self._params, arguments, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
