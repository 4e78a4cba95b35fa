"""Where AdaLoRA's budget of an adapter on a torch module is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peftarray.adapter import Adapter
from peftarray.errors import ConfigError
from peftarray.method import AdapterConfig
from peftarray.methods import AdaLoraConfig
from peftarray.methods.adalora_budget import Importance, allocate, last_pruning, pruned_adapters

__all__ = ["Budget"]


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

    def within(
        self, config: AdapterConfig, adapters: Mapping[str, Adapter]
    ) -> tuple[AdapterConfig, dict[str, Adapter]]:
        """An adapter as a file holds it: without the triples that the budget left out."""
        return (config, dict(adapters)) if self.keep is None else pruned_adapters(config, adapters, self.keep)
