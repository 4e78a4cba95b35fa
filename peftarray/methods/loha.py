"""LoHa: W' = W + s (A1 B1) * (A2 B2), the elementwise product of two low-rank products, of rank up to r squared.

Sources: Hyeon-Woo et al., FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, 2021,
propositions 1 and 3, arXiv:2108.06098; Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to
Model Evaluation, 2023, section 3, arXiv:2309.14859.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from peftarray import random
from peftarray.arrays import (
    Array,
    Params,
    add_product,
    add_product_into,
    by_rows,
    namespace,
    row_parts,
    spaced,
    thin_product,
)
from peftarray.layers import Kind, Layer, contract, pays, through, tucker_factor
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import Additive
from peftarray.settings import boolean, mapping_of, number, optional, setting, whole

__all__ = ["LoHaConfig"]


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(Additive):
    """Low-rank Hadamard product: `W' = W + s (A1 B1) * (A2 B2)`, `s = alpha / r`.

    Shapes: `hada_w1_a` is `A1 (out, r)`, `hada_w1_b` is `B1 (r, fan_in)`, and so for the second product. With
    `use_effective_conv2d`, a convolution whose kernel is more than a point has each product in Tucker form, `sum_ij
    T[i, j, k] A[i, o] B[j, c]`, with a core `hada_t1 (r, r, *kernel)` (of one axis: `(r, r, kernel, 1)`),
    `hada_w1_a (r, out)` and `hada_w1_b (r, in / groups)`. The initial state is the identity (`hada_w2_b` is zero)
    unless `init_weights=False`.

    Attributes:
        r: the rank of each product.
        alpha: numerator of the scale.
        rank_dropout: share of the update's outputs that training leaves out, the others growing accordingly.
        module_dropout: probability that training leaves out the whole update.
        use_effective_conv2d: the Tucker form, for convolutions of any number of axes.
        init_weights: start as the identity.
        rank_pattern, alpha_pattern: pattern of module names -> its `r`, `alpha`.

    Example:
        >>> import numpy as np
        >>> LoHaConfig(r=2).init(np.ones((4, 3), np.float32)).num_parameters()  # 2 (4 r + 3 r)
        28
    """

    peft_type: ClassVar[str] = "LOHA"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    prepared: ClassVar[Mapping[str, str]] = {"up1": "out r", "down1": "r in", "up2": "out r", "down2": "r in"}
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    r: int = setting(8, whole(1))
    alpha: float = setting(8, number())
    rank_dropout: float = setting(0.0, number(0.0, 1.0))
    module_dropout: float = setting(0.0, number(0.0, 1.0))
    use_effective_conv2d: bool = setting(False, boolean)
    init_weights: bool = setting(True, boolean)
    rank_pattern: dict[str, int] | None = setting({}, optional(mapping_of(whole(1))))
    alpha_pattern: dict[str, float] | None = setting({}, optional(mapping_of(number())))

    @property
    def scale(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r

    @property
    def starts_as_identity(self) -> bool:
        return bool(self.init_weights)

    def params(self, layer: Layer) -> dict[str, Param]:
        last = random.zeros if self.init_weights else random.kaiming_uniform
        return self._product("1", layer, random.kaiming_uniform) | self._product("2", layer, last)

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        """The Tucker form is two factors like the others, once its core has taken the input's."""
        up1, down1 = self._factors("1", p, layer)
        up2, down2 = self._factors("2", p, layer)
        return {"up1": up1 * self.scale, "down1": down1, "up2": up2, "down2": down2}

    def delta(self, p: Params, layer: Layer) -> Array:
        return thin_product(p["up1"], p["down1"]) * thin_product(p["up2"], p["down2"])

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        def make(rows: slice) -> Array:
            first = thin_product(p["up1"][rows, ...], p["down1"])
            return add_product(w[rows, ...], first, thin_product(p["up2"][rows, ...], p["down2"]))

        return by_rows(make, w)

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        down1, down2, columns = spaced(p["down1"]), spaced(p["down2"]), w.shape[1]
        for rows, up1, up2 in row_parts(w, p["up1"], p["up2"]):
            # No name holds the products: the next rows' lie in the same memory, which the cache has.
            add_product_into(rows, thin_product(up1, down1)[:, :columns], thin_product(up2, down2)[:, :columns])

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        if self._is_thin(p, layer):
            return contract(x, w, layer) + self.apply_update(p, x, w, layer)
        return super().apply(p, x, w, layer)

    def apply_update(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        """Where the ranks are small, `(A1 B1) * (A2 B2)` is a product of factors of rank `r * r`: rows of `A1` and `A2`
        multiplied each with each, and columns of `B1` and `B2`.
        """
        if not self._is_thin(p, layer):
            return contract(x, self.delta(p, layer), layer)
        xp = namespace(*p.values())
        up = xp.reshape(p["up1"][:, :, None] * p["up2"][:, None, :], (layer.out, -1))
        down = xp.reshape(p["down1"][:, None, :] * p["down2"][None, :, :], (-1, layer.fan_in))
        return through(x, down, up, layer)

    def dropout(self) -> Dropout:
        return Dropout(outputs=self.rank_dropout, rescaled=True, update=self.module_dropout)

    def _is_thin(self, p: Params, layer: Layer) -> bool:
        return pays(p["up1"].shape[1] * p["up2"].shape[1] * (layer.out + layer.fan_in), layer)

    def _is_tucker(self, layer: Layer) -> bool:
        return self.use_effective_conv2d and any(size != 1 for size in layer.kernel)

    def _product(self, which: str, layer: Layer, last: random.Draw) -> dict[str, Param]:
        a, b = f"hada_w{which}_a", f"hada_w{which}_b"
        draw = random.kaiming_uniform
        if not self._is_tucker(layer):
            return {
                a: Param("out r", (layer.out, self.r), draw),
                b: Param("r in", (self.r, layer.fan_in), last),
            }
        kernel = layer.kernel if len(layer.kernel) > 1 else (*layer.kernel, 1)
        return {
            f"hada_t{which}": Param("r r" + " k" * len(kernel), (self.r, self.r, *kernel), draw),
            a: Param("r out", (self.r, layer.out), draw),
            b: Param("r cin", (self.r, layer.shape[1]), last),
        }

    def _factors(self, which: str, p: Params, layer: Layer) -> tuple[Array, Array]:
        up, down = p[f"hada_w{which}_a"], p[f"hada_w{which}_b"]
        return (up.mT, tucker_factor(p[f"hada_t{which}"], down)) if self._is_tucker(layer) else (up, down)
