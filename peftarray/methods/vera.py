"""VeRA: W' = W + diag(b) B diag(d) A, where A and B are random, frozen and the same for every layer.

Source: Kopiczko, Blankevoort and Asano, VeRA: Vector-based Random Matrix Adaptation, 2024, section 3, arXiv:2310.11454.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from peftarray import random
from peftarray.arrays import Array, Params, add_matmul, add_matmul_into, constant, thin_product, wide
from peftarray.dtypes import rounded
from peftarray.layers import Layer, Peers
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import LowRank
from peftarray.random import TorchStream
from peftarray.settings import Rule, boolean, number, one_of, setting, whole

__all__ = ["VeraConfig"]

_PROJECTIONS = ("vera_A", "vera_B")
_key = Rule(lambda value: type(value) is int and -(2**63) <= value < 2**64, "a whole number of 64 bits")


@dataclass(frozen=True, kw_only=True)
class VeraConfig(LowRank):
    """Scaling vectors around random matrices that all layers share: `W' = W + diag(b) B[:out] diag(d) A[:, :in]`.

    Shapes: `vera_lambda_b` is `b (out,)`, `vera_lambda_d` is `d (r,)`; `vera_A (r, widest)` and `vera_B (tallest, r)`
    have the size of the largest layer that is adapted, and every layer takes their first rows and columns. They follow
    from `projection_prng_key`: A, then B, as torch's CPU generator draws them, rounded to the dtypes of the adapted
    weights (PEFT does so to those of the model that it has loaded). The initial state is the identity, since `b = 0`,
    unless `init_weights=False`.

    Attributes:
        r: rows of `vera_A`.
        projection_prng_key: the seed of both matrices.
        save_projection: whether a file holds them; what it holds counts.
        vera_dropout: share of the update's inputs that training leaves out.
        d_initial: the first value of `d`.
        fan_in_fan_out: the weight is stored `(in, out)`, where the architecture does not say.
        bias: which biases of the model an adapter's file replaces: `"none"`, `"all"` or `"vera_only"`.
        init_weights: start as the identity; from `b = 1` and a normal `d` otherwise.

    Example:
        >>> import numpy as np
        >>> adapter = VeraConfig(r=4).init(np.ones((6, 3), np.float32))
        >>> adapter.num_parameters(), adapter.params["vera_A"].shape
        (10, (4, 3))
    """

    peft_type: ClassVar[str] = "VERA"
    reads_peers: ClassVar[bool] = True
    prepared: ClassVar[Mapping[str, str]] = {"B": "out r", "A": "r in", "b": "out", "d": "r"}

    r: int = setting(256, whole(1))
    projection_prng_key: int = setting(0, _key)
    save_projection: bool = setting(True, boolean)
    vera_dropout: float = setting(0.0, number(0.0, 1.0))
    d_initial: float = setting(0.1, number())
    fan_in_fan_out: bool = setting(False, boolean)
    bias: str = setting("none", one_of("none", "all", "vera_only"))
    init_weights: bool = setting(True, boolean)

    @property
    def starts_as_identity(self) -> bool:
        return self.init_weights

    def params(self, layer: Layer) -> dict[str, Param]:
        tallest, widest = (layer.peers or Peers((layer,))).largest
        b, d = (random.zeros, random.full(self.d_initial)) if self.init_weights else (random.full(1.0), random.normal)
        stored = self.save_projection
        return {
            "vera_lambda_b": Param("out", (layer.out,), b),
            "vera_lambda_d": Param("r", (self.r,), d),
            "vera_A": Param("r widest", (self.r, widest), frozen=True, shared="vera_A", stored=stored),
            "vera_B": Param("tallest r", (tallest, self.r), frozen=True, shared="vera_B", stored=stored),
        }

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], layer: Layer) -> None:
        # Both may be larger than any of these layers needs: made for another, which is not here.
        table = self.params(layer)
        fitting = dict(shapes)
        for name, axis in zip(_PROJECTIONS, (1, 0), strict=True):
            shape, wanted = list(shapes.get(name, ())), table[name].shape[axis] or 0
            if len(shape) == 2:
                shape[axis] = min(shape[axis], wanted)
                fitting[name] = tuple(shape)
        super().check_shapes(fitting, layer)

    def derive(self, layer: Layer, p: Params, w: Array) -> dict[str, Array]:
        if all(name in p for name in _PROJECTIONS):
            return {}
        tallest, widest = (layer.peers or Peers((layer,))).largest
        stream = TorchStream(self.projection_prng_key)
        made = {}
        for name, shape in zip(_PROJECTIONS, ((self.r, widest), (tallest, self.r)), strict=True):
            values = stream.kaiming_uniform(shape)
            for dtype in dict.fromkeys(peer.dtype for peer in layer.peers or (layer,)):
                values = rounded(values, dtype) if dtype else values
            made[name] = constant(values, wide(w))
        return {name: values for name, values in made.items() if name not in p}

    def factors(self, p: Params, layer: Layer) -> tuple[Array, Array]:
        B, A = p["vera_B"][: layer.out, :], p["vera_A"][:, : layer.fan_in]
        return p["vera_lambda_b"][:, None] * B, p["vera_lambda_d"][:, None] * A

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        # Parts of the shared matrices, not products with them: no layer has a copy.
        B, A = p["vera_B"][: layer.out, :], p["vera_A"][:, : layer.fan_in]
        return {"B": B, "A": A, "b": p["vera_lambda_b"], "d": p["vera_lambda_d"]}

    def update(self, p: Params, w: Array, layer: Layer) -> Array:
        return thin_product(p["b"][:, None] * p["B"] * p["d"], p["A"])

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        return add_matmul(w, p["b"][:, None] * p["B"] * p["d"], p["A"])

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        add_matmul_into(w, p["b"][:, None] * p["B"] * p["d"], p["A"])

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        return x @ w.mT + self.apply_update(p, x, w, layer)

    def apply_update(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        return (x @ p["A"].mT * p["d"]) @ p["B"].mT * p["b"]

    def dropout(self) -> Dropout:
        return Dropout(inputs=self.vera_dropout)

    def stored_in_out(self) -> bool:
        return self.fan_in_fan_out
