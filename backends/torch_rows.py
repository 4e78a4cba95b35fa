"""Batches of which each row names its adapter: how rows are brought together, and back into their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from peftarray.errors import MatchError, ShapeError, nearest
from peftarray.layers import Layer
from peftarray.slots import Factors, slot_update
from peftarray.stacked_weight import Run, runs_of

__all__ = ["BASE", "Rows"]

BASE = "__base__"
"""PEFT's name for no adapter."""

_A_CALL = 50_000
"""So many numbers are moved in the time that one more product takes to be called."""


@dataclass(frozen=True)
class Rows:
    """The adapter of each row of a batch.

    Attributes:
        names: of each row; None for none.
        repeats: whether a batch may have each row several times, one after the other, as beam search does it.
    """

    names: tuple[str | None, ...]
    repeats: bool = False

    @classmethod
    def named(cls, names: Sequence[str | None], known: Iterable[str], *, repeats: bool = False) -> Rows:
        """The rows that a caller names.

        Raises:
            MatchError: a name is unknown, or there is none.
        """
        if isinstance(names, str) or not len(names):
            message = f"adapter_names is {names!r}; give a list with the name of an adapter, or None, for each row"
            raise MatchError(message)
        pool = set(known)
        for name in names:
            if name is not None and name != BASE and name not in pool:
                message = f"adapter_names names {name!r}, which is none of {len(pool)} adapters{nearest(name, pool)}"
                raise MatchError(message)
        return cls(tuple(None if name == BASE else name for name in names), repeats)

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The names, each once, in the order of their first rows."""
        return tuple(dict.fromkeys(name for name in self.names if name is not None))

    def seen_as(self, of_layer: Iterable[str]) -> Rows:
        """The same rows for a layer that has only some of the adapters."""
        if all(name in of_layer for name in self.adapters):
            return self
        kept = frozenset(self.adapters).intersection(of_layer)
        if kept not in self._fewer:
            self._fewer[kept] = Rows(tuple(name if name in kept else None for name in self.names), self.repeats)
        return self._fewer[kept]

    def of_batch(self, size: int, where: str) -> Rows:
        """The same for a batch of this size.

        Raises:
            ShapeError: it has not as many rows.
        """
        count = len(self.names)
        if size == count:
            return self
        if not self.repeats or size % count:
            message = (
                f"{where}: {count} adapter_names are given, and the batch has {size} rows; the first axis of every "
                "input of an adapted layer must be the batch"
            )
            raise ShapeError(message)
        if size not in self._repeated:
            times = size // count
            self._repeated[size] = Rows(tuple(name for name in self.names for _ in range(times)))
        return self._repeated[size]

    def segments(self, device: torch.device) -> list[tuple[str | None, torch.Tensor]]:
        """(adapter, numbers of its rows) for each that occurs."""
        return [(name, self._index(f"rows {name}", rows, device)) for name, rows in self._groups.items()]

    def by_segment(
        self, make: Callable[[str | None, torch.Tensor], torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """What `make` makes of each adapter and its rows, in the order of the batch."""
        parts = self.segments(device)
        if len(parts) == 1:
            return make(*parts[0])
        made = [make(name, rows) for name, rows in parts]
        order = [row for rows in self._groups.values() for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(made).index_select(0, self._index("segments", back, device))

    def add_update(self, y: torch.Tensor, x: torch.Tensor, stacks: Factors, slots: Mapping[str, int]) -> torch.Tensor:
        """`y` itself, a linear layer's output, to which `update` is added in place.

        Args:
            y: `(n, ..., out)`, contiguous, which no gradient is asked for.
            x: `(n, ..., in)`.
            stacks, slots: as for `update`.
        """
        given, taken = x.reshape(x.shape[0], -1, x.shape[-1]), y.view(x.shape[0], -1, y.shape[-1])
        as_they_come, sorted_runs, order = self._ways(slots)
        down, up = stacks
        (count, tokens, fan_in), out, rank = given.shape, y.shape[-1], down.shape[1]
        staying = _A_CALL * sum(run.times for run in as_they_come)
        moving_rows = _A_CALL * len(sorted_runs) + len(order) * tokens * (fan_in + 2 * out)
        moving_factors = _A_CALL + count * rank * (fan_in + out)
        if staying <= min(moving_rows, moving_factors):
            _add_runs(taken, given, stacks, as_they_come)
        elif moving_rows <= moving_factors:
            index = self._index(f"order {order}", order, x.device)
            update = given.new_zeros(len(order), tokens, out)
            _add_runs(update, given.index_select(0, index), stacks, sorted_runs)
            taken.index_add_(0, index, update)
        else:
            index = self._slot_index(slots, x.device)
            _add_products(taken, given, down.index_select(0, index), up.mT.index_select(0, index))
        return y

    def update(self, x: torch.Tensor, stacks: Factors, slots: Mapping[str, int], layer: Layer) -> torch.Tensor:
        """What low-rank adapters add to a layer's output.

        Args:
            x: `(n, ..., in)`.
            stacks: of `adapters`, behind slot 0, which is zeros.
            slots: which slot each of them has.
            layer: the layer.
        """
        down, up = stacks
        in_order = all(slots[name] == place for place, name in enumerate(self.adapters, start=1))
        if layer.kind != "linear" or not x.numel() or not in_order:
            return slot_update(x, down, up, self._slot_index(slots, x.device), layer)
        some = slice(0 if None in self._groups else 1, len(self.adapters) + 1)
        down, up = down[some], up[some]
        count, each = len(self._groups), x.reshape(x.shape[0], -1, x.shape[-1])
        tokens, rank = each.shape[1], down.shape[1]
        moved, back = self._padded
        if moved == list(range(len(self.names))):  # as they come, rows of one adapter stand together
            y = _both(each.reshape(count, -1, x.shape[-1]), down, up)
        elif len(moved) * tokens <= len(self.names) * rank:
            # Rows are moved to stand beside others of their adapter, which is less than a copy of factors for each.
            apart = each.index_select(0, self._index("padded", moved, x.device))
            y = _both(apart.reshape(count, -1, x.shape[-1]), down, up)
            y = y.reshape(len(moved), tokens, -1).index_select(0, self._index("back", back, x.device))
        else:
            return slot_update(x, *stacks, self._slot_index(slots, x.device), layer)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _ways(self, slots: Mapping[str, int]) -> tuple[tuple[Run, ...], tuple[Run, ...], list[int]]:
        """The runs of rows as they come; those of rows that are sorted by their slots, and the sorted rows."""
        of_rows = tuple(None if name is None else slots[name] for name in self.names)
        if of_rows not in self._known_ways:
            order = sorted((slot, row) for row, slot in enumerate(of_rows) if slot is not None)
            sorted_runs = runs_of([slot for slot, _ in order])
            self._known_ways[of_rows] = runs_of(of_rows), sorted_runs, [row for _, row in order]
        return self._known_ways[of_rows]

    @cached_property
    def _groups(self) -> dict[str | None, list[int]]:
        """Adapter -> its rows: none first, then the adapters in their order, as the slots are."""
        found: dict[str | None, list[int]] = {None: []} if None in self.names else {}
        for row, name in enumerate(self.names):
            found.setdefault(name, []).append(row)
        return found

    @cached_property
    def _padded(self) -> tuple[list[int], list[int]]:
        """The rows, group by group, each group filled up to the length of the longest; and where each row of the batch
        stands among them.
        """
        groups = list(self._groups.values())
        most = max(map(len, groups))
        moved = [row for rows in groups for row in (*rows, *rows[:1] * (most - len(rows)))]
        places = {row: group * most + place for group, rows in enumerate(groups) for place, row in enumerate(rows)}
        return moved, [places[row] for row in range(len(self.names))]

    def _slot_index(self, slots: Mapping[str, int], device: torch.device) -> torch.Tensor:
        """The slot of each row, 0 for none."""
        of_rows = [0 if name is None else slots[name] for name in self.names]
        return self._index(f"slots {of_rows}", of_rows, device)

    def _index(self, what: str, values: Sequence[int], device: torch.device) -> torch.Tensor:
        """Row numbers on a device; copied there once."""
        key = (what, device)
        if key not in self._kept:
            self._kept[key] = torch.tensor(values, dtype=torch.int64, device=device)
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[str, torch.device], torch.Tensor]:
        return {}

    @cached_property
    def _known_ways(self) -> dict[tuple[int | None, ...], tuple[tuple[Run, ...], tuple[Run, ...], list[int]]]:
        return {}

    @cached_property
    def _fewer(self) -> dict[frozenset[str], Rows]:
        return {}

    @cached_property
    def _repeated(self) -> dict[int, Rows]:
        return {}


def _add_runs(y: torch.Tensor, x: torch.Tensor, stacks: Factors, runs: Iterable[Run]) -> None:
    """Add to rows `y (n, t, out)` what the slots of these runs make of `x (n, t, in)`; nothing is copied or moved."""
    down, up = stacks
    for run in runs:
        given, taken = x[run.start : run.stop], y[run.start : run.stop]
        downs, ups = down[run.slots], up.mT[run.slots]
        slots = run.slot_count
        if slots == 1 and x.shape[1] >= down.shape[1]:
            # Row by row it goes faster, unless rows are shorter than the rank.
            slots, downs, ups = run.width, downs.expand(run.width, -1, -1), ups.expand(run.width, -1, -1)
        by_slot = taken.view(run.times, slots, -1, y.shape[-1]), given.reshape(run.times, slots, -1, x.shape[-1])
        for some, its in zip(*map(torch.unbind, by_slot), strict=True):
            _add_products(some, its, downs, ups)


def _add_products(y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> None:
    """`y (k, t, out) += x (k, t, in) down (k, r, in)^T up (k, r, out)`."""
    if len(y) == 1:
        y[0].addmm_(x[0] @ down[0].mT, up[0])
    else:
        y.baddbmm_(_hidden(x, down), up)


def _both(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.bmm(_hidden(x, down), up.mT)


def _hidden(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`x down^T` by `(down x^T)^T`: BLAS takes two thirds of the time where the few rows are those of the left."""
    return torch.bmm(down, x.mT).mT
