"""IA3: W' = diag(l) W, or W' = W diag(l) on feedforward layers: one trained gain for each output, or each input.

Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022,
section 3.3, arXiv:2205.05638.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from peftarray import patterns, random
from peftarray.arrays import Array, Params, namespace
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.layers import Kind, Layer, contract, scale_outputs
from peftarray.method import Param
from peftarray.method_kinds import Transform
from peftarray.settings import boolean, names, setting

__all__ = ["IA3Config"]

_ANY = ".*"


@dataclass(frozen=True, kw_only=True)
class IA3Config(Transform):
    """A gain for each output, `W' = diag(l) W` and `b' = l b`; for each input on feedforward layers, `W' = W diag(l)`.

    Shapes: `ia3_l (out, 1)`, or `(1, in)` on feedforward layers; convolutions store `(1, channels, 1, ...)`, and of
    grouped ones every input channel has its gain. The initial state is the identity unless `init_ia3_weights=False`.

    Attributes:
        feedforward_modules: which of the targets are feedforward: a pattern of whole names, or a list of their ends,
            which need not begin at a dot (`"fc"` is the end of `"layer.xfc"` too). None is for none.
        fan_in_fan_out: the weight is stored `(in, out)`, where the architecture does not say.
        init_ia3_weights: start from ones; from the normal distribution otherwise.

    Example:
        >>> import numpy as np
        >>> IA3Config().init(np.ones((2, 3))).params["ia3_l"].shape
        (2, 1)
        >>> IA3Config(feedforward_modules=["fc"]).init(np.ones((2, 3)), name="layer.0.fc").params["ia3_l"].shape
        (1, 3)
    """

    peft_type: ClassVar[str] = "IA3"
    prepared: ClassVar[Mapping[str, str]] = {"rows": "out one", "columns": "one in", "entries": "out in"}
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    feedforward_modules: str | list[str] | tuple[str, ...] | None = setting(None, names)
    fan_in_fan_out: bool = setting(False, boolean)
    init_ia3_weights: bool = setting(True, boolean)

    def __post_init__(self) -> None:
        super().__post_init__()
        fed, targets = self.feedforward_modules, self.target_modules
        if fed is None or targets is None or isinstance(fed, str) or isinstance(targets, str):
            return
        others = sorted(set(fed) - set(targets))
        if others:
            message = f"IA3Config.feedforward_modules names {others[0]!r}, which target_modules lacks; add it there"
            raise ConfigError(message)

    @property
    def tiles(self) -> str:
        return "out in"

    @property
    def starts_as_identity(self) -> bool:
        return self.init_ia3_weights

    def resolved(self, name: str) -> dict[str, Any]:
        return super().resolved(name) | {"feedforward_modules": _ANY if self._feeds(name) else None}

    def params(self, layer: Layer) -> dict[str, Param]:
        init = random.full(1.0) if self.init_ia3_weights else random.normal
        feeds = self._feeds(layer.name)
        if not layer.kernel:
            row = Param("one in", (1, layer.fan_in), init)
            return {"ia3_l": row if feeds else Param("out one", (layer.out, 1), init)}
        channels = layer.shape[1] * layer.window.groups if feeds else layer.out
        kernel = "".join(f" k{i}" for i in range(len(layer.kernel)))
        shape = (1, channels, *(1 for _ in layer.kernel))
        return {"ia3_l": Param(f"one {'cin' if feeds else 'out'}{kernel}", shape, init)}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], layer: Layer) -> None:
        # A checkpoint does not say how its convolutions are grouped; the number of gains tells.
        grouped = layer.kernel and self._feeds(layer.name) and len(shapes.get("ia3_l", ())) > 1
        super().check_shapes(shapes, _grouped(layer, shapes["ia3_l"][1]) if grouped else layer)

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        made = dict(p)
        if not layer.kernel:
            return made
        gain = p["ia3_l"]
        xp = namespace(gain)
        if not self._feeds(layer.name):
            return made | {"rows": xp.reshape(gain, (-1, 1))}
        groups = gain.shape[1] // layer.shape[1]
        columns = xp.repeat(xp.reshape(gain, (groups, -1)), math.prod(layer.kernel), axis=1)
        if groups == 1:
            return made | {"columns": columns}
        return made | {"entries": xp.repeat(columns, layer.out // groups, axis=0)}

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        return w * _gain(p)

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        w *= _gain(p)

    def update(self, p: Params, w: Array, layer: Layer) -> Array:
        return w * (_gain(p) - 1)

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        gain = _gain(p)
        if bool(namespace(gain).any(gain == 0)):
            message = f"{layer.name}: a gain of IA3 is 0, so it cannot be unmerged; keep a copy of the base weight"
            raise UnsupportedError(message)
        return w / gain

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        return self._scaled(p["ia3_l"], x, w, layer)

    def apply_update(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        return self._scaled(p["ia3_l"] - 1, x, w, layer)

    def touches(self, layer: Layer) -> tuple[str, ...]:
        return ("weight", "bias") if layer.bias and not self._feeds(layer.name) else ("weight",)

    def effective_bias(self, p: Params, b: Array, w: Array | None, layer: Layer) -> Array:
        gain = p["ia3_l"]
        return b if self._feeds(layer.name) else b * namespace(gain).reshape(gain, (-1,))

    def stored_in_out(self) -> bool:
        return self.fan_in_fan_out

    def _scaled(self, gain: Array, x: Array, w: Array, layer: Layer) -> Array:
        """The base's output, scaled itself or from scaled inputs: no gradient of the whole weight is made."""
        if self._feeds(layer.name):
            return contract(x * (gain if layer.kernel else gain[0, :]), w, layer)
        return scale_outputs(contract(x, w, layer), namespace(gain).reshape(gain, (-1,)), layer)

    def _feeds(self, name: str) -> bool:
        """Whether the module called `name` is feedforward."""
        wanted = self.feedforward_modules
        if wanted is None or wanted == _ANY:
            return wanted == _ANY
        if isinstance(wanted, str):
            return patterns.fullmatch(wanted, name, "feedforward_modules")
        return any(name.endswith(end) for end in wanted)


def _gain(p: Params) -> Array:
    """What the matrix, or a tile of it, is multiplied by."""
    return next(p[name] for name in ("rows", "columns", "entries", "ia3_l") if name in p)


def _grouped(layer: Layer, channels: int) -> Layer:
    """The layer with as many groups as make up so many input channels, if any number does."""
    groups, rest = divmod(channels, layer.shape[1])
    if rest or not groups or layer.out % groups:
        return layer
    return replace(layer, window=replace(layer.window, groups=groups))
