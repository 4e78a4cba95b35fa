"""What every optimiser is: settings, and two pure functions on trees of arrays.

    state = optimizer.init(params)
    params, state = optimizer.step(params, gradients, state)

Nothing is written into an array that was given. Moments are float32 at least, whatever the parameters' dtype; a step is
computed there and rounded once. Under `jax.jit` the step's number is traced, so no formula compares it by `if`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from peftarray import patterns, trees
from peftarray.arrays import Array, namespace, stop_gradient, wide
from peftarray.errors import ConfigError, nearest
from peftarray.settings import Rule, check_settings, number, setting

__all__ = ["ArrayOptimizer", "At", "Group", "Optimizer", "Slots", "State", "lora_plus", "share", "unbiased"]

State = dict[str, Any]
"""`{"step": steps done, "slots": {name: arrays of one parameter}}`; wrappers add what is theirs."""
Slots = Mapping[str, Array]

share = Rule(lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1")
"""What the past keeps of an average at each step."""


@dataclass(frozen=True)
class Group:
    """Arrays with a rate or a weight decay of their own.

    Attributes:
        pattern: a regular expression that the end of an array's name must match, from its start or a dot on: `"bias"`,
            `"lora_A|lora_B"`, `r"layers\\.[0-3]\\..*"`.
        rate: the rate is multiplied by it.
        decay: the weight decay is multiplied by it; 0 for none.
    """

    pattern: str
    _: KW_ONLY
    rate: float = setting(1.0, number(0.0))
    decay: float = setting(1.0, number(0.0))

    def __post_init__(self) -> None:
        check_settings(self)
        self.has("")  # a pattern that is none fails here

    def has(self, name: str) -> bool:
        """Whether an array of this name belongs to the group."""
        return patterns.fullmatch(rf"(?:.*\.)?(?:{self.pattern})", name, "Group.pattern")


def lora_plus(ratio: float) -> tuple[Group, ...]:
    """Groups for LoRA+: B learns `ratio` times as fast as A.

    Source: Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, section 4, arXiv:2402.12354.

    Example:
        >>> lora_plus(16.0)[0].rate
        16.0
    """
    # A torch module has the adapter's name behind.
    return (Group(r"lora_B(\..*)?", rate=ratio),)


class At(NamedTuple):
    """What an update depends on besides arrays.

    Attributes:
        step: its number, from 1 on; a whole number, or an array of one under `jax.jit`.
        rate: how far it goes.
        decay: the weight decay.
    """

    step: Any
    rate: Any
    decay: float


@runtime_checkable
class Optimizer(Protocol):
    """What a training loop asks of an optimiser."""

    compiles: ClassVar[bool]
    """Whether a step can be compiled: it takes no decision on the host."""

    def rate_at(self, step: Any) -> Any:
        """The rate of a step, which counts from 1, before schedule and groups."""

    def init(self, params: Any) -> State:
        """The state before the first step."""

    def step(self, params: Any, gradients: Any, state: State, *, factor: Any = 1.0) -> tuple[Any, State]:
        """The parameters and the state after one more step, the rate multiplied by `factor`."""


@dataclass(frozen=True, kw_only=True)
class ArrayOptimizer(ABC):
    """An optimiser that changes every array by itself.

    Attributes:
        weight_decay: how much of an array is taken off it at each step, times the rate.
        groups: what differs for some arrays; of several groups that match a name the first holds.
    """

    compiles: ClassVar[bool] = True

    weight_decay: float = setting(0.0, number(0.0))
    groups: Sequence[Group] = ()
    _found: dict[str, Group] = field(default_factory=dict, init=False, repr=False, compare=False)
    """name -> its group, remembered: compilers cannot trace a regular expression."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not all(isinstance(group, Group) for group in self.groups):
            message = f"{type(self).__name__}.groups is {self.groups!r}; it must be a list of Group"
            raise ConfigError(message)
        object.__setattr__(self, "groups", tuple(self.groups))

    @abstractmethod
    def rate_at(self, step: Any) -> Any:
        """The rate of a step, which counts from 1, before schedule and groups."""

    @abstractmethod
    def start(self, array: Array) -> dict[str, Array]:
        """What is kept of an array of this shape, before the first step."""

    @abstractmethod
    def update(self, p: Array, g: Array, kept: Slots, at: At) -> tuple[Array, dict[str, Array]]:
        """An array after a step, and what is kept of it. All are float32 at least; none may be written into."""

    def init(self, params: Any) -> State:
        """The state before the first step.

        Raises:
            ConfigError: a group matches no array.
        """
        names = [name for name, _ in trees.named(params)]
        for group in self.groups:
            if not any(map(group.has, names)):
                message = f"no array matches Group.pattern {group.pattern!r}{nearest(group.pattern, names)}"
                raise ConfigError(message)
        for name in names:
            self._group_of(name)
        slots = {name: self.start(_widened(array)) for name, array in trees.named(params) if _is_trained(array)}
        return {"step": 0, "slots": slots}

    def step(self, params: Any, gradients: Any, state: State, *, factor: Any = 1.0) -> tuple[Any, State]:
        """The parameters and the state after one more step.

        Args:
            params: a tree of arrays.
            gradients: of the same form. An array whose gradient is None stays.
            state: from `init` or the step before.
            factor: the rate is multiplied by it; schedules give it.

        Raises:
            ConfigError: the trees have other names than each other, or than the state.
        """
        pairs, found = list(trees.named(params)), dict(trees.named(gradients))
        _check_names([name for name, _ in pairs], found, state["slots"])
        number = state["step"] + 1
        rate = self.rate_at(number) * factor
        new, slots = [], dict(state["slots"])
        for name, array in pairs:
            gradient = found[name]
            if gradient is None:
                new.append(array)
                continue
            group = self._group_of(name)
            at = At(number, rate * group.rate, self.weight_decay * group.decay)
            # A tensor that asks for gradients would record the step.
            value, kept = self.update(_widened(stop_gradient(array)), _widened(gradient), slots[name], at)
            new.append(_like(array, value))
            slots[name] = {slot: _like(slots[name][slot], other) for slot, other in kept.items()}
        return trees.refill(params, new), {"step": number, "slots": slots}

    def _group_of(self, name: str) -> Group:
        if not self.groups:
            return _EVERYTHING
        if name not in self._found:
            self._found[name] = next((group for group in self.groups if group.has(name)), _EVERYTHING)
        return self._found[name]


