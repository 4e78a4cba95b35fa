"""AdaLoRA's budget as part of an optimiser: after each step, singular triples beyond the budget are set to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftarray import trees
from peftarray.arrays import Params
from peftarray.errors import ConfigError
from peftarray.methods.adalora import AdaLoraConfig
from peftarray.methods.adalora_budget import Importance, allocate
from peftarray.training.optimizer import Optimizer, State

__all__ = ["AdaLoraBudget"]

_TRIPLE = frozenset({"lora_A", "lora_E", "lora_B"})


@dataclass(frozen=True)
class AdaLoraBudget:
    """An optimiser whose steps keep AdaLoRA's budget.

    Its state holds, beside the optimiser's own, how important every entry was so far, and which triples of each module
    are kept (`state["keep"]`, None before the first pruning), which a file's `rank_pattern` says.

    Attributes:
        config: with `total_step`.
        optimizer: makes the steps.

    Source: Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, algorithm 1,
    arXiv:2303.10512.
    """

    compiles: ClassVar[bool] = False
    """Which triples stay is decided on the host."""

    config: AdaLoraConfig
    optimizer: Optimizer

    def __post_init__(self) -> None:
        if self.config.total_step is None:
            message = "AdaLoraConfig.total_step is None; the budget needs the number of training steps"
            raise ConfigError(message)

    def rate_at(self, step: Any) -> Any:
        """The optimiser's."""
        return self.optimizer.rate_at(step)

    def init(self, params: Any) -> State:
        """The state before the first step.

        Raises:
            ConfigError: the parameters have no singular triples.
        """
        if not _layers(params):
            message = "params has no module with lora_A, lora_E and lora_B; the budget is for AdaLoRA's parameters"
            raise ConfigError(message)
        return {"step": 0, "optimizer": self.optimizer.init(params), "importance": None, "keep": None}

    def step(self, params: Any, gradients: Any, state: State, *, factor: Any = 1.0) -> tuple[Any, State]:
        """The parameters and the state after one more step."""
        params, inner = self.optimizer.step(params, gradients, state["optimizer"], factor=factor)
        before = state["importance"]
        layers, importance, keep = allocate(
            self.config,
            state["step"],
            _layers(params),
            _layers(gradients),
            None if before is None else Importance(**before),
            state["keep"],
        )
        pruned = {f"{module}.{name}": array for module, p in layers.items() for name, array in p.items()}
        params = trees.refill(params, [pruned.get(name, array) for name, array in trees.named(params)])
        after = importance and {"sensitivity": importance.sensitivity, "uncertainty": importance.uncertainty}
        return params, {"step": state["step"] + 1, "optimizer": inner, "importance": after, "keep": keep}


def _layers(tree: Any) -> Mapping[str, Params]:
    """module -> its arrays, of the modules that have AdaLoRA's three."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in trees.named(tree):
        module, _, local = name.rpartition(".")
        if local in _TRIPLE:
            found.setdefault(module, {})[local] = array
    return {module: p for module, p in found.items() if p.keys() == _TRIPLE}
