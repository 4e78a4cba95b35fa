"""OFT: W' = W Q^T, the inputs turned by a block-diagonal matrix of rotations.

Sources: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, section 3, arXiv:2306.07280
(Cayley transform, shared blocks, the bound of COFT); Qiu et al., Orthogonal Finetuning Made Scalable, 2025, section 4,
arXiv:2506.19847 (rotated inputs, Neumann series).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from peftarray import random
from peftarray.arrays import Array, Params, device, namespace
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.layers import Kind, Layer, contract
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import Transform
from peftarray.rotations import cayley, diagonal_blocks, skew_symmetric, turn, wide
from peftarray.settings import Rule, boolean, number, one_of, setting, whole

__all__ = ["OFTConfig"]

_terms = Rule(lambda value: type(value) is int and 1 <= value <= 1000, "a whole number from 1 to 1000")


@dataclass(frozen=True, kw_only=True)
class OFTConfig(Transform):
    """Orthogonal fine-tuning: `W' = W Q^T` with `Q = diag(Q_1, ..., Q_R)`, each block `(b, b)`, `R b = fan_in`.

    A row of `oft_R (R, b (b - 1) / 2)` is what stands above the diagonal of a skew-symmetric `K`; its block is
    `(I - K) (I + K)^-1`, or with `use_cayley_neumann` the first terms of the series of `(I + K) (I - K)^-1`, which is
    that block's inverse. Of an embedding `(vocab, dim)` the rows are turned, `W' = W Q`. The initial state is the
    identity unless `init_weights=False`.

    Attributes:
        r: the number of blocks, where `oft_block_size` is 0.
        oft_block_size: `b`, where `r` is 0. Either becomes the nearest divisor of `fan_in`, the smaller of two.
        use_cayley_neumann: `I + 2 K + ... + 2 K^(m - 1) + K^m` in place of the rotation.
        num_cayley_neumann_terms: m + 1 from 4 on; of 3, m is 3 as well, 2 gives `I + 2 K` and 1 the identity.
        coft: no block strays from the identity further than `|K| = eps / sqrt(R)` (Frobenius norm).
        eps: that bound.
        block_share: all blocks are the same, `oft_R (1, b (b - 1) / 2)`.
        bias: which biases of the model an adapter's file replaces: `"none"`, `"all"` or `"oft_only"`.
        module_dropout: share of the blocks that training takes as the identity; PEFT takes no notice of it.
        fan_in_fan_out: the weight is stored `(in, out)`, where the architecture does not say.

    PEFT's unmerged convolution adds overlapping patches up for kernels larger than 1; here it equals the merged one.

    Example:
        >>> import numpy as np
        >>> adapter = OFTConfig(oft_block_size=2, use_cayley_neumann=False).init(np.eye(4, dtype=np.float32))
        >>> adapter.params["oft_R"].shape
        (2, 1)
    """

    peft_type: ClassVar[str] = "OFT"
    prepared: ClassVar[Mapping[str, str]] = {"blocks": "stack row column"}
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding", "conv")

    r: int = setting(0, whole(0))
    oft_block_size: int = setting(32, whole(0))
    module_dropout: float = setting(0.0, number(0.0, 1.0))
    fan_in_fan_out: bool = setting(False, boolean)
    bias: str = setting("none", one_of("none", "all", "oft_only"))
    init_weights: bool = setting(True, boolean)
    coft: bool = setting(False, boolean)
    eps: float = setting(6e-5, number(0.0))
    block_share: bool = setting(False, boolean)
    use_cayley_neumann: bool = setting(True, boolean)
    num_cayley_neumann_terms: int = setting(5, _terms)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.r) == bool(self.oft_block_size):
            message = (
                f"OFTConfig.r is {self.r} and oft_block_size {self.oft_block_size}; one must be 0, since it follows "
                "from the layer (a file without oft_block_size is of PEFT before 0.14, whose OFT was another)"
            )
            raise ConfigError(message)

    @property
    def tiles(self) -> str:
        return "out"

    @property
    def starts_as_identity(self) -> bool:
        return self.init_weights

    def params(self, layer: Layer) -> dict[str, Param]:
        size = self._block_size(layer)
        shape = (1 if self.block_share else layer.fan_in // size, size * (size - 1) // 2)
        init = random.zeros if self.init_weights else random.normal_of(0.1)
        disk = "oft_embedding_R.weight" if layer.kind == "embedding" else "oft_R.weight"
        return {"oft_R": Param("stack above", shape, init, disk=disk)}

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        """`blocks`: on the diagonal of what the weight is multiplied by from the right."""
        skew = skew_symmetric(p["oft_R"], self._block_size(layer))
        if self.coft:
            skew = _bounded(skew, self.eps / math.sqrt(skew.shape[0]))
        blocks = _series(skew, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(skew)
        blocks = blocks if layer.kind == "embedding" else blocks.mT
        joined = wide(blocks.shape[1], layer.fan_in)
        if joined > blocks.shape[1]:
            n = joined if self.block_share else layer.fan_in
            blocks = diagonal_blocks(lambda rows: turn(rows, blocks), n, joined, blocks)
        return {"blocks": blocks}

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        return turn(w, p["blocks"])

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        blocks = p["blocks"]
        if not self.use_cayley_neumann:
            return turn(w, blocks.mT)
        xp = namespace(blocks)
        values = xp.linalg.svdvals(blocks)
        if bool(xp.min(values) < xp.finfo(blocks.dtype).eps ** 0.5 * xp.max(values)):
            message = (
                f"{layer.name}: a block of OFT's Neumann series has no inverse, so it cannot be unmerged; keep a copy "
                "of the base weight"
            )
            raise UnsupportedError(message)
        return turn(w, xp.linalg.inv(blocks))

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        if layer.kind == "linear":
            return contract(turn(x, p["blocks"].mT), w, layer)
        if layer.kind == "embedding":
            return turn(contract(x, w, layer), p["blocks"])
        return super().apply(p, x, w, layer)

    def dropout(self) -> Dropout:
        return Dropout(blocks=self.module_dropout, parameter="oft_R")

    def why_not_mergeable(self) -> str | None:
        if not self.use_cayley_neumann or _release(self.peft_version) >= (0, 18):
            return None
        return (
            f"use_cayley_neumann is True and peft_version {self.peft_version!r}; before 0.18 PEFT cut the series off "
            "otherwise, so the weights that it was trained with are others; merge it with the release that trained "
            "it, or write that release into peft_version if it is a later one"
        )

    def stored_in_out(self) -> bool:
        return self.fan_in_fan_out

    def _block_size(self, layer: Layer) -> int:
        n = layer.fan_in
        return n // _nearest_divisor(n, self.r) if self.r else _nearest_divisor(n, self.oft_block_size)


def _release(version: str | None) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of `n` that is nearest to `wanted`, the smaller of two."""
    wanted = min(wanted, n)
    return next(d for step in range(wanted) for d in (wanted - step, wanted + step) if n % d == 0)


def _bounded(skew: Array, limit: float) -> Array:
    """Each block shortened to the Frobenius norm `limit` where it is longer."""
    xp = namespace(skew)
    square = xp.sum(skew * skew, axis=(1, 2), keepdims=True)
    return skew * (limit / xp.sqrt(xp.clip(square, min=max(limit * limit, 1e-30))))


def _series(skew: Array, terms: int) -> Array:
    """`I + 2 K + ... + 2 K^(m - 1) + K^m`, m = max(3, terms - 1), in half as many products by powers of `K^2`."""
    one = namespace(skew).eye(skew.shape[-1], dtype=skew.dtype, device=device(skew))
    if terms < 3:
        return one + 2 * (terms - 1) * skew
    last = max(3, terms - 1)
    square, pair = skew @ skew, 2 * (one + skew)
    series = 2 * one + skew if last % 2 else square + pair
    for _ in range((last - 3) // 2):
        series = square @ series + pair
    return square @ series + (pair - one)
