"""Trainable tokens: some rows of an embedding are trained as they are, W'[indices] = rows.

Source: the method has no paper; it is PEFT's `TrainableTokensConfig`, whose file stores whole rows (not differences)
under the name `trainable_tokens_delta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftarray.arrays import Array, Params, device, integers, namespace
from peftarray.errors import ConfigError, ShapeError
from peftarray.layers import Kind, Layer, contract
from peftarray.method import Param
from peftarray.method_kinds import Transform
from peftarray.settings import Rule, boolean, setting

__all__ = ["TrainableTokensConfig"]

_rows = Rule(
    lambda value: isinstance(value, (list, tuple)) and all(type(i) is int and i >= 0 for i in value),
    "a list of token numbers",
)


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(Transform):
    """Rows `token_indices` of an embedding `(vocab, dim)` replaced by `trainable_tokens_delta (n, dim)`.

    Attributes:
        token_indices: which rows.
        init_weights: start from the embedding's own rows (the identity).
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    prepared: ClassVar[Mapping[str, str]] = {"slot": "out", "rows": "n in"}
    kinds: ClassVar[tuple[Kind, ...]] = ("embedding", "linear")

    token_indices: list[int] | tuple[int, ...] = setting((), _rows)
    init_weights: bool = setting(True, boolean)

    @property
    def tiles(self) -> str:
        return "out in"

    def resolved(self, name: str) -> dict[str, Any]:
        # A tuple, so that the method is hashable.
        return super().resolved(name) | {"token_indices": tuple(self.token_indices)}

    def params(self, layer: Layer) -> dict[str, Param]:
        count = len(self.token_indices)
        if not count or max(self.token_indices) >= layer.out or len(set(self.token_indices)) != count:
            message = (
                f"{layer.name}: token_indices must be different rows below {layer.out}; got "
                f"{list(self.token_indices)[:8]}"
            )
            raise ConfigError(message)
        return {"trainable_tokens_delta": Param("n in", (count, layer.fan_in))}

    def derive(self, layer: Layer, p: Params, w: Array) -> dict[str, Array]:
        if "trainable_tokens_delta" in p:
            return {}
        indices = integers(self.token_indices, w)
        return {"trainable_tokens_delta": namespace(w).take(w, indices, axis=0)}

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        """`slot[i]` is the row of `rows` that stands in row i; the last, of zeros, where the base's stays."""
        rows = p["trainable_tokens_delta"]
        count = len(self.token_indices)
        if rows.shape[0] != count:
            message = f"{layer.name}: trainable_tokens_delta has {rows.shape[0]} rows for {count} token_indices"
            raise ShapeError(message)
        xp = namespace(rows)
        empty = xp.zeros((1, rows.shape[1]), dtype=rows.dtype, device=device(rows))
        order = sorted(range(count), key=self.token_indices.__getitem__)
        replaced = integers([self.token_indices[place] for place in order], rows)
        every = xp.arange(layer.out, dtype=replaced.dtype, device=device(rows))
        found = xp.clip(xp.searchsorted(replaced, every), max=count - 1)
        slot = xp.where(xp.take(replaced, found) == every, xp.take(integers(order, rows), found), count)
        return {"slot": slot, "rows": xp.concat([rows, empty], axis=0)}

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        xp = namespace(w, p["rows"])
        replaced = (p["slot"] < p["rows"].shape[0] - 1)[:, None]
        return xp.where(replaced, xp.take(p["rows"], p["slot"], axis=0), w)

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        """Only the rows that `x` asks for are looked at."""
        if layer.kind != "embedding":
            return super().apply(p, x, w, layer)
        base = contract(x, w, layer)
        xp = namespace(base, p["rows"])
        slot = xp.take(p["slot"], xp.reshape(x, (-1,)), axis=0)
        rows = xp.reshape(xp.take(p["rows"], slot, axis=0), base.shape)
        return xp.where(xp.reshape(slot < p["rows"].shape[0] - 1, (*x.shape, 1)), rows, base)
