"""`fit`: training in one call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peftarray.allocation import keep_freed_memory
from peftarray.backend import Backend, backend_of, backend_of_type, load_backend
from peftarray.errors import ConfigError, OutputError
from peftarray.gradients import Chosen
from peftarray.settings import Rule, boolean, number, optional, whole
from peftarray.training.batches import Source, length
from peftarray.training.callbacks import Callback
from peftarray.training.checkpoints import Checkpoints
from peftarray.training.history import History
from peftarray.training.loop import Loop
from peftarray.training.optimizer import Optimizer
from peftarray.training.optimizers import AdamW
from peftarray.training.precision import Precision, precision_of
from peftarray.training.progress import training_progress
from peftarray.training.schedules import Schedule, constant
from peftarray.training.step import Recipe, Stepper
from peftarray.training.workers import Workers

__all__ = ["Trainable", "fit"]


@runtime_checkable
class Trainable(Protocol):
    """What `fit` asks of a model that is not a tree of arrays.

    Attributes:
        params: the tree of arrays that training changes. `fit` reads it once, and sets it at its end, whatever that is.
    """

    params: Any

    def with_params(self, params: Any) -> Any:
        """The model with other arrays in that tree, as the loss gets it. They may be traced, so nothing is copied."""


@runtime_checkable
class InPrecision(Protocol):
    """A `Trainable` that knows how to compute in a shorter dtype than its weights have."""

    def in_precision(self, dtype: str) -> Any:
        """The model computing in a dtype, such as `"bfloat16"`, as `fit` trains it."""


@runtime_checkable
class Evaluated(Protocol):
    """A `Trainable` that must be told when nothing is to be dropped."""

    def evaluating(self) -> AbstractContextManager[Any]:
        """In this context it drops nothing."""


def fit(
    model: Any,
    loss: Callable[..., Any],
    batches: Source,
    *,
    optimizer: Optimizer | None = None,
    schedule: Schedule | Callable[[int], float] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    precision: str | Precision = "fp32",
    frozen: Collection[str] = (),
    clip_norm: float | None = None,
    clip_value: float | None = None,
    accumulate: int = 1,
    workers: int = 1,
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    eval_batches: Iterable[Any] | None = None,
    eval_every: int | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = True,
    compile: bool | None = None,
    progress: bool = True,
) -> History:
    """Train arrays until a loss is small.

    Args:
        model: a tree of arrays in nested dicts, lists and tuples; or a `Trainable`, an object with `params`, such a
            tree, and `with_params(params)`, which gives the model with other arrays in it; or a `torch.nn.Module`,
            whose parameters that require a gradient are trained.
        loss: `loss(params, batch)` gives one number; a model is passed in place of `params`.
        batches: what can be gone through again: a list, `Batches`, a data loader; or a function from the number of an
            epoch to its batches, which must be the same each time it is asked.
        optimizer: AdamW if None.
        schedule: what the rate is multiplied by at each step, counted from 0; 1 if None.
        steps: how often the parameters change; None for all of `epochs`.
        epochs: how often all batches are gone through; one if neither is given. Whichever ends first ends the training.
        precision: `"fp32"`, `"bf16"` or `"fp16"`: what `loss` is given its parameters and its batch in. A `PeftModel`'s
            base follows, and a module computes under torch's autocast; other weights that the loss brings along should
            be in the same. In fp16 the loss is scaled; a step whose gradients overflow is skipped.
        frozen: names of arrays or branches of a tree that stay as they are.
        clip_norm: the largest norm of all gradients together.
        clip_value: the largest absolute value in them; applied first.
        accumulate: batches whose mean gradient makes a step.
        workers: threads that work on the batches of a step, and on those of an evaluation, side by side, each with one
            thread of the BLAS library: of use on NumPy alone, with `accumulate` at least as large. Each holds what its
            batch needs. A loss then draws random numbers by its key only.
        seed: if given, `loss(params, batch, key)` is called with a key for each batch, from which `dropout` draws.
        callbacks: called after each step, when a model has its parameters; a text that one returns ends the training.
        eval_batches: batches of which the mean loss is recorded, without changing anything.
        eval_every: steps from one evaluation to the next; each epoch if None. The last step is always followed by one.
        checkpoint_dir: a folder for checkpoints. A training that was killed goes on from the newest, and makes the same
            bytes as one that was not.
        checkpoint_every: steps from one to the next. The last step is always followed by one.
        resume: go on from the checkpoints in the folder; if False they must not be there.
        compile: the loss and the step, by the library's compiler; None does so where it is the library's habit.
        progress: show it on standard error.

    Returns:
        What happened, with the trained arrays as `params`. A model has them too.

    Raises:
        ConfigError: an argument is not allowed, or a checkpoint is of another training.
        NumberError: a loss or gradient is not finite. The model keeps the parameters of the step before.
        OutputError: a checkpoint cannot be written, or is there and `resume` is False.

    Example:
        >>> import numpy as np
        >>> def loss(params, batch):
        ...     return np.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        >>> batches = [{"x": np.eye(2), "y": np.asarray([1.0, 2.0])}]
        >>> history = fit({"w": np.zeros(2)}, loss, batches, optimizer=AdamW(0.1), steps=500, progress=False)
        >>> history.params["w"].round(2).tolist()
        [1.0, 2.0]
    """
    _check("steps epochs eval_every", optional(whole(1)), steps, epochs, eval_every)
    _check("accumulate workers checkpoint_every", whole(1), accumulate, workers, checkpoint_every)
    _check("clip_norm clip_value", optional(_above_zero), clip_norm, clip_value)
    _check("seed", optional(_integer), seed)
    _check("resume progress", boolean, resume, progress)
    _check("compile", optional(boolean), compile)
    _check("optimizer", optional(_optimizer), optimizer)
    _check("batches eval_batches", _several, batches, eval_batches)
    _check("callbacks", _callbacks, callbacks)
    is_tree = isinstance(model, (Mapping, list, tuple))
    model = model if is_tree else _as_trainable(model)
    epochs = 1 if steps is None and epochs is None else epochs
    total = _total(batches, steps, epochs, accumulate)
    chosen = Chosen(model if is_tree else model.params, frozen)
    recipe = Recipe(
        optimizer=AdamW() if optimizer is None else optimizer,
        schedule=_as_schedule(schedule).over(total),
        precision=precision_of(precision),
        clip_norm=clip_norm,
        clip_value=clip_value,
        accumulate=accumulate,
        seed=seed,
    )
    recipe.schedule(0)  # which says if it lacks the number of steps
    recipe.precision.check(chosen.arrays[0])
    backend = load_backend(backend_of(*chosen.arrays))
    _check_workers(workers, accumulate, chosen, backend)
    short = recipe.precision.dtype
    ready = model.in_precision(short) if isinstance(model, InPrecision) and short != "float32" else model
    of_tree = loss if is_tree else lambda params, *others: loss(ready.with_params(params), *others)

    def publish(params: Any) -> None:
        if not is_tree:
            model.params = params

    compiled = backend.COMPILES if compile is None else compile
    stepper = Stepper(of_tree, chosen, recipe, backend, compiled, Workers(workers))
    checkpoints = None if checkpoint_dir is None else Checkpoints(checkpoint_dir, _setup(recipe, chosen))
    loop = Loop(
        stepper=stepper,
        recipe=recipe,
        backend=backend,
        batches=batches,
        steps=steps,
        epochs=epochs,
        eval_batches=eval_batches,
        eval_every=eval_every,
        callbacks=callbacks,
        checkpoints=checkpoints,
        checkpoint_every=checkpoint_every,
        now=stepper.start(),
        publish=publish,
        evaluating=ready.evaluating if isinstance(ready, Evaluated) else nullcontext,
    )
    keep_freed_memory(held=_HELD)
    with nullcontext() if checkpoints is None else checkpoints.locked():
        if checkpoints is not None and checkpoints.files():
            if not resume:
                message = f"checkpoint_dir {checkpoint_dir} holds a training; remove it, give another, or resume"
                raise OutputError(message)
            loop.restore(checkpoints.load())
        try:
            with training_progress(progress, loop.now.step, total) as reporter:
                loop.run(reporter)
        finally:
            history = loop.history
            history.params, history.state = stepper.tree(loop.now.trained), loop.now.state
            publish(history.params)
    return history


def _as_trainable(model: Any) -> Trainable:
    if isinstance(model, Trainable):
        return model
    name = backend_of_type(type(model))
    as_trainable = None if name is None else getattr(load_backend(name), "as_trainable", None)
    if as_trainable is None:
        message = (
            f"model is a {type(model).__name__}; give a tree of arrays, an object with params and with_params, or a "
            "torch.nn.Module"
        )
        raise ConfigError(message)
    return as_trainable(model)


# Gradients free all that a step's loss has made, and the next step takes it again.
_HELD = (1 << 31) - 1
_above_zero = Rule(lambda value: number(0.0).allows(value) and value > 0, "a finite number above 0")
_optimizer = Rule(lambda value: isinstance(value, Optimizer), "one of peftarray, such as AdamW(1e-3)")
_several = Rule(lambda value: not isinstance(value, Mapping), "a list of batches, not a single one")
_callbacks = Rule(
    lambda value: isinstance(value, (list, tuple)) and all(map(callable, value)), "a list of functions of a Moment"
)
_integer = Rule(lambda value: type(value) is int, "a whole number")


def _as_schedule(schedule: Schedule | Callable[[int], float] | None) -> Schedule:
    """A function of the step as a schedule without a warm-up, or what is given."""
    if schedule is None or isinstance(schedule, Schedule):
        return schedule or constant()
    _check("schedule", Rule(callable, "a Schedule, such as cosine(warmup=10), or a function of the step"), schedule)
    name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return Schedule(name=name, needs_total=False, curve=lambda step, *_: float(schedule(step)))


def _check(names: str, rule: Rule, *values: object) -> None:
    for name, value in zip(names.split(), values, strict=True):
        if not rule.allows(value):
            words = repr(value)
            message = f"{name} of fit is {words[:77] + '...' if len(words) > 80 else words}; it must be {rule.words}"
            raise ConfigError(message)


def _check_workers(workers: int, accumulate: int, chosen: Chosen, backend: Backend) -> None:
    if workers > 1 and not backend.SIDE_BY_SIDE:
        name = backend_of(*chosen.arrays)
        message = f"workers of fit is {workers}, and {name} computes in parallel by itself; leave workers at 1"
        raise ConfigError(message)
    if workers > accumulate:
        message = (
            f"workers of fit is {workers}, and a step has {accumulate} to work on; give smaller batches, and "
            f"accumulate={workers}"
        )
        raise ConfigError(message)


def _total(batches: Source, steps: int | None, epochs: int | None, accumulate: int) -> int | None:
    """How many steps the training has in all, where that is known."""
    count = length(batches)
    if count == 0:
        message = "batches has none; give at least one"
        raise ConfigError(message)
    of_epochs = None if epochs is None or count is None else epochs * -(-count // accumulate)
    known = [number for number in (steps, of_epochs) if number is not None]
    return min(known) if known else None


def _setup(recipe: Recipe, chosen: Chosen) -> dict[str, Any]:
    """What must be the same for a training to go on from a checkpoint."""
    names = [chosen.names[place] for place in chosen.places]
    kinds = [[str(array.dtype).rpartition(".")[2], *array.shape] for array in chosen.arrays]
    return recipe.described() | {"arrays": dict(zip(names, kinds, strict=True))}
