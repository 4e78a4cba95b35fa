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
_WRAPPED = "base_model.model."
"""What stands before a module's name in a torch module; the adapter's name stands behind its arrays' there."""


@dataclass(frozen=True)
class AdaLoraBudget:
    """An optimiser whose steps keep AdaLoRA's budget.

    Its state holds, beside the optimiser's own, how important every entry was so far, and which triples of each module
    are kept (`state["keep"]`, None before the first pruning): `model.prune(history.state["keep"])` leaves the others
    out, as a file with a `rank_pattern` does. Parameters may be those of a tree, or of a torch module.

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
        if not _places(params):
            message = "params has no module with lora_A, lora_E and lora_B; the budget is for AdaLoRA's parameters"
            raise ConfigError(message)
        return {"step": 0, "optimizer": self.optimizer.init(params), "importance": None, "keep": None}

    def step(self, params: Any, gradients: Any, state: State, *, factor: Any = 1.0) -> tuple[Any, State]:
        """The parameters and the state after one more step."""
        params, inner = self.optimizer.step(params, gradients, state["optimizer"], factor=factor)
        before, places = state["importance"], _places(params)
        layers, importance, keep = allocate(
            self.config,
            state["step"],
            _layers(params, places),
            _layers(gradients, places),
            None if before is None else Importance(**before),
            state["keep"],
        )
        pruned = {places[module][name]: array for module, p in layers.items() for name, array in p.items()}
        params = trees.refill(params, [pruned.get(name, array) for name, array in trees.named(params)])
        after = importance and {"sensitivity": importance.sensitivity, "uncertainty": importance.uncertainty}
        return params, {"step": state["step"] + 1, "optimizer": inner, "importance": after, "keep": keep}


def _places(tree: Any) -> Mapping[str, Mapping[str, str]]:
    """module -> the name of each of AdaLoRA's three arrays in the tree, of the modules that have them."""
    found: dict[str, dict[str, str]] = {}
    for name, _ in trees.named(tree):
        words = name.split(".")
        last = next((i for i in (len(words) - 1, len(words) - 2) if i >= 0 and words[i] in _TRIPLE), None)
        if last is not None:
            found.setdefault(".".join(words[:last]).removeprefix(_WRAPPED), {})[words[last]] = name
    return {module: p for module, p in found.items() if p.keys() == _TRIPLE}


def _layers(tree: Any, places: Mapping[str, Mapping[str, str]]) -> dict[str, Params]:
    """module -> its arrays."""
    arrays = dict(trees.named(tree))
    return {module: {local: arrays[name] for local, name in p.items()} for module, p in places.items()}
