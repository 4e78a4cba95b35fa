"""Schedules: what the rate is multiplied by at each step, as pure functions of the step, which counts from 0.

Every schedule rises in a line over its warm-up and then follows its curve. The number of steps may be left to the
training loop, which knows it.

    >>> [round(linear(total=4, warmup=2)(step), 2) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from peftarray.errors import ConfigError
from peftarray.settings import Rule, boolean, check_settings, number, one_of, optional, setting, whole

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "polynomial",
]

_warmup = Rule(
    lambda value: whole(0).allows(value) or (type(value) is float and 0 <= value < 1),
    "a whole number of steps, or a share of all steps below 1",
)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A curve after a warm-up.

    Attributes:
        name: of the curve, with its settings.
        warmup: steps of the warm-up, or their share of all.
        total: steps of the whole training; None leaves it to the loop.
        needs_total: whether the curve depends on it.
        curve: (step, steps of the warm-up, total) -> the factor, from the end of the warm-up on.
    """

    name: str
    warmup: int | float = setting(0, _warmup)
    total: int | None = setting(None, optional(whole(1)))
    needs_total: bool = setting(True, boolean)
    curve: Callable[[int, int, int], float] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if type(self.warmup) is int and self.total is not None and self.warmup > self.total:
            message = f"{self.name}: warmup is {self.warmup}; of {self.total} steps in all, at most so many can be it"
            raise ConfigError(message)

    def __call__(self, step: int) -> float:
        """The factor at a step.

        Raises:
            ConfigError: the number of steps is needed and not known.
        """
        total = self.total
        if total is None:
            if self._depends_on_total:
                message = f"{self.name} depends on the number of steps, and total is None; give total"
                raise ConfigError(message)
            total = 0
        warmup = math.ceil(self.warmup * total) if type(self.warmup) is float else int(self.warmup)
        return step / warmup if step < warmup else self.curve(step, warmup, total)

    def described(self) -> str:
        """Everything that its factors follow from, as text."""
        total = f", total {self.total}" if self._depends_on_total else ""
        return f"{self.name}, warmup {self.warmup}{total}"

    def over(self, total: int | None) -> Schedule:
        """The same, for so many steps where it has no number of its own."""
        fixed = not self._depends_on_total or self.total is not None or total is None
        return self if fixed else replace(self, total=total)

    @property
    def _depends_on_total(self) -> bool:
        return self.needs_total or type(self.warmup) is float


def constant(*, warmup: int | float = 0, total: int | None = None) -> Schedule:
    """1."""
    return Schedule(name="constant", warmup=warmup, total=total, needs_total=False, curve=lambda *_: 1.0)


def linear(*, warmup: int | float = 0, total: int | None = None) -> Schedule:
    """A line down to 0."""
    return Schedule(name="linear", warmup=warmup, total=total, curve=lambda *at: max(0.0, 1 - _progress(*at)))


def cosine(*, warmup: int | float = 0, total: int | None = None, cycles: float = 0.5, floor: float = 0.0) -> Schedule:
    """`(1 + cos(2 pi cycles x)) / 2` over the progress x from 0 to 1: with half a cycle, down to `floor`.

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5,
    arXiv:1608.03983.
    """
    _check(number(0.0), cycles=cycles, floor=floor)

    def curve(step: int, warmup: int, total: int) -> float:
        wave = 0.5 * (1 + math.cos(2 * math.pi * cycles * _progress(step, warmup, total)))
        return floor + (1 - floor) * max(0.0, wave)

    return Schedule(name=f"cosine(cycles={cycles}, floor={floor})", warmup=warmup, total=total, curve=curve)


def cosine_with_restarts(*, warmup: int | float = 0, total: int | None = None, cycles: int = 1) -> Schedule:
    """Half a wave from 1 to 0, `cycles` times over, with a jump back to 1 between."""
    _check(whole(1), cycles=cycles)

    def curve(step: int, warmup: int, total: int) -> float:
        progress = _progress(step, warmup, total)
        return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))

    return Schedule(name=f"cosine_with_restarts(cycles={cycles})", warmup=warmup, total=total, curve=curve)


def polynomial(
    *, warmup: int | float = 0, total: int | None = None, power: float = 1.0, floor: float = 0.0
) -> Schedule:
    """`floor + (1 - floor) (1 - x)^power` over the progress x from 0 to 1."""
    _check(number(0.0), power=power, floor=floor)

    def curve(step: int, warmup: int, total: int) -> float:
        left = 1 - _progress(step, warmup, total)
        return floor + (1 - floor) * left**power if left > 0 else floor

    return Schedule(name=f"polynomial(power={power}, floor={floor})", warmup=warmup, total=total, curve=curve)


def inverse_sqrt(*, warmup: int | float = 0, total: int | None = None, timescale: int | None = None) -> Schedule:
    """`1 / sqrt(step / timescale)`, moved so that it is 1 at the end of the warm-up.

    Args:
        warmup: steps of the warm-up, or their share of all.
        total: steps in all; needed for a share alone.
        timescale: the length of the warm-up if None, or 10000 without one.

    Source: Vaswani et al., Attention Is All You Need, 2017, section 5.3, arXiv:1706.03762.
    """
    _check(optional(whole(1)), timescale=timescale)

    def curve(step: int, warmup: int, total: int) -> float:
        scale = timescale or warmup or 10_000
        return ((step - warmup + scale) / scale) ** -0.5

    name = f"inverse_sqrt(timescale={timescale})"
    return Schedule(name=name, warmup=warmup, total=total, needs_total=False, curve=curve)


def one_cycle(
    *,
    warmup: int | float = 0.3,
    total: int | None = None,
    start: float = 1 / 25,
    end: float = 1 / 250_000,
    anneal: str = "cosine",
) -> Schedule:
    """Up from `start` to 1 over the warm-up, and down to `end` over the rest.

    Args:
        warmup: steps of the rise, or their share of all.
        total: steps in all.
        start, end: factors of the first and the last step.
        anneal: `"cosine"` or `"linear"`, the form of both.

    Source: Smith and Topin, Super-Convergence, 2018, section 3, arXiv:1708.07120.
    """
    _check(number(0.0), start=start, end=end)
    _check(_warmup, warmup=warmup)
    _check(one_of("cosine", "linear"), anneal=anneal)

    def curve(step: int, _: int, total: int) -> float:
        # A share ends between two steps; the peak lies there.
        peak = (warmup * total if type(warmup) is float else warmup) - 1
        rises = step < peak
        first, last = (start, 1.0) if rises else (1.0, end)
        share = step / peak if rises else min(1.0, (step - peak) / max(1e-9, total - 1 - peak))
        return first + (last - first) * (share if anneal == "linear" else 0.5 * (1 - math.cos(math.pi * share)))

    name = f"one_cycle(warmup={warmup}, start={start}, end={end}, anneal={anneal!r})"
    return Schedule(name=name, total=total, curve=curve)


def _progress(step: int, warmup: int, total: int) -> float:
    """0 at the end of the warm-up, 1 at the last step; it goes on growing after that."""
    return (step - warmup) / max(1, total - warmup)


def _check(rule: Rule, **values: object) -> None:
    for name, value in values.items():
        if not rule.allows(value):
            message = f"{name} of a schedule is {value!r}; it must be {rule.words}"
            raise ConfigError(message)
