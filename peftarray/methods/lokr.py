"""LoKr: W' = W + s (w1 kron w2), a Kronecker product whose factors may be products of low rank themselves.

Sources: Edalati et al., KronA: Parameter Efficient Tuning with Kronecker Adapter, 2022, section 3, arXiv:2212.10650;
Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023, section 3,
arXiv:2309.14859.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from peftarray import random
from peftarray.arrays import Array, Params, add_product, add_product_into, namespace, thin_product
from peftarray.layers import Kind, Layer, contract, pays, through, tucker_factor
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import Additive
from peftarray.settings import Rule, boolean, mapping_of, number, one_of, optional, setting, whole

__all__ = ["LoKrConfig", "split"]

_any_whole = Rule(lambda value: type(value) is int, "a whole number (-1: as balanced as possible)")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(Additive):
    """Low-rank Kronecker product: `W' = W + s (w1 kron w2)`, `s = alpha / r`.

    Shapes: with `(l, k) = split(out)` and `(m, n) = split(in)`, `lokr_w1` is `(l, m)` and `lokr_w2` is `(k, n)`, for a
    convolution `(k, n, *kernel)`; entry `(l k, m n)` of the update is `w1[l, m] w2[k, n]`. Where `r < max(k, n) / 2`,
    `w2` is `lokr_w2_a (k, r)` times `lokr_w2_b (r, n * kernel)`, or, with `use_effective_conv2d` and a kernel of more
    than a point, has the Tucker form with a core `lokr_t2 (r, r, *kernel)` (of one axis: `(r, r, kernel, 1)`),
    `lokr_w2_a (r, k)` and `lokr_w2_b (r, n)`. With `decompose_both` and `r < max(l, m) / 2`, `w1` is `lokr_w1_a (l, r)`
    times `lokr_w1_b (r, m)`. In a convolution over one axis with a full `w2`, PEFT has the factors in the other order,
    and so have its files: `w2 kron w1`, with entry `(k l, n m)`. The initial state is the identity unless
    `init_weights=False`.

    Attributes:
        r: the rank of the factors that are decomposed.
        alpha: numerator of the scale, which PEFT applies also where no factor is decomposed.
        rank_dropout: share of the update's outputs that training leaves out.
        rank_dropout_scale: whether the others grow accordingly.
        module_dropout: probability that training leaves out the whole update.
        use_effective_conv2d: the Tucker form, for convolutions of any number of axes.
        decompose_both: decompose the first factor too.
        decompose_factor: the size of the first factor where it divides the dimension, and else at most this; -1 for
            factors of nearly the same size.
        init_weights: start as the identity, with a zero in `w1` (True) or in `w2` (`"lycoris"`).
        rank_pattern, alpha_pattern: pattern of module names -> its `r`, `alpha`.

    Example:
        >>> import numpy as np
        >>> adapter = LoKrConfig(r=2).init(np.ones((24, 36), np.float32))
        >>> {name: array.shape for name, array in adapter.params.items()}
        {'lokr_w1': (4, 6), 'lokr_w2_a': (6, 2), 'lokr_w2_b': (2, 6)}
    """

    peft_type: ClassVar[str] = "LOKR"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    # The second factor is there as `inner`, or, where that is cheaper, as two thin ones.
    prepared: ClassVar[Mapping[str, str]] = {
        "outer": "out/b in/d tap",
        "inner": "b d",
        "inner_up": "b r",
        "inner_down": "r d",
    }
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    r: int = setting(8, whole(1))
    alpha: float = setting(8, number())
    rank_dropout: float = setting(0.0, number(0.0, 1.0))
    module_dropout: float = setting(0.0, number(0.0, 1.0))
    rank_dropout_scale: bool = setting(False, boolean)
    use_effective_conv2d: bool = setting(False, boolean)
    decompose_both: bool = setting(False, boolean)
    decompose_factor: int = setting(-1, _any_whole)
    init_weights: bool | str = setting(True, one_of(True, False, "lycoris"))
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
        rows, columns = split(layer.out, self.decompose_factor), split(layer.shape[1], self.decompose_factor)
        return self._first(rows[0], columns[0]) | self._second(rows[1], columns[1], layer)

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        """Factors of the matrix, `outer` and then `inner`; the kernel's axis belongs to one of them."""
        xp = namespace(*p.values())
        w1 = (p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]) * self.scale
        if "lokr_w2" in p:
            w2 = p["lokr_w2"]
            if len(layer.kernel) == 1:
                return {"outer": w2, "inner": w1}
            return {"outer": w1[:, :, None], "inner": xp.reshape(w2, (w2.shape[0], -1))}
        up, down = p["lokr_w2_a"], p["lokr_w2_b"]
        if "lokr_t2" in p:
            up, down = up.mT, tucker_factor(p["lokr_t2"], down)
        # One product instead of two thin ones, unless these are much cheaper: small ones cost what their calls cost.
        if 4 * up.shape[1] * (up.shape[0] + down.shape[1]) > up.shape[0] * down.shape[1]:
            return {"outer": w1[:, :, None], "inner": up @ down}
        return {"outer": w1[:, :, None], "inner_up": up, "inner_down": down}

    def delta(self, p: Params, layer: Layer) -> Array:
        outer, inner = _blocks(p)
        return namespace(outer).reshape(outer * inner, (outer.shape[0] * inner.shape[1], -1))

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        outer, inner = _blocks(p)
        return namespace(w, outer).reshape(add_product(_in_blocks(w, outer, inner), outer, inner), w.shape)

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        outer, inner = _blocks(p)
        add_product_into(_in_blocks(w, outer, inner), outer, inner)  # the same memory, since each axis is only split

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        if self._is_cheap(p, layer):
            return contract(x, w, layer) + self.apply_update(p, x, w, layer)
        return super().apply(p, x, w, layer)

    def apply_update(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        """`(outer kron inner) x` is `outer X inner^T`, with `x` read as the matrix `X` of its blocks."""
        if not self._is_cheap(p, layer):
            return contract(x, self.delta(p, layer), layer)
        xp = namespace(x, *p.values())
        outer, block = p["outer"][:, :, 0], _block(p, layer)
        columns = outer.shape[1]
        if layer.kind == "linear":
            hidden = _through_inner(p, xp.reshape(x, (*x.shape[:-1], columns, block.shape[1])), block)
            return xp.reshape(outer @ hidden, (*x.shape[:-1], layer.out))
        batch, space = x.shape[0], x.shape[2:]
        hidden = _through_inner(p, xp.reshape(x, (batch * columns, block.shape[1], *space)), block)
        update = outer @ xp.reshape(hidden, (batch, columns, -1))
        return xp.reshape(update, (batch, layer.out, *hidden.shape[2:]))

    def dropout(self) -> Dropout:
        return Dropout(outputs=self.rank_dropout, rescaled=self.rank_dropout_scale, update=self.module_dropout)

    def _is_cheap(self, p: Params, layer: Layer) -> bool:
        _, columns, taps = p["outer"].shape
        within = sum(math.prod(factor.shape) for name, factor in p.items() if name != "outer")
        return taps == layer.window.groups == 1 and pays(columns * (within + layer.out), layer)

    def _first(self, rows: int, columns: int) -> dict[str, Param]:
        first = random.zeros if self.init_weights is True else random.kaiming_uniform
        if self.decompose_both and 2 * self.r < max(rows, columns):
            return {
                "lokr_w1_a": Param("l r", (rows, self.r), first),
                "lokr_w1_b": Param("r m", (self.r, columns), random.kaiming_uniform),
            }
        return {"lokr_w1": Param("l m", (rows, columns), first)}

    def _second(self, rows: int, columns: int, layer: Layer) -> dict[str, Param]:
        last = random.zeros if self.init_weights == "lycoris" else random.kaiming_uniform
        draw, r = random.kaiming_uniform, self.r
        if 2 * r >= max(rows, columns):
            return {"lokr_w2": Param("k n" + " tap" * len(layer.kernel), (rows, columns, *layer.kernel), last)}
        if self.use_effective_conv2d and any(size != 1 for size in layer.kernel):
            kernel = layer.kernel if len(layer.kernel) > 1 else (*layer.kernel, 1)
            return {
                "lokr_t2": Param("r r" + " tap" * len(kernel), (r, r, *kernel), draw),
                "lokr_w2_a": Param("r k", (r, rows), draw),
                "lokr_w2_b": Param("r n", (r, columns), last),
            }
        return {
            "lokr_w2_a": Param("k r", (rows, r), draw),
            "lokr_w2_b": Param("r n", (r, columns * math.prod(layer.kernel)), last),
        }


def split(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two whole numbers with the product `dimension`: the sizes of the two factors along one axis.

    `factor` first where it divides the dimension, also if it is the larger one; otherwise the largest divisor that
    exceeds neither `factor` nor the root of the dimension. With -1 the two are as close as they can be.

    Example:
        >>> split(1024), split(360), split(127), split(128, 4), split(128, 64), split(250, 8)
        ((32, 32), (18, 20), (1, 127), (4, 32), (64, 2), (5, 50))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    root = math.isqrt(dimension)
    most = root if factor == -1 else min(factor, root)
    first = next((number for number in range(most, 1, -1) if dimension % number == 0), 1)
    return first, dimension // first


def _block(p: Params, layer: Layer) -> Layer:
    """The layer that `inner` would be the weight of."""
    rows, columns, _ = p["outer"].shape
    return replace(layer, shape=(layer.out // rows, layer.shape[1] // columns, *layer.kernel))


def _blocks(p: Params) -> tuple[Array, Array]:
    """Both factors with axes for (row block, row, column block, column, kernel), whose product is the update."""
    inner = p["inner"] if "inner" in p else thin_product(p["inner_up"], p["inner_down"])
    return p["outer"][:, None, :, None, :], inner[None, :, None, :, None]


def _in_blocks(w: Array, outer: Array, inner: Array) -> Array:
    """The weight with the axes of the update, along each of which one of the factors is 1."""
    return namespace(w, outer).reshape(w, tuple(map(operator.mul, outer.shape, inner.shape)))


def _through_inner(p: Params, x: Array, block: Layer) -> Array:
    if "inner" in p:
        return contract(x, p["inner"], block)
    return through(x, p["inner_down"], p["inner_up"], block)
