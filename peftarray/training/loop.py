"""The loop of a training: step after step, with evaluations, checkpoints and whoever looks on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peftarray.arrays import Array, device
from peftarray.backend import Backend
from peftarray.errors import NumberError
from peftarray.training.batches import Position, Source, groups
from peftarray.training.callbacks import Callback, Moment
from peftarray.training.checkpoints import Checkpoints
from peftarray.training.history import History
from peftarray.training.progress import Advance, Reporter, amount
from peftarray.training.step import Now, Outcome, Recipe, Stepper

__all__ = ["Loop"]

_SMALLEST_SCALE = 2.0**-10


@dataclass
class Loop:
    """A training on its way.

    Attributes:
        stepper: makes the steps.
        recipe: how.
        backend: of the arrays.
        batches: of the training.
        steps, epochs: where it ends; None for either that does not matter.
        eval_batches, eval_every: what is evaluated, and how often; each epoch if None.
        callbacks: who looks on.
        checkpoints: where they go, if anywhere.
        checkpoint_every: steps from one to the next.
        now, position: where it is.
        publish: gives whoever looks on the parameters.
        evaluating: in this context the model drops nothing.
        history: what it did.
    """

    stepper: Stepper
    recipe: Recipe
    backend: Backend
    batches: Source
    steps: int | None
    epochs: int | None
    eval_batches: Iterable[Any] | None
    eval_every: int | None
    callbacks: Sequence[Callback]
    checkpoints: Checkpoints | None
    checkpoint_every: int
    now: Now
    publish: Callable[[Any], None]
    evaluating: Callable[[], AbstractContextManager[Any]] = nullcontext
    position: Position = field(default_factory=Position)
    history: History = field(default_factory=History)

    @property
    def done(self) -> bool:
        """Whether it has come to its end."""
        at_last_step = self.steps is not None and self.now.step >= self.steps
        after_last_epoch = self.epochs is not None and self.position.epoch >= self.epochs
        return bool(self.history.stopped) or at_last_step or after_last_epoch

    def run(self, reporter: Reporter) -> None:
        """Go on to the end.

        Raises:
            NumberError: a loss or gradient is not finite.
        """
        stream = groups(self.batches, self.recipe.accumulate, start=self.position)
        while not self.done:
            group, position = next(stream)
            outcome = self.stepper(self.now, group)
            if not outcome.finite:
                self._skip(outcome, reporter)
            self._record(outcome)
            epoch, self.now, self.position = self.position.epoch, outcome.now, position
            counts = [amount(batch) for batch in group]
            rate = self.history.rates[-1]
            reporter.advance(Advance(self.now.step, outcome.loss, rate, sum(n for n, _ in counts), counts[0][1]))
            evaluated = self._evaluate(position.epoch > epoch)
            self._show(epoch, evaluated)
            if self.checkpoints is not None and (self.done or self.now.step % self.checkpoint_every == 0):
                self.checkpoints.save(self.now.step, self._content())

    def restore(self, content: Mapping[str, Any]) -> None:
        """Go back to where a checkpoint was written."""
        like = self.now.trained
        arrays = {name: content[name] for name in ("trained", "state")}
        placed = _placed(arrays, like, next(iter(like.values())), self.backend)
        scale = self.now.scale and replace(self.now.scale, **content["scale"])
        # In the order of the model's tree, which JSON and compilers need not keep.
        trained = {name: placed["trained"][name] for name in like}
        self.now = Now(content["step"], trained, placed["state"], scale)
        self.position = Position(*content["position"])
        self.backend.set_random_state(content["random"])
        told = content["history"]
        self.history = History(
            losses=told["losses"].tolist(),
            rates=told["rates"].tolist(),
            norms=told["norms"].tolist(),
            evaluations=[(step, loss) for step, loss in told["evaluations"]],
            skipped=told["skipped"],
            stopped=told["stopped"],
        )

    def _show(self, epoch: int, evaluated: bool) -> None:
        """Let everybody look on; a reason of any of them ends the training."""
        if self.callbacks:
            params = self.stepper.tree(self.now.trained)
            self.publish(params)
            moment = Moment(self.now.step, epoch, params, evaluated, self.history)
            reasons = [callback(moment) for callback in self.callbacks]
            self.history.stopped = ", ".join(reason for reason in reasons if reason)

    def _content(self) -> dict[str, Any]:
        history, scale = self.history, self.now.scale
        return {
            "step": self.now.step,
            "trained": self.now.trained,
            "state": self.now.state,
            "scale": scale and {"value": scale.value, "good": scale.good},
            "position": self.position,
            "random": self.backend.random_state(),
            "history": {
                "losses": np.asarray(history.losses, np.float64),
                "rates": np.asarray(history.rates, np.float64),
                "norms": np.asarray(history.norms, np.float64),
                "evaluations": history.evaluations,
                "skipped": history.skipped,
                "stopped": history.stopped,
            },
        }

    def _record(self, outcome: Outcome) -> None:
        step, history = self.now.step, self.history
        history.losses.append(outcome.loss)
        history.norms.append(outcome.norm)
        history.rates.append(float(self.recipe.optimizer.rate_at(step + 1) * self.recipe.schedule(step)))
        if not outcome.finite:
            history.skipped.append(step)

    def _skip(self, outcome: Outcome, reporter: Reporter) -> None:
        step, before, after = self.now.step, self.now.scale, outcome.now.scale
        if before is not None and after is not None and after.value >= _SMALLEST_SCALE:
            reporter.note(
                f"step {step} changed nothing: its gradients overflow; loss scale {before.value:g} -> {after.value:g}"
            )
            return
        what = f"the loss of step {step} is {outcome.loss}"
        if outcome.bad:
            others = f" and {len(outcome.bad) - 3} others" if len(outcome.bad) > 3 else ""
            what += f", and the gradients of {', '.join(outcome.bad[:3])}{others} are not finite"
        message = (
            f"{what} (epoch {self.position.epoch}, from batch {self.position.batch} on); look at that batch, lower the "
            "rate, warm it up, or give clip_norm"
        )
        raise NumberError(message)

    def _evaluate(self, epoch_ends: bool) -> bool:
        """Evaluate where it is time to; whether it was."""
        if self.eval_batches is None:
            return False
        due = epoch_ends if self.eval_every is None else self.now.step % self.eval_every == 0
        if due or self.done:
            with self.evaluating():
                loss = self.stepper.evaluate(self.now, self.eval_batches)
            self.history.evaluations.append((self.now.step, loss))
        return due or self.done


def _placed(tree: Any, like: Mapping[str, Array], near: Array, backend: Backend) -> Any:
    """The tree with its arrays moved to the library, each to where the parameter lies whose name is on its way."""
    if isinstance(tree, dict):
        return {key: _placed(inner, like, like.get(key, near), backend) for key, inner in tree.items()}
    if isinstance(tree, list):
        return [_placed(inner, like, near, backend) for inner in tree]
    return backend.from_host(tree, device=device(near)) if isinstance(tree, np.ndarray) else tree
