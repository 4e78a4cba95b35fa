"""Block-diagonal factors of LoRA: which factor of a module they are, and the matrix that stored blocks make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftarray.arrays import Array, device, namespace
from peftarray.errors import ConfigError

__all__ = ["SIDES", "block_diagonal", "block_side"]

SIDES = ("target_modules_bd_a", "target_modules_bd_b")


def block_side(config: Mapping[str, Any], name: str) -> tuple[str, int] | None:
    """Which factor of the module called `name` is block-diagonal, and in how many blocks."""
    unknown = set(config) - {*SIDES, "nblocks", "match_strict"}
    blocks = config.get("nblocks", 1)
    if unknown or type(blocks) is not int or blocks < 1:
        message = (
            f"LoraConfig.use_bdlora is {config!r}; it must hold target_modules_bd_a, target_modules_bd_b, nblocks "
            "(at least 1) and match_strict"
        )
        raise ConfigError(message)
    sides = [side for side in "ab" if any(part in name for part in config.get(f"target_modules_bd_{side}") or ())]
    if len(sides) == 2 or (not sides and config.get("match_strict", True)):
        message = (
            f"LoraConfig.use_bdlora names {name} for {len(sides)} sides; it must be for one, or match_strict False"
        )
        raise ConfigError(message)
    return (sides[0], blocks) if sides else None


def block_diagonal(stacked: Array, blocks: int) -> Array:
    """`(rows, n)` as `blocks` groups of rows on the diagonal of `(rows, blocks * n)`."""
    xp = namespace(stacked)
    rows, columns = stacked.shape
    if rows % blocks:
        message = f"LoraConfig.use_bdlora: {rows} rows cannot be split into {blocks} blocks; nblocks must divide them"
        raise ConfigError(message)
    grid = xp.reshape(stacked, (blocks, rows // blocks, 1, columns))
    eye = xp.reshape(xp.eye(blocks, dtype=stacked.dtype, device=device(stacked)), (blocks, 1, blocks, 1))
    return xp.reshape(grid * eye, (rows, blocks * columns))
