"""AdaLoRA's budget on a torch module with adapters, for training loops of one's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

from peftarray.backends.torch_acting import ActingModule
from peftarray.backends.torch_holding import Held

from peftarray.errors import ConfigError
from peftarray.formats.peft_writer import SavedAdapters
from peftarray.methods.adalora_budget import pruned_adapters

__all__ = ["Budgeted"]


class Budgeted(ActingModule):
    """A module with adapters, of which AdaLoRA's budget can be kept. Abstract, as `ActingModule` is."""

    @abstractmethod
    def hotswap(self, adapter_name: str, source: SavedAdapters) -> None:
        """Let another adapter take the place and name of one."""

    def update_and_allocate(self, global_step: int) -> None:
        """Keep AdaLoRA's budget after a step of an optimiser, counted from 0, and before its gradients are cleared.

        Raises:
            ConfigError: the adapter is not AdaLoRA's, there are no gradients, or several adapters are set.
        """
        name, held = self._only()
        after = held.budget.after(global_step, held.config, held.adapters(name))
        self._held = {**self._held, name: replace(held, budget=after)}

    def prune(self, keep: Mapping[str, Sequence[bool]]) -> Self:
        """Leave out all but some triples of the AdaLoRA adapter that is set; its parameters are new ones then.

        Args:
            keep: module's name -> which triples stay, such as `history.state["keep"]` of an `AdaLoraBudget`.

        Raises:
            PeftError: of the kind that fits, where the adapter is not AdaLoRA's or has other modules.
        """
        name, held = self._only()
        config, small = pruned_adapters(held.config, held.adapters(name), keep)
        self.hotswap(name, replace(held.value(name), config=config, adapters=small))
        return self

    def _only(self) -> tuple[str, Held]:
        """The adapter that is set.

        Raises:
            ConfigError: several are, or none is.
        """
        names = self._now.active
        if len(names) != 1:
            message = f"the adapters that are set are {list(names)}; a budget is that of one: set it alone"
            raise ConfigError(message)
        return names[0], self._known(names[0])