_EVERYTHING = Group(".*")


def _is_trained(array: Array) -> bool:
    return array is not None and bool(namespace(array).isdtype(array.dtype, "real floating"))


def _widened(array: Array) -> Array:
    dtype = wide(array).dtype
    return array if array.dtype == dtype else namespace(array).astype(array, dtype)


def _like(array: Array, value: Any) -> Array:
    """`value` in the dtype of `array`. NumPy makes scalars of arrays without axes; here they stay arrays."""
    if value.dtype == array.dtype and array.shape:
        return value
    return namespace(array).asarray(value, dtype=array.dtype)


def _check_names(names: list[str], gradients: Mapping[str, Any], slots: Mapping[str, Any]) -> None:
    if gradients.keys() != set(names):
        other = sorted(gradients.keys() ^ set(names))
        message = f"params and gradients have different names: {', '.join(other[:5])}; give trees of the same form"
        raise ConfigError(message)
    lacking = [name for name, gradient in gradients.items() if gradient is not None and name not in slots]
    if lacking:
        message = f"the state has nothing of {', '.join(lacking[:5])}; make it by init(params) of these parameters"
        raise ConfigError(message)


def unbiased(beta: float, step: Any) -> Any:
    """`1 - beta ** step`: the weight of all terms in a moving average that began at zero.

    By `expm1`, which keeps its digits in float32 too, where a compiled step computes it.
    """
    if beta == 0:
        return 1.0
    exponent = step * math.log(beta)
    return -(math.expm1(exponent) if isinstance(step, int) else namespace(exponent).expm1(exponent))
