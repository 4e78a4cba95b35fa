"""AdamW, SGD, Lion and Adafactor: each says what it keeps of an array and how a step changes it.

Arrays that a line has just made are changed in place by the lines after it, which spares temporaries in NumPy; where a
library has no such thing, the operator makes a new array.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from peftarray.arrays import Array, namespace
from peftarray.errors import ConfigError
from peftarray.settings import Rule, boolean, number, optional, setting
from peftarray.training.optimizer import ArrayOptimizer, At, Slots, share, unbiased

__all__ = ["SGD", "Adafactor", "AdamW", "Lion"]

_shares = Rule(
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(map(share.allows, value)),
    "two numbers from 0 to below 1",
)
_sizes = Rule(
    lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(map(number(0.0).allows, value)),
    "two numbers of at least 0",
)


@dataclass(frozen=True)
class AdamW(ArrayOptimizer):
    """Adam with weight decay beside the gradient.

        m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2
        p' = (1 - lr decay) p - lr (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)

    Attributes:
        lr: the rate.
        betas: b1 and b2.
        eps: keeps small gradients from large steps.
        weight_decay: the decay.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2, arXiv:1711.05101.

    Example:
        >>> import numpy as np
        >>> optimizer, params = AdamW(0.1, weight_decay=0.0), {"w": np.asarray([1.0, 2.0])}
        >>> params, state = optimizer.step(params, {"w": np.asarray([3.0, -3.0])}, optimizer.init(params))
        >>> params["w"].round(6).tolist(), state["step"]
        ([0.9, 2.1], 1)
    """

    lr: float = setting(1e-3, number(0.0))
    _: KW_ONLY
    betas: tuple[float, float] = setting((0.9, 0.999), _shares)
    eps: float = setting(1e-8, number(0.0))
    weight_decay: float = setting(0.01, number(0.0))

    def rate_at(self, step: Any) -> float:
        return self.lr

    def start(self, array: Array) -> dict[str, Array]:
        xp = namespace(array)
        return {"first": xp.zeros_like(array), "second": xp.zeros_like(array)}

    def update(self, p: Array, g: Array, kept: Slots, at: At) -> tuple[Array, dict[str, Array]]:
        first = _averaged(kept["first"], g, self.betas[0])
        second = _averaged(kept["second"], g * g, self.betas[1])
        # Both corrections go into numbers: a pass over the array is spared.
        root = unbiased(self.betas[1], at.step) ** 0.5
        change = namespace(p).sqrt(second)
        change += self.eps * root
        change = first / change
        change *= at.rate * root / unbiased(self.betas[0], at.step)
        return _decayed(p, at) - change, {"first": first, "second": second}


@dataclass(frozen=True)
class SGD(ArrayOptimizer):
    """Gradient descent, with momentum where it is asked for; the decay is part of the gradient.

        g' = g + decay p,   m' = momentum m + g'
        p' = p - lr m',   with Nesterov's momentum   p - lr (g' + momentum m')

    Attributes:
        lr: the rate.
        momentum: what the past keeps of the direction.
        nesterov: look ahead by one step.
        weight_decay: the decay.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, 2013, section 2.

    Example:
        >>> import numpy as np
        >>> optimizer, params = SGD(0.5, momentum=0.9), {"w": np.asarray([1.0])}
        >>> optimizer.step(params, {"w": np.asarray([1.0])}, optimizer.init(params))[0]
        {'w': array([0.5])}
    """

    lr: float = setting(1e-3, number(0.0))
    _: KW_ONLY
    momentum: float = setting(0.0, share)
    nesterov: bool = setting(False, boolean)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            message = "SGD.nesterov is True and momentum is 0; give a momentum above 0, or leave nesterov out"
            raise ConfigError(message)

    def rate_at(self, step: Any) -> float:
        return self.lr

    def start(self, array: Array) -> dict[str, Array]:
        return {"momentum": namespace(array).zeros_like(array)} if self.momentum else {}

    def update(self, p: Array, g: Array, kept: Slots, at: At) -> tuple[Array, dict[str, Array]]:
        if at.decay:
            g = g + at.decay * p
        if not self.momentum:
            return p - at.rate * g, {}
        momentum = self.momentum * kept["momentum"]
        momentum += g
        change = self.momentum * momentum + g if self.nesterov else momentum
        return p - at.rate * change, {"momentum": momentum}


@dataclass(frozen=True)
class Lion(ArrayOptimizer):
    """The sign of a moving average: every entry moves by the rate.

        p' = (1 - lr decay) p - lr sign(b1 m + (1 - b1) g),   m' = b2 m + (1 - b2) g

    Attributes:
        lr: the rate; 3 to 10 times smaller than AdamW's, with a weight decay larger by as much.
        betas: b1 and b2.
        weight_decay: the decay.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, algorithm 2, arXiv:2302.06675.

    Example:
        >>> import numpy as np
        >>> optimizer, params = Lion(0.1), {"w": np.asarray([1.0, 2.0])}
        >>> optimizer.step(params, {"w": np.asarray([3.0, -0.1])}, optimizer.init(params))[0]
        {'w': array([0.9, 2.1])}
    """

    lr: float = setting(1e-4, number(0.0))
    _: KW_ONLY
    betas: tuple[float, float] = setting((0.9, 0.99), _shares)

    def rate_at(self, step: Any) -> float:
        return self.lr

    def start(self, array: Array) -> dict[str, Array]:
        return {"first": namespace(array).zeros_like(array)}

    def update(self, p: Array, g: Array, kept: Slots, at: At) -> tuple[Array, dict[str, Array]]:
        direction = namespace(p).sign(_averaged(kept["first"], g, self.betas[0]))
        direction *= at.rate
        return _decayed(p, at) - direction, {"first": _averaged(kept["first"], g, self.betas[1])}


@dataclass(frozen=True)
class Adafactor(ArrayOptimizer):
    """Adam whose second moment of a matrix is kept as one number a row and one a column.

        b = 1 - t^decay_rate,   R' = b R + (1 - b) mean_columns(g^2 + eps1),   C' likewise of the rows
        u = g / sqrt(R' C' / mean(R')),   u = u / max(1, rms(u) / clip_threshold)
        p' = (1 - rate decay) p - rate u,   rate = max(eps2, rms(p)) lr

    Attributes:
        lr: the rate; None for `min(0.01, 1 / sqrt(t))`, where t is the step.
        eps: eps1 and eps2.
        clip_threshold: the largest root mean square of an update.
        decay_rate: how the averages grow longer.
        beta1: what the past keeps of the update; None keeps no first moment.
        scale_parameter: multiply the rate by the size of the array.
        warmup_init: with `lr` None, begin with `1e-6 t`.
        weight_decay: the decay.

    Source: Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018, algorithms 4 and 5,
    arXiv:1804.04235.

    Example:
        >>> import numpy as np
        >>> state = Adafactor().init({"w": np.zeros((300, 200))})
        >>> {name: array.shape for name, array in state["slots"]["w"].items()}
        {'row': (300,), 'column': (200,)}
    """

    lr: float | None = setting(None, optional(number(0.0)))
    _: KW_ONLY
    eps: tuple[float, float] = setting((1e-30, 1e-3), _sizes)
    clip_threshold: float = setting(1.0, Rule(lambda value: number(0.0).allows(value) and value > 0, "above 0"))
    decay_rate: float = setting(-0.8, Rule(lambda value: number().allows(value) and value < 0, "below 0"))
    beta1: float | None = setting(None, optional(share))
    scale_parameter: bool = setting(True, boolean)
    warmup_init: bool = setting(False, boolean)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_init and self.lr is not None:
            message = f"Adafactor.warmup_init is True and lr is {self.lr}; it warms up the rate that lr=None makes"
            raise ConfigError(message)

    def rate_at(self, step: Any) -> Any:
        if self.lr is not None:
            return self.lr
        return _smaller(1e-6 * step if self.warmup_init else 1e-2, step**-0.5)

    def start(self, array: Array) -> dict[str, Array]:
        xp = namespace(array)
        first = {} if self.beta1 is None else {"first": xp.zeros_like(array)}
        if array.ndim < 2:
            return first | {"second": xp.zeros_like(array)}
        return first | {"row": xp.zeros_like(array[..., 0]), "column": xp.zeros_like(array[..., 0, :])}

    def update(self, p: Array, g: Array, kept: Slots, at: At) -> tuple[Array, dict[str, Array]]:
        xp = namespace(p)
        beta = 1 - at.step**self.decay_rate
        square = g * g
        square += self.eps[0]
        if "row" in kept:
            row = _averaged(kept["row"], xp.mean(square, axis=-1), beta)
            column = _averaged(kept["column"], xp.mean(square, axis=-2), beta)
            new = {"row": row, "column": column}
            relative = xp.sqrt(row / xp.mean(row, axis=-1, keepdims=True))
            change = g / relative[..., None]
            change /= xp.sqrt(column)[..., None, :]
        else:
            new = {"second": _averaged(kept["second"], square, beta)}
            change = g / xp.sqrt(new["second"])
        rate = at.rate * xp.clip(_rms(xp, p), min=self.eps[1]) if self.scale_parameter else at.rate
        change *= rate / xp.clip(_rms(xp, change) / self.clip_threshold, min=1.0)
        if self.beta1 is not None:
            change = new["first"] = _averaged(kept["first"], change, self.beta1)
        return (p * (1 - at.decay * rate) if at.decay else p) - change, new


def _averaged(old: Array, new: Array, beta: Any) -> Array:
    """`beta old + (1 - beta) new`."""
    average = old * beta
    average += new * (1 - beta)
    return average


def _decayed(p: Array, at: At) -> Array:
    return p * (1 - at.rate * at.decay) if at.decay else p


def _rms(xp: Any, x: Array) -> Array:
    return xp.linalg.vector_norm(x) * math.prod(x.shape) ** -0.5


def _smaller(a: Any, b: Any) -> Any:
    """The smaller of two numbers, of which the second may be traced."""
    return min(a, b) if isinstance(b, float) else namespace(b).minimum(a, b)
