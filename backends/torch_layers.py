"""torch's layers with adapters: one wrapper for all methods, with the names that PEFT's modules have.

`<layer>.base_layer` is the layer, and a method's array `lora_A` of the adapter `default` is the parameter
`<layer>.lora_A.default.weight`, or `<layer>.hada_w1_a.default` where a file has no `.weight` behind its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peftarray.backends.torch_arrays import Arrays, Lent
from peftarray.backends.torch_forwarding import Forwarding
from peftarray.backends.torch_fused import fused_output
from peftarray.backends.torch_kept import KeptFactors
from peftarray.backends.torch_kinds import Way, is_packed, way_of, ways
from peftarray.backends.torch_switch import Acting, Switch
from torch import nn
from torch.nn import functional

from peftarray.adapted_weight import AdaptedWeight, adapted
from peftarray.adapter import Adapter
from peftarray.arrays import namespace
from peftarray.composition import Composition, composed
from peftarray.errors import NumberError, UnsupportedError
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.quant.int8 import Int8Rows
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.slots import Factors, padded, slot_update, stack_slots, thin_factors, why_no_slot
from peftarray.stand_in import kind_for
from peftarray.widened import Widened

__all__ = ["AdaptedLayer"]


class AdaptedLayer(Forwarding):
    """A layer with adapters.

    Attributes:
        base_layer: the layer.
        methods: name of an adapter -> its method, and what it knows of the layer.
        switch: says which of them act.
    """

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.switch = switch
        self.methods: dict[str, tuple[AdapterConfig, Layer]] = {}
        self._places: dict[str, tuple[tuple[str, Arrays, str], ...]] = {}
        self._ways: dict[str, Way] = {}
        self._stackable: dict[str, bool] = {}
        self._lent = Lent()
        self._kept = KeptFactors(self._lent)
        self._slot_layer: Layer | None = None

    # What it holds.

    def put(
        self, name: str, adapter: Adapter, shared: Mapping[str, tuple[Arrays, str]], *, is_new: bool = False
    ) -> None:
        """Hold an adapter under a name that is free.

        Args:
            name: of the adapter.
            adapter: with its arrays.
            shared: name of what layers share -> where it is held.
            is_new: nobody else has its arrays.
        """
        # What stands before the layer, as a tied head does, changes nothing of how methods see it.
        own = self.base_layer.behind if isinstance(self.base_layer, Forwarding) else self.base_layer
        way = way_of(own, adapter.config, adapter.layer)
        self.methods[name] = (adapter.config, adapter.layer)
        places: list[tuple[str, Arrays, str]] = []
        for key, row in adapter.config.params(adapter.layer).items():
            if row.shared is not None:
                places.append((key, *shared[row.shared]))
                continue
            stem, _, last = (row.disk or key).partition(".")
            holder = _child(self, stem)
            last, holder = (last, _child(holder, name)) if last else (name, holder)
            holder.put(last, adapter.params[key], row, adapter.trainable)
            places.append((key, holder, last))
        for _, holder, _ in places:
            holder.owned(self._lent, name)
        if not is_new:
            self._lent.lend(name)
        self._places[name] = tuple(places)
        self._ways[name] = way
        self._stackable[name] = way == "apart" and why_no_slot(adapter) is None

    def drop(self, name: str) -> None:
        """Hold an adapter no longer, even one that was put only in part."""
        for stem, holder in list(self._modules.items()):
            if isinstance(holder, Arrays):
                holder.drop(name)
                if not len(holder):
                    del self._modules[stem]
        for table in (self.methods, self._places, self._ways, self._stackable):
            table.pop(name, None)
        self._lent.forget(name)
        self._kept.drop(name)

    def take_slots(self, stacks: Factors) -> None:
        """Hold stacked factors, from which an index chooses those that act."""
        for name, stack in zip(("slot_down", "slot_up"), stacks, strict=True):
            self.register_buffer(name, stack, persistent=False)
        # For the code of a compiler, which must not look at the adapters.
        self._slot_layer = next(iter(self.methods.values()))[1]

    def leave_slots(self) -> None:
        """Hold none any more."""
        del self.slot_down, self.slot_up
        self._slot_layer = None

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name, with the arrays that it has now: they are lent."""
        for _, holder, _ in self._places[name]:
            holder.lend()
        return self.read(name)

    def read(self, name: str) -> Adapter:
        """The same for one who keeps and changes nothing."""
        method, layer = self.methods[name]
        return Adapter(method, layer, {key: holder.read(last) for key, holder, last in self._places[name]})

    def parameters_of(self, name: str) -> list[tuple[dict[str, nn.Parameter | None], str]]:
        """Where that lies which may be trained of an adapter."""
        return [(holder.table_with(last), last) for _, holder, last in self._places[name] if holder.is_parameter(last)]

    # What acts.

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """The layer's output, adapted."""
        now = self.switch.now
        if now.rows is not None:
            return self._by_rows(now, x, arguments, options)
        if now.index is not None:
            y = self.base_layer(x, *arguments, **options)
            assert self._slot_layer is not None
            index = now.index.to(x.device)
            return _plus(y, slot_update(_widened(x), self.slot_down, self.slot_up, index, self._slot_layer))
        return self._acted(self._here(now.names), now.scales, x, arguments, options)

    @property
    def behind(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Any:
        """What stands for the effective weight, for modules that read the weight of another."""
        acting = self._acting_for_all()
        return self.base_layer.weight if acting is None else adapted(acting, self.base_layer.weight)

    @property
    def bias(self) -> Any:
        """The effective bias."""
        acting, base = self._acting_for_all(), getattr(self.base_layer, "bias", None)
        return base if acting is None or base is None else acting.merge_bias(base, self.base_layer.weight)

    def effective(self, names: tuple[str, ...], scales: Mapping[str, float], *, safe: bool) -> dict[str, nn.Parameter]:
        """The layer's own parameters as these adapters make them; none where it has none of them.

        Raises:
            NumberError: one holds NaN or infinity, and `safe`.
        """
        here = self._here(names)
        if here and is_packed(own := self.base_layer, self.methods[here[0]][1]):
            message = (
                f"{self.methods[here[0]][1].name}: this {type(own).__name__} stores its weight packed, so nothing can "
                "be merged into it; run the adapter beside it, or load the model with plain weights"
            )
            raise UnsupportedError(message)
        found = self._effective(self._composed(here, scales)) if here else {}
        for key, array in found.items():
            if safe and not bool(torch.isfinite(array).all()):
                message = (
                    f"the {key} of {self.methods[names[0]][1].name} would hold NaN or infinity after merging; the "
                    "adapter is broken"
                )
                raise NumberError(message)
        return {key: nn.Parameter(array.detach(), requires_grad=False) for key, array in found.items()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={type(method).__name__}" for name, (method, _) in self.methods.items())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": KeptFactors(self._lent)}

    def _here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these adapters that this layer has."""
        return tuple(name for name in names if name in self.methods)

    def _composed(self, names: tuple[str, ...], scales: Mapping[str, float]) -> Adapter | Composition:
        return composed([self.read(name) for name in names], [scales.get(name, 1.0) for name in names])

    def _acting_for_all(self) -> Adapter | Composition | None:
        now = self.switch.now
        if now.rows is not None and any(name in self.methods for name in now.rows.adapters):
            where = next(iter(self.methods.values()))[1].name
            message = (
                f"the model reads the weight of {where} without calling it, and with adapter_names each row has "
                "another; leave that module out of the targets, or run one adapter at a time"
            )
            raise UnsupportedError(message)
        here = self._here(now.names) if now.rows is None else ()
        return self._composed(here, now.scales) if here else None

    def _acted(
        self, names: tuple[str, ...], scales: Mapping[str, float], x: torch.Tensor, arguments: Any, options: Any
    ) -> Any:
        base = self.base_layer
        if not names:
            return base(x, *arguments, **options)
        adapter, way = self._composed(names, scales), ways(self._ways, names)
        drop = functional.dropout if self.training and adapter.drops() else None
        if way == "apart":
            fused = fused_output(base, adapter, x) if drop is None else None
            if fused is not None:
                return fused
            y = base(x, *arguments, **options)
            bias = base.bias if "bias" in adapter.touches() else None
            return _plus(y, adapter.added(_widened(x), bias=bias, drop=drop))
        if way == "instead":
            return adapter.forward(x, base.weight, bias=getattr(base, "bias", None), drop=drop)
        return torch.func.functional_call(base, self._effective(adapter), (x, *arguments), options)

    def _by_rows(self, now: Acting, x: torch.Tensor, arguments: Any, options: Any) -> torch.Tensor:
        assert now.rows is not None
        rows = now.rows.seen_as(self.methods)
        if not rows.adapters:
            return self.base_layer(x, *arguments, **options)
        layer = self.methods[rows.adapters[0]][1]
        rows = rows.of_batch(x.shape[0], layer.name)
        if all(self._stackable[name] for name in rows.adapters) and not self._drop_out(rows.adapters):
            y = self.base_layer(x, *arguments, **options)
            stacks, slots = self._stacks(rows.adapters, now.scales, x)
            if layer.kind == "linear" and _is_free(y, stacks[0]):
                return rows.add_update(y, _widened(x), stacks, slots)
            return _plus(y, rows.update(_widened(x), stacks, slots, layer))

        def run(name: str | None, places: torch.Tensor) -> torch.Tensor:
            return self._acted(
                () if name is None else (name,), now.scales, x.index_select(0, places), arguments, options
            )

        return rows.by_segment(run, x.device)

    def _stacks(
        self, names: tuple[str, ...], scales: Mapping[str, float], x: torch.Tensor
    ) -> tuple[Factors, Mapping[str, int]]:
        """Factors of the adapters of a batch, and their slots in them; kept ones, where no gradient goes through."""
        own = {name: scales.get(name, 1.0) for name in names}
        if not (torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)):
            slots = self._kept.slots(own, self._held, lambda some, rank: self._thin(some, own, rank))
            if slots is not None:
                return self._kept.stacks, slots
        return stack_slots(self._thin(names, own)), {name: slot for slot, name in enumerate(names, start=1)}

    def _held(self, name: str) -> list[tuple[dict[str, Any], str]]:
        """torch's tables that hold an adapter's arrays, and under which names."""
        return [(holder.table_with(last), last) for _, holder, last in self._places[name]]

    def _thin(self, names: Sequence[str], scales: Mapping[str, float], rank: int = 0) -> list[Factors]:
        """Factors of adapters, filled up to the largest rank of them, and to this one."""
        adapters = [self.read(name) for name in names]
        thin = [thin_factors(a, scale=scales[name]) for name, a in zip(names, adapters, strict=True)]
        rank = max(rank, *(down.shape[0] for down, _ in thin))
        pairs = [padded(factors, rank) for factors in thin]
        is_embedding = adapters[0].layer.kind == "embedding"
        return [(down.mT, up) for down, up in pairs] if is_embedding else pairs

    def _drop_out(self, names: Sequence[str]) -> bool:
        """Whether one of these adapters leaves something out now."""
        return self.training and any(self.read(name).drops() for name in names)

    def _effective(self, adapter: Adapter | Composition) -> dict[str, torch.Tensor]:
        touches, base = adapter.touches(), self.base_layer
        found = {}
        if "weight" in touches:
            found["weight"] = adapter.merge(base.weight)
        if "bias" in touches:
            found["bias"] = adapter.merge_bias(base.bias, base.weight).to(base.bias.dtype)
        return found


def _child(parent: nn.Module, name: str) -> Arrays:
    found = parent._modules.get(name)
    if not isinstance(found, Arrays):
        found = Arrays()
        parent.add_module(name, found)
    return found


def _is_free(y: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether what a layer has made may be added to in place."""
    if torch.compiler.is_compiling() or y.requires_grad or other.requires_grad:
        return False
    return y.dtype is other.dtype and y.is_contiguous() and y.numel() > 0


def _plus(y: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    z = y + update
    return z if z.dtype is y.dtype else z.to(y.dtype)


def _prepare_kinds() -> None:
    """Make the kinds of stand-ins over tensors now: torch's compiler does not trace how a class is made."""
    plain, parameter = torch.zeros(1), nn.Parameter(torch.zeros(1))
    for arrays in ((plain,), (parameter,), (plain, parameter), (parameter, plain)):
        for kind in (Widened, AdaptedWeight, QuantisedWeight):
            namespace(object.__new__(kind_for(kind, *arrays)))
    some = torch.zeros((1, 2))
    quantised_weight(Int8Rows(), Int8Rows().quantize(some), (1, 2)).mT.after(some)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """What meets float32 parameters; under autocast, torch does what is needed by itself."""
    short = x.is_floating_point() and x.dtype.itemsize < 4
    return x.float() if short and not torch.is_autocast_enabled(x.device.type) else x


_prepare_kinds()
