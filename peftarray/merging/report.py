"""What a merge did, in numbers: how large the update was, and how much of it the output holds.

With W the base, D the update that was wanted and W' what was written: update = |D| / |W|, error = |W' - W - D| / |D|,
retained = 1 - error^2 (the share of the update's energy that the output holds, 0 at least), cosine = <W' - W, D> /
(|W' - W| |D|), unchanged = the share of entries whose stored bits are the base's. Norms are Frobenius norms.

The size of the update is exact. The figures of rounding (error, retained, cosine, unchanged) are exact for tensors up
to 65,536 entries; of larger ones, rows spread evenly over every tile stand for the others, 32,768 entries of a tile at
least, and the whole tile where they do not hold their share of its update. Entries that are not finite are always
counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

__all__ = ["LEAST_KEPT", "MergeReport", "Sums", "TensorReport"]

_HELD = 0.9
LEAST_KEPT = 0.5
"""The share of a weight's update below which requantising has erased it."""


@dataclass
class Sums:
    """Sums over the entries of a tensor, from which the figures follow; those of tiles add up.

    `count`, `base`, `update` and `nonfinite` are over all entries. The others need the rounded values decoded again:
    where rows were measured that stand for the rest, they are their sums scaled to the whole.
    """

    count: int = 0
    base: float = 0.0
    """sum W^2"""
    update: float = 0.0
    """sum D^2"""
    measured: int = 0
    """How many entries the following sums were made from."""
    wanted: float = 0.0
    """sum D^2"""
    rounding: float = 0.0
    """sum E^2, E = W' - W - D"""
    cross: float = 0.0
    """sum D E"""
    unchanged: float = 0.0
    """Entries whose bits stayed."""
    nonfinite: int = 0

    def add(self, other: Sums) -> None:
        # Written out: this runs for every tile.
        self.count += other.count
        self.base += other.base
        self.update += other.update
        self.measured += other.measured
        self.wanted += other.wanted
        self.rounding += other.rounding
        self.cross += other.cross
        self.unchanged += other.unchanged
        self.nonfinite += other.nonfinite

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Self:
        result = cls()
        for part in parts:
            result.add(part)
        return result

    @property
    def relative_update(self) -> float:
        return math.sqrt(self.update / self.base) if self.base else (math.inf if self.update else 0.0)

    @property
    def base_relative_error(self) -> float:
        return math.sqrt(self.rounding / self.base) if self.base else 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.rounding / self.wanted) if self.wanted else 0.0

    @property
    def retained(self) -> float:
        return max(0.0, 1.0 - self.rounding / self.wanted) if self.wanted else 1.0

    @property
    def cosine(self) -> float:
        realised = self.wanted + 2 * self.cross + self.rounding
        if not self.wanted:
            return 1.0
        return (self.wanted + self.cross) / math.sqrt(self.wanted * realised) if realised > 0 else 0.0

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.count if self.count else 1.0


@dataclass(frozen=True)
class TensorReport:
    """The figures of one tensor that an adapter changed."""

    name: str
    dtype: str
    sums: Sums
    base_error: float | None = None
    """|W - W_q| / |W| of an original base and what was quantised from it; None where none was given."""

    @property
    def mismatch(self) -> float | None:
        """|W - W_q| / |D|: above 1 the two bases differ by more than what the adapter learnt on one of them."""
        return None if self.base_error is None or not self.update else self.base_error / self.update

    @property
    def update(self) -> float:
        """|D| / |W|."""
        return self.sums.relative_update

    @property
    def error(self) -> float:
        """|W' - W - D| / |D|."""
        return self.sums.error

    @property
    def retained(self) -> float:
        """1 - error^2, 0 at least."""
        return self.sums.retained

    @property
    def cosine(self) -> float:
        """Between the update that was wanted and the one that was made."""
        return self.sums.cosine

    @property
    def unchanged(self) -> float:
        """The share of entries whose stored bits, or codes, are the base's."""
        return self.sums.unchanged_share

    @property
    def nonfinite(self) -> int:
        """Entries that are NaN or infinite in the output."""
        return self.sums.nonfinite

    def to_dict(self) -> dict[str, Any]:
        found = {"name": self.name, "dtype": self.dtype} | _figures(self.sums)
        if self.base_error is None:
            return found
        return found | {"base_error": self.base_error, "mismatch": self.mismatch}


@dataclass(frozen=True)
class MergeReport:
    """The whole of a merge.

    Attributes:
        out: the folder that was written (or would be).
        tensors: the figures of every changed tensor.
        applied: how many of the adapter's tensors went into the result.
        given: how many it has, those of training alone not counted.
        copied: how many base tensors were copied byte for byte.
        nbytes: bytes of weights written.
        seconds: wall time.
        memory: bytes that the work was planned to hold at once.
        notes: facts to know: heads untied, tensors added, files that came from the adapter.
        unmatched: what was passed over because the caller allowed it.
        dry_run: whether nothing was written.
        resumed: shards that an earlier run had finished.
    """

    out: str
    tensors: tuple[TensorReport, ...]
    applied: int
    given: int
    copied: int
    nbytes: int
    seconds: float
    memory: int
    notes: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    dry_run: bool = False
    resumed: int = 0
    total: Sums = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", Sums.total(tensor.sums for tensor in self.tensors))

    @property
    def retained(self) -> float:
        """The share of the whole update's energy that the output holds."""
        return self.total.retained

    @property
    def flagged(self) -> tuple[TensorReport, ...]:
        """Tensors whose dtype holds less than nine tenths of the update, the worst first."""
        return tuple(sorted((t for t in self.tensors if t.retained < _HELD), key=lambda t: t.retained))

    @property
    def mismatched(self) -> tuple[TensorReport, ...]:
        """Tensors whose original differs from the quantised base by more than the update, the worst first."""
        far = [tensor for tensor in self.tensors if (tensor.mismatch or 0) > 1]
        return tuple(sorted(far, key=lambda tensor: -(tensor.mismatch or 0)))

    @property
    def empty(self) -> tuple[TensorReport, ...]:
        """Tensors that the adapter is for, and whose update is zero."""
        return tuple(tensor for tensor in self.tensors if not tensor.sums.update)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("tensors", "total")}
        whole = _figures(self.total)
        return own | {"whole": whole, "tensors": [tensor.to_dict() for tensor in self.tensors]}


def _figures(sums: Sums) -> dict[str, Any]:
    return {
        "update": sums.relative_update if math.isfinite(sums.relative_update) else None,  # JSON has no infinity
        "error": sums.error,
        "retained": sums.retained,
        "cosine": sums.cosine,
        "unchanged": sums.unchanged_share,
        "nonfinite": sums.nonfinite,
        "entries": sums.count,
        "measured": sums.measured,
    }


def sums_from_dict(data: dict[str, Any]) -> Sums:
    """The inverse of `dataclasses.asdict` for sums that a journal kept."""
    return Sums(**{item.name: data[item.name] for item in fields(Sums)})


sums_to_dict = asdict
