"""What `peftarray.fit` trains of a `torch.nn.Module`: the parameters that require a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftarray.errors import ConfigError

__all__ = ["TrainableModule"]


class TrainableModule:
    """A module as `fit` sees it.

    Args:
        module: with parameters that require a gradient; the others stay as they are.

    Raises:
        ConfigError: none of its parameters does.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
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
        return WithParams(self._module, params)


class WithParams:
    """A module to be called with other parameters. What else one asks of it, it has from the module."""

    def __init__(self, module: nn.Module, params: Mapping[str, torch.Tensor]) -> None:
        self._module, self._params = module, dict(params)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return torch.func.functional_call(self._module, self._params, arguments, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
