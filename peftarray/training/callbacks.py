"""What looks on while a training runs, and may end it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftarray.errors import ConfigError
from peftarray.settings import number, whole
from peftarray.training.history import History

__all__ = ["Callback", "Moment", "early_stopping"]


@dataclass(frozen=True)
class Moment:
    """A training after a step.

    Attributes:
        step: steps done.
        epoch: the epoch of its last batch.
        params: the parameters, in the form that `fit` was given; a callback reads them.
        evaluated: whether this step ends with an evaluation, the last of `history.evaluations`.
        history: what was done up to here; it goes on growing.
    """

    step: int
    epoch: int
    params: Any
    evaluated: bool
    history: History


Callback = Callable[[Moment], str | None]
"""Called after every step. A reason ends the training. What it keeps of its own is not part of a checkpoint: a callback
that decides does so from the moment, whose history is."""


def early_stopping(*, patience: int = 3, min_delta: float = 0.0) -> Callback:
    """End a training when evaluations have not become better for a while.

    Args:
        patience: evaluations in a row that may pass without a better one.
        min_delta: how much below the best so far counts as better.
    """
    for name, value, rule in (("patience", patience, whole(1)), ("min_delta", min_delta, number(0.0))):
        if not rule.allows(value):
            message = f"{name} of early_stopping is {value!r}; it must be {rule.words}"
            raise ConfigError(message)

    def judge(moment: Moment) -> str | None:
        if not moment.evaluated:
            return None
        best, since = float("inf"), 0
        for _, loss in moment.history.evaluations:
            best, since = (loss, 0) if loss < best - min_delta else (best, since + 1)
        return f"no better evaluation than {best:.6g} in {since}" if since >= patience else None

    return judge
