"""AdaLoRA's budget on a torch module with an adapter, for training loops of one's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from peftarray.backends.torch_layers import AdaptedLayer
from torch import nn

from peftarray.adapter import Adapter
from peftarray.errors import ConfigError
from peftarray.method import AdapterConfig
from peftarray.methods import AdaLoraConfig
from peftarray.methods.adalora_budget import Importance, allocate, last_pruning, pruned_adapters

__all__ = ["Budget", "Budgeted"]


@dataclass(frozen=True)
class Budget:
    """Where the budget of a training is.

    Attributes:
        importance: of every entry so far.
        keep: module's name -> which triples were kept at the last pruning; None before the first.
    """

    importance: Importance | None = None
    keep: Mapping[str, Sequence[bool]] | None = None

    def after(self, step: int, config: AdapterConfig, adapters: Mapping[str, Adapter]) -> Budget:
        """The budget after a step of an optimiser; singular values beyond it are set to zero, in place.

        Args:
            step: counted from 0.
            config: with `total_step`.
            adapters: module's name -> its adapter, of parameters that still have the step's gradients.

        Raises:
            ConfigError: the method is not AdaLoRA, a gradient is missing, or the first step was left out.
        """
        if not isinstance(config, AdaLoraConfig) or config.rank_pattern:
            what = "pruned" if isinstance(config, AdaLoraConfig) else type(config).__name__
            message = f"a budget is kept of an AdaLoRA adapter that was not pruned, and this one is {what}"
            raise ConfigError(message)
        ours = {name: adapter for name, adapter in adapters.items() if isinstance(adapter.config, AdaLoraConfig)}
        found = {name: adapter.params for name, adapter in ours.items()}
        if step < last_pruning(config):
            for name, params in found.items():
                if any(array.grad is None for array in params.values()):
                    message = f"{name} has no gradient; keep the budget after backward(), and before zero_grad()"
                    raise ConfigError(message)
        layers = {name: {key: array.detach() for key, array in params.items()} for name, params in found.items()}
        gradients = {name: {key: array.grad for key, array in params.items()} for name, params in found.items()}
        with torch.no_grad():
            pruned, importance, keep = allocate(config, step, layers, gradients, self.importance, self.keep)
            for name, params in pruned.items():
                found[name]["lora_E"].copy_(params["lora_E"])
        return Budget(importance, keep)


class Budgeted(nn.Module):
    """A module with an adapter, of which AdaLoRA's budget can be kept.

    Attributes:
        peft_config: name of an adapter -> its configuration.
        active_adapter: the name of the one that acts.
    """

    peft_config: dict[str, AdapterConfig]
    active_adapter: str
    _budget: Budget = Budget()

    @abstractmethod
    def _adapted(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """(name in a file, layer) of what the active adapter is on."""

    def update_and_allocate(self, global_step: int) -> None:
        """Keep AdaLoRA's budget after a step of an optimiser, counted from 0, and before its gradients are cleared.

        Raises:
            ConfigError: the adapter is not AdaLoRA's, or there are no gradients.
        """
        self._budget = self._budget.after(global_step, self.peft_config[self.active_adapter], self._adapters())

    def prune(self, keep: Mapping[str, Sequence[bool]]) -> Self:
        """Leave out all but some triples of an AdaLoRA adapter, in place; its parameters are new ones then.

        Args:
            keep: module's name -> which triples stay, such as `history.state["keep"]` of an `AdaLoraBudget`.

        Raises:
            PeftError: of the kind that fits, where the adapter is not AdaLoRA's or has other modules.
        """
        name = self.active_adapter
        self.peft_config[name], small = pruned_adapters(self.peft_config[name], self._adapters(), keep)
        for module, layer in self._adapted():
            if module in keep:
                is_trained = any(array.requires_grad for array in layer.adapter(name).params.values())
                params = {key: array.detach() for key, array in small[module].params.items()}
                layer.add(name, replace(small[module], params=params, trainable=is_trained), {})
        self._budget = Budget()
        return self

    def _within_budget(self) -> tuple[AdapterConfig, dict[str, Adapter]]:
        """The active adapter as a file holds it: without the triples that the budget left out."""
        config, adapters = self.peft_config[self.active_adapter], self._adapters()
        return (config, adapters) if self._budget.keep is None else pruned_adapters(config, adapters, self._budget.keep)

    def _adapters(self) -> dict[str, Adapter]:
        return {module: layer.adapter(self.active_adapter) for module, layer in self._adapted()}
