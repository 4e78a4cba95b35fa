"""Conveniences over the protocol: what follows for methods of a kind. Nobody asks a method for its kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from peftarray.arrays import Array, Params, add_matmul, add_matmul_into, thin_product
from peftarray.layers import Layer, contract, through
from peftarray.method import AdapterConfig
from peftarray.routes import Weight

__all__ = ["Additive", "LowRank", "Transform"]


class LowRank(AdapterConfig):
    """A method whose update is a product of two thin matrices: define `params` and `factors`."""

    prepared: ClassVar[Mapping[str, str]] = {"up": "out r", "down": "r in"}

    @property
    def tiles(self) -> str:
        return "out in"

    @abstractmethod
    def factors(self, p: Params, layer: Layer) -> tuple[Array, Array]:
        """`up (out, r)` and `down (r, fan_in)`: the update is `up @ down`, scale included."""

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        up, down = self.factors(p, layer)
        return {"up": up, "down": down}

    def needs_base(self) -> bool:
        return False

    def product(self, p: Params, layer: Layer) -> tuple[Array, Array] | None:
        return self.factors(p, layer)

    def update(self, p: Params, w: Array | None, layer: Layer) -> Array:
        return thin_product(p["up"], p["down"])

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        return add_matmul(w, p["up"], p["down"])

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        add_matmul_into(w, p["up"], p["down"])

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        return w - self.update(p, w, layer)

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        return contract(x, w, layer) + through(x, p["down"], p["up"], layer)

    def apply_update(self, p: Params, x: Array, w: Array | None, layer: Layer) -> Array:
        return through(x, p["down"], p["up"], layer)

    def adds_apart(self) -> bool:
        return True


class Additive(AdapterConfig):
    """A method whose update does not depend on the base: define `params` and `delta`."""

    whole: ClassVar[bool] = False
    """The update is made once and whole, and cut like an array of axes `out in`."""

    @abstractmethod
    def delta(self, p: Params, layer: Layer) -> Array:
        """The update `(out, fan_in)`, from prepared (and cut) parameters."""

    @property
    def tiles(self) -> str:
        return "out in"

    def axes(self, layer: Layer) -> dict[str, str]:
        return super().axes(layer) | ({"delta": "out in"} if self.whole else {})

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        return {"delta": self.delta(p, layer)} if self.whole else dict(p)

    def needs_base(self) -> bool:
        return False

    def update(self, p: Params, w: Array | None, layer: Layer) -> Array:
        return p["delta"] if self.whole else self.delta(p, layer)

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        return w + self.update(p, w, layer)

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        w += self.update(p, w, layer)

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        return w - self.update(p, w, layer)

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        if isinstance(w, Weight) and w.is_packed:
            return contract(x, w, layer) + contract(x, self.update(p, None, layer), layer)
        return contract(x, self.weight(p, w, layer), layer)


class Transform(AdapterConfig):
    """Any other map of the weight: define `params`, `tiles`, `weight`, and `inverse` where one exists."""

    def update(self, p: Params, w: Array, layer: Layer) -> Array:
        return self.weight(p, w, layer) - w

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        return contract(x, self.weight(p, w, layer), layer)
