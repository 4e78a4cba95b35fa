"""BOFT: W' = diag(s) W R^T, the inputs turned by a product of butterfly factors, the outputs scaled.

Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2023, section 4,
arXiv:2311.06243.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from peftarray import random
from peftarray.arrays import Array, Params, namespace
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.layers import Kind, Layer, contract
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import Transform
from peftarray.rotations import cayley, diagonal_blocks, turn, wide
from peftarray.settings import boolean, number, one_of, setting, whole

__all__ = ["BOFTConfig"]

# A product of factors whose blocks are no larger than this takes less time than the factors one by one.
_NARROW = 128


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(Transform):
    """Orthogonal fine-tuning by butterflies: `W' = diag(s) W R^T`, `R = B_(F-1) ... B_0`, `n = fan_in = D H`.

    `boft_R (F, D, H, H)` holds an unconstrained `M` for each block of each factor: with `K = (M - M^T) / 2` the block
    is the rotation `(I - K) (I + K)^-1`. Blocks of `B_0` turn `H` neighbours each. In `B_f` a block turns `H / 2`
    neighbours together with the `H / 2` that lie `2^f H / 2` further on, so that R couples `2^(F-1) H` coordinates.
    `boft_s` is `(out, 1)`, for convolutions `(1, out)`; the bias is not scaled. The initial state is the identity
    unless `init_weights=False`.

    Attributes:
        boft_block_size: `H`, where `boft_block_num` is 0.
        boft_block_num: `D`, where `boft_block_size` is 0.
        boft_n_butterfly_factor: `F`. A file may also hold one factor: without its compiled kernel PEFT trains no more,
            whatever the configuration says.
        bias: which biases of the model an adapter's file replaces: `"none"`, `"all"` or `"boft_only"`.
        boft_dropout: share of the blocks that training takes as the identity.
        fan_in_fan_out: the weight is stored `(in, out)`, where the architecture does not say.

    PEFT's unmerged convolution takes no dilation and one stride and padding for both axes; here it equals the merged
    one.

    Example:
        >>> import numpy as np
        >>> adapter = BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2).init(np.eye(4, dtype=np.float32))
        >>> adapter.params["boft_R"].shape
        (2, 2, 2, 2)
    """

    peft_type: ClassVar[str] = "BOFT"
    prepared: ClassVar[Mapping[str, str]] = {"factors": "factor stack row column", "gain": "out"}
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    boft_block_size: int = setting(4, whole(0))
    boft_block_num: int = setting(0, whole(0))
    boft_n_butterfly_factor: int = setting(1, whole(1))
    boft_dropout: float = setting(0.0, number(0.0, 1.0))
    fan_in_fan_out: bool = setting(False, boolean)
    bias: str = setting("none", one_of("none", "all", "boft_only"))
    init_weights: bool = setting(True, boolean)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            message = (
                f"BOFTConfig.boft_block_size is {self.boft_block_size} and boft_block_num {self.boft_block_num}; one "
                "of them must be 0, since the other follows from the layer"
            )
            raise ConfigError(message)

    @property
    def tiles(self) -> str:
        return "out"

    @property
    def starts_as_identity(self) -> bool:
        return self.init_weights

    def params(self, layer: Layer) -> dict[str, Param]:
        blocks, size = self._blocks(layer)
        rotations = (self.boft_n_butterfly_factor, blocks, size, size)
        axes, gains = ("one out", (1, layer.out)) if layer.kind == "conv" else ("out one", (layer.out, 1))

        def turned(seed: int, stream: str, shape: tuple[int, ...]) -> Any:
            self._check_factors(layer)
            return (random.zeros if self.init_weights else random.normal_of(0.1))(seed, stream, shape)

        return {
            "boft_R": Param("factor block row column", rotations, turned),
            "boft_s": Param(axes, gains, random.full(1.0) if self.init_weights else _around_one),
        }

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], layer: Layer) -> None:
        if shapes.get("boft_R", ())[:1] == (1,):
            super(BOFTConfig, replace(self, boft_n_butterfly_factor=1)).check_shapes(shapes, layer)
        else:
            super().check_shapes(shapes, layer)
            self._check_factors(layer)

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        """`factors`: the blocks of each factor; of their product, where it couples few coordinates."""
        free = p["boft_R"]
        factors = cayley((free - free.mT) * 0.5)
        coupled = factors.shape[2] << (factors.shape[0] - 1)
        joined = wide(coupled, layer.fan_in)
        if factors.shape[2] < joined <= _NARROW:
            product = diagonal_blocks(lambda rows: _turn(rows, factors), layer.fan_in, joined, factors)
            factors = product[None, ...]
        return {"factors": factors, "gain": namespace(p["boft_s"]).reshape(p["boft_s"], (-1,))}

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        for level in range(p["factors"].shape[0]):
            w = _turn_factor(w, p["factors"][level, ...].mT, level)
        return w * p["gain"][:, None]

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        if bool(namespace(p["gain"]).any(p["gain"] == 0)):
            message = (
                f"{layer.name}: boft_s has an entry of 0, which leaves nothing of that output's weights, so it cannot "
                "be unmerged; keep a copy of the base weight"
            )
            raise UnsupportedError(message)
        return _turn(w / p["gain"][:, None], p["factors"])

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        if layer.kind == "conv":
            return super().apply(p, x, w, layer)
        return contract(_turn(x, p["factors"]), w, layer) * p["gain"]

    def dropout(self) -> Dropout:
        return Dropout(blocks=self.boft_dropout, parameter="boft_R", stacked=True)

    def stored_in_out(self) -> bool:
        return self.fan_in_fan_out

    def _blocks(self, layer: Layer) -> tuple[int, int]:
        """How many blocks a factor has on this layer, and their size."""
        n = layer.fan_in
        blocks = self.boft_block_num or n // self.boft_block_size
        size = self.boft_block_size or n // self.boft_block_num
        if blocks * size != n:
            given = f"block_num is {blocks}" if self.boft_block_num else f"block_size is {size}"
            message = f"{layer.name}: BOFTConfig.boft_{given}; it must divide this layer's {n} inputs"
            raise ConfigError(message)
        return blocks, size

    def _check_factors(self, layer: Layer) -> None:
        blocks, size = self._blocks(layer)
        factors = self.boft_n_butterfly_factor
        # A number's lowest set bit is the largest power of 2 that divides it.
        if factors > 1 and (size % 2 or factors > (blocks & -blocks).bit_length()):
            message = (
                f"{layer.name}: BOFTConfig.boft_n_butterfly_factor is {factors} for {blocks} blocks of {size}; the "
                "size must be even, and the number of blocks divisible by 2 as often as there are further factors"
            )
            raise ConfigError(message)


def _turn(x: Array, factors: Array) -> Array:
    """`x B_(F-1) ... B_0`."""
    for level in reversed(range(factors.shape[0])):
        x = _turn_factor(x, factors[level, ...], level)
    return x


def _turn_factor(x: Array, blocks: Array, level: int) -> Array:
    """`x B_f`: of each `2^f H` neighbouring coordinates, pairs of half blocks from both halves side by side."""
    if not level:
        return turn(x, blocks)
    xp = namespace(x, blocks)
    pairs, half = 1 << level, blocks.shape[1] // 2
    beside = xp.permute_dims(xp.reshape(x, (-1, 2, pairs, half)), (0, 2, 1, 3))
    turned = turn(xp.reshape(beside, x.shape), blocks)
    return xp.reshape(xp.permute_dims(xp.reshape(turned, (-1, pairs, 2, half)), (0, 2, 1, 3)), x.shape)


def _around_one(seed: int, stream: str, shape: tuple[int, ...]) -> Any:
    return 1 + random.normal_of(0.1)(seed, stream, shape)
