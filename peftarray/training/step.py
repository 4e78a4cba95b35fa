"""One step of a training: gradients of a loss over a few batches, made ready, and the optimiser's step with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peftarray import trees
from peftarray.arrays import Array, namespace, stop_gradient, to_host, wide
from peftarray.backend import Backend
from peftarray.draws import step_key
from peftarray.errors import ConfigError
from peftarray.gradients import Chosen
from peftarray.training.clipping import clip_by_norm, clip_by_value, global_norm
from peftarray.training.optimizer import Optimizer, State
from peftarray.training.precision import LossScale, Precision
from peftarray.training.schedules import Schedule
from peftarray.training.workers import Workers

__all__ = ["Now", "Outcome", "Recipe", "Stepper"]

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Recipe:
    """What decides how a training goes, besides its arrays, its loss and its batches.

    Attributes:
        optimizer: makes the steps.
        schedule: what the rate is multiplied by.
        precision: what the loss is computed in.
        clip_norm, clip_value: bounds of the gradients.
        accumulate: batches of a step.
        seed: of the loss's keys; None gives it none.
    """

    optimizer: Optimizer
    schedule: Schedule
    precision: Precision
    clip_norm: float | None = None
    clip_value: float | None = None
    accumulate: int = 1
    seed: int | None = None

    def described(self) -> dict[str, Any]:
        """The same as text and numbers."""
        return {
            "optimizer": repr(self.optimizer),
            "schedule": self.schedule.described(),
            "precision": repr(self.precision),
            "clip_norm": self.clip_norm,
            "clip_value": self.clip_value,
            "accumulate": self.accumulate,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Now:
    """Where a training is.

    Attributes:
        step: steps done.
        trained: name -> array.
        state: the optimiser's.
        scale: of the loss; None where it has none.
    """

    step: int
    trained: Arrays
    state: State
    scale: LossScale | None


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes:
        now: where the training is after it; as before but for `step` and `scale` where a number is not finite.
        loss: the mean over its batches.
        norm: of the gradients, before they were clipped.
        bad: names of the arrays whose gradients are not finite.
    """

    now: Now
    loss: float
    norm: float
    bad: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients are."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Stepper:
    """Makes the steps of a training.

    Args:
        loss: of the whole tree, a batch, and a key where the recipe has a seed.
        chosen: the tree, and which of its arrays are trained.
        recipe: how.
        backend: of the arrays.
        compiled: whether to compile.
        workers: who makes the gradients of a step's batches.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        chosen: Chosen,
        recipe: Recipe,
        backend: Backend,
        compiled: bool,
        workers: Workers,
    ) -> None:
        self._loss, self._chosen, self._recipe, self._workers = loss, chosen, recipe, workers
        trained = {chosen.names[place] for place in chosen.places}
        self._rest = {
            name: value
            for name, value in zip(chosen.names, chosen.values, strict=True)
            if name not in trained and hasattr(value, "dtype")
        }
        self._gradients = backend.value_and_grad(self._value, compiled=compiled)
        self._evaluate = backend.jit(self._value) if compiled else self._value
        self._update = backend.jit(self._updated) if compiled and recipe.optimizer.compiles else self._updated

    def start(self) -> Now:
        """The training before its first step."""
        chosen = self._chosen
        trained = {chosen.names[place]: stop_gradient(chosen.values[place]) for place in chosen.places}
        return Now(0, trained, self._recipe.optimizer.init(trained), self._recipe.precision.scale)

    def tree(self, trained: Arrays) -> Any:
        """The whole tree with these arrays in it."""
        return self._filled(trained, self._rest)

    def __call__(self, now: Now, batches: Sequence[Any]) -> Outcome:
        """The training after one more step."""
        recipe, scale = self._recipe, 1.0 if now.scale is None else now.scale.value
        # What overflows is found in the numbers themselves.
        with np.errstate(all="ignore"):
            value, gradients = self._summed(now, batches, scale)
            share = 1.0 / (len(batches) * scale)
            trained, state, norm = self._update(now.trained, gradients, now.state, recipe.schedule(now.step), share)
            loss, length = float(to_host(value)) * share, float(to_host(norm))
        finite = math.isfinite(loss) and math.isfinite(length)
        after = replace(now, step=now.step + 1, scale=now.scale and now.scale.after(finite))
        if finite:
            return Outcome(replace(after, trained=trained, state=state), loss, length)
        return Outcome(after, loss, length, _not_finite(gradients))

    def evaluate(self, now: Now, batches: Iterable[Any]) -> float:
        """The mean loss over batches, without keys."""
        with np.errstate(all="ignore"):
            losses = list(self._workers.map(lambda batch: self._loss_of(now, batch), batches))
        if not losses:
            message = "eval_batches has none; give a list or another object that can be gone through again"
            raise ConfigError(message)
        return math.fsum(losses) / len(losses)

    def _summed(self, now: Now, batches: Sequence[Any], scale: float) -> tuple[Array, Arrays]:
        """The loss and the gradients, summed over batches."""
        seed, first = self._recipe.seed, now.step * self._recipe.accumulate

        def gradients_of(placed: tuple[int, Any]) -> tuple[Array, Arrays]:
            place, batch = placed
            key = None if seed is None else step_key(seed, first + place)
            return self._gradients(now.trained, self._rest, batch, scale, key)

        total: Any = None
        sums: Arrays = {}
        for value, gradients in self._workers.map(gradients_of, enumerate(batches)):
            total = value if total is None else total + value
            sums = {name: sums[name] + g for name, g in gradients.items()} if sums else gradients
        return total, sums

    def _loss_of(self, now: Now, batch: Any) -> float:
        return float(to_host(self._evaluate(now.trained, self._rest, batch, 1.0, None)))

    def _value(self, trained: Arrays, rest: Arrays, batch: Any, scale: Any, key: Any) -> Any:
        """The loss as it is differentiated: computed in the short dtype, then float32 and scaled."""
        precision = self._recipe.precision
        given = (precision.cast(self._filled(trained, rest)), precision.cast(batch))
        value = self._loss(*given) if self._recipe.seed is None else self._loss(*given, key)
        if not hasattr(value, "dtype"):
            return value
        value = namespace(value).astype(value, wide(value).dtype, copy=False)
        return value if precision.scale is None else value * scale

    def _updated(
        self, trained: Arrays, gradients: Arrays, state: State, factor: Any, share: Any
    ) -> tuple[Arrays, State, Array]:
        recipe = self._recipe
        if recipe.accumulate > 1 or recipe.precision.scale is not None:
            gradients = {name: g * share for name, g in gradients.items()}
        norm = length = global_norm(gradients)
        if recipe.clip_value is not None:
            gradients = clip_by_value(gradients, recipe.clip_value)
            length = None
        if recipe.clip_norm is not None:
            gradients, _ = clip_by_norm(gradients, recipe.clip_norm, norm=length)
        return *recipe.optimizer.step(trained, gradients, state, factor=factor), norm

    def _filled(self, trained: Arrays, rest: Arrays) -> Any:
        arrays = {**rest, **trained}
        pairs = zip(self._chosen.names, self._chosen.values, strict=True)
        return trees.refill(self._chosen.tree, [arrays.get(name, value) for name, value in pairs])


def _not_finite(gradients: Arrays) -> tuple[str, ...]:
    return tuple(name for name, g in gradients.items() if not math.isfinite(float(to_host(global_norm(g)))))
