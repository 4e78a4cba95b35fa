"""The arrays of a torch module's adapters, and whether anybody else may have changed them.

Whoever has an array may write into it, replace it or move it, and to find that out costs a look at each. What nobody
was ever given needs no look: so it is noted who might have been given what.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftarray.method import Param

__all__ = ["Arrays", "Lent", "parameters_within"]


class Lent:
    """The adapters of a layer whose arrays others may have.

    Attributes:
        names: of the adapters.
        changed: those that torch moved or converted since this was last emptied, by whoever keeps what they were.
        times: rises with each change of the two.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.changed: set[str] = set()
        self.times = 0

    def lend(self, name: str) -> None:
        """Note that others may have the arrays of an adapter."""
        if name not in self.names:
            self.names.add(name)
            self.times += 1

    def change(self, name: str) -> None:
        """Note that the arrays of an adapter were changed, and given to nobody."""
        self.changed.add(name)
        self.times += 1

    def forget(self, name: str) -> None:
        """Note that an adapter is gone: one that comes under its name is another."""
        self.names.discard(name)


class Arrays(nn.Module):
    """Arrays by name: parameters where they are trained, buffers where not; or what holds those of each adapter.

    It is read like a dictionary too, as PEFT's are: `layer.lora_A["default"].weight`. Every way in which torch or a
    user gets at an array lends it, and so do torch's own tables of them, since one can be put there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._owners: set[tuple[Lent, str]] = set()

    # Lending.

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        self.lend()
        return vars(self)["_parameters"]

    @_parameters.setter
    def _parameters(self, table: dict[str, nn.Parameter | None]) -> None:
        vars(self)["_parameters"] = table

    @property
    def _buffers(self) -> dict[str, torch.Tensor | None]:
        self.lend()
        return vars(self)["_buffers"]

    @_buffers.setter
    def _buffers(self, table: dict[str, torch.Tensor | None]) -> None:
        vars(self)["_buffers"] = table

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if name in own["_parameters"] or name in own["_buffers"]:
            self.lend()
        return super().__getattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch has it: it moves and converts. Others get no arrays by it."""
        try:
            with self._unlent():
                return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for lent, name in self._owners:
                lent.change(name)

    def lend(self) -> None:
        """Note that others may have the arrays."""
        for lent, name in vars(self).get("_owners", ()):
            lent.lend(name)

    @contextmanager
    def _unlent(self) -> Iterator[None]:
        """Within this, whoever gets at the arrays keeps none."""
        owners, self._owners = self._owners, set()
        try:
            yield
        finally:
            self._owners = owners

    # What it holds.

    def put(self, name: str, array: torch.Tensor, row: Param, trainable: bool) -> None:
        """Hold an array under a name; a parameter stays the one that it is."""
        with self._unlent():
            if row.frozen or not array.is_floating_point():
                self.register_buffer(name, array, persistent=row.stored)
            else:
                parameter = array if isinstance(array, nn.Parameter) else nn.Parameter(array, requires_grad=trainable)
                parameter.requires_grad = trainable
                self.register_parameter(name, parameter)

    def owned(self, lent: Lent, name: str) -> None:
        """From now on, what is lent is noted there, as the array of this adapter."""
        self._owners.add((lent, name))

    def drop(self, name: str) -> None:
        """Hold nothing under a name."""
        for table in self._tables():
            table.pop(name, None)
        self._owners = {(lent, owner) for lent, owner in self._owners if owner != name}

    def read(self, name: str) -> torch.Tensor:
        """An array, for one who keeps and changes nothing."""
        if torch.compiler.is_compiling():
            return getattr(self, name)
        return self.table_with(name)[name]

    def table_with(self, name: str) -> dict[str, Any]:
        """The table of torch that holds an array, for one who keeps and changes nothing of others'."""
        _, parameters, buffers = self._tables()
        return parameters if parameters.get(name) is not None else buffers

    def is_parameter(self, name: str) -> bool:
        """Whether that lies here as a parameter, which can be trained."""
        return name in vars(self)["_parameters"]

    def _tables(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Of modules, parameters and buffers."""
        own = vars(self)
        return own["_modules"], own["_parameters"], own["_buffers"]

    # A dictionary's ways.

    def __getitem__(self, name: str) -> Any:
        for table in self._tables():
            if table.get(name) is not None:
                self.lend()
                return table[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __bool__(self) -> bool:
        return True

    def keys(self) -> list[str]:
        """Names of the adapters, or of an adapter's arrays."""
        return [name for table in self._tables() for name, held in table.items() if held is not None]

    def values(self) -> list[Any]:
        """What is held, in the order of `keys`."""
        return [self[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names, and what is held under them."""
        return [(name, self[name]) for name in self.keys()]

    def extra_repr(self) -> str:
        _, parameters, buffers = self._tables()
        arrays = {**parameters, **buffers}
        return ", ".join(f"{name}={tuple(array.shape)}" for name, array in arrays.items() if array is not None)


def parameters_within(root: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module, each once, for one who keeps none: nothing is lent by it."""
    seen: set[int] = set()
    for module in root.modules():
        for parameter in vars(module)["_parameters"].values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
