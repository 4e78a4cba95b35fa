"""Which adapters of a torch module act, and how: set, scaled, switched off, named row by row, in slots, merged in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from peftarray.backends.torch_drafts import Draft
from peftarray.backends.torch_forwarding import Forwarding
from peftarray.backends.torch_holding import Base, Held
from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_merging import Swap, effective_tensors
from peftarray.backends.torch_rows import Rows
from peftarray.backends.torch_slots import Slots
from peftarray.backends.torch_switch import Acting, Switch
from peftarray.backends.torch_tree import own_module, own_modules
from torch import nn

from peftarray.arrays import Array
from peftarray.errors import ConfigError, MatchError, UnsupportedError
from peftarray.model.status import Status, layer_status

__all__ = ["ActingModule", "refuse_overlap"]


class ActingModule(Forwarding):
    """A module whose adapters act, or do not. Abstract: how it gets them is `PeftModule`'s.

    Attributes:
        base_model: holds the module as `model`, and what layers share.
    """

    base_model: Base
    _switch: Switch
    _slots: Slots | None
    _merged: tuple[Swap, ...]
    _held: dict[str, Held]

    def status(self, *, norms: bool = True) -> Status:
        """What adapters there are, layer by layer; with the norm of each update unless `norms` is false."""
        now, items = self._now, []
        with torch.no_grad():
            for name, held in self._held.items():
                for module, layer in held.layers.items():
                    items.append(
                        layer_status(
                            layer.read(name),
                            name=name,
                            layer=module,
                            weight=self._own_weight(layer) if norms else None,
                            scale=now.scales.get(name, 1.0),
                            active=name in now.active and now.enabled,
                            merged=name in now.merged,
                            trainable=held.trainable,
                        )
                    )
        return Status(tuple(items))

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let one adapter act, or several: the sum of their updates, each of the frozen weights.

        Raises:
            MatchError: there is none of a name.
            ConfigError: two of them replace the same tensor.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        if not names or len(set(names)) != len(names):
            message = f"set_adapter got {list(names)}; give one name or several different ones, or disable_adapter()"
            raise ConfigError(message)
        for name in names:
            self._known(name)
        self._refuse_merged("set another adapter")
        refuse_overlap(names, self._held)
        if self._slots is not None and len(names) > 1:
            message = f"set_adapter got {list(names)}, and in slots one adapter acts; release_slots() first"
            raise UnsupportedError(message)
        self._act(replace(self._now, active=names))

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let an adapter's update be multiplied by a number, on top of its own scale; 1 is as it comes.

        Raises:
            MatchError: there is no adapter of that name.
            ConfigError: the scale is no finite number.
        """
        held = self._known(adapter_name)
        self._refuse_merged("change a scale")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            message = f"the scale of {adapter_name} is {scale!r}; it must be a finite number"
            raise ConfigError(message)
        factors = None if self._slots is None else self._slots.factors(held.draft(adapter_name), scale)
        others = {name: value for name, value in self._now.scales.items() if name != adapter_name}
        self._act(replace(self._now, scales=others if scale == 1 else {**others, adapter_name: float(scale)}))
        if self._slots is not None and factors is not None:
            self._slots.write(adapter_name, factors)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this, the module is the one without adapters."""
        enabled = self._now.enabled
        self.disable_adapters()
        try:
            yield
        finally:
            self._act(replace(self._now, enabled=enabled))

    def disable_adapters(self) -> None:
        """Let no adapter act until `enable_adapters`."""
        self._refuse_merged("disable adapters")
        self._act(replace(self._now, enabled=False))

    def enable_adapters(self) -> None:
        """Let the adapters that are set act again."""
        self._refuse_merged("enable adapters")
        self._act(replace(self._now, enabled=True))

    def freeze(self) -> Self:
        """Let training change nothing."""
        return self._set_trained(False)

    def unfreeze(self) -> Self:
        """Let training change the adapters that are set."""
        if self._slots is not None:
            message = "the layers have slots, which hold copies of what would be trained; release_slots() first"
            raise UnsupportedError(message)
        return self._set_trained(True)

    # Slots.

    def prepare_slots(self, *, max_rank: int, count: int) -> None:
        """Put the adapters into slots of one shape, so that a compiled module goes on as it is when another one acts,
        is loaded or swapped in. For inference: the adapters are frozen, and what changes in their parameters is not
        seen until slots are prepared anew.

        Args:
            max_rank: of all adapters, those to come too.
            count: how many adapters there may be.

        Raises:
            ConfigError: the adapters do not fit in.
            UnsupportedError: one of them cannot be put into slots, or several act.
        """
        self._refuse_merged("prepare slots")
        if len(self._now.active) > 1:
            message = f"{list(self._now.active)} act together, and in slots one adapter acts; set one first"
            raise UnsupportedError(message)
        layers = {path: layer for held in self._held.values() for path, layer in held.layers.items()}
        drafts = {name: held.draft(name) for name, held in self._held.items()}
        slots = Slots.prepared(drafts, layers, self._now.scales, rank=max_rank, count=count)
        for held in self._held.values():
            held.let_train(False)
        self._held = {name: replace(held, trainable=False) for name, held in self._held.items()}
        self._act(self._now, slots)

    def release_slots(self) -> None:
        """Take adapters out of their slots again."""
        slots, self._slots = self._slots, None
        self._act(self._now)
        if slots is not None:
            slots.release()

    # Merging.

    @contextmanager
    def merged(self, *adapter_names: str, safe_merge: bool = False) -> Iterator[Self]:
        """Within this, the layers' own weights hold these adapters, or those that are set; afterwards the very same
        tensors as before are there.
        """
        self.merge_adapter(adapter_names or None, safe_merge=safe_merge)
        try:
            yield self
        finally:
            self.unmerge_adapter()

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the layers' own weights; their own are kept aside.

        Args:
            adapter_names: names; those that are set if None.
            safe_merge: raise where a merged weight is not finite.

        Raises:
            MatchError: there is none of a name.
            NumberError: as `safe_merge` asks.
        """
        self._refuse_merged("merge")
        before = self._now
        names = before.active if adapter_names is None else tuple(adapter_names)
        layers = [layer for name in names for layer in self._known(name).layers.values()]
        refuse_overlap(names, self._held)
        done: list[Swap] = []
        try:
            self._act(replace(before, merged=names))
            swaps = effective_tensors(self.base_model.model, layers, names, before.scales, safe=safe_merge)
            for swap in swaps:
                done.append(swap)
                swap.merge()
        except BaseException:
            _take_out(done)
            self._act(before)
            raise
        self._merged = swaps

    def unmerge_adapter(self) -> None:
        """Put the layers' own weights back, the very same tensors.

        Raises:
            ConfigError: nothing is merged.
        """
        if not self._now.merged:
            message = "no adapter is merged; merge_adapter() merges those that are set"
            raise ConfigError(message)
        _take_out(self._merged)
        self._merged = ()
        self._act(replace(self._now, merged=()))

    # What the above stand on.

    @property
    def _now(self) -> Acting:
        return self._switch.now

    def _known(self, name: str) -> Held:
        if name not in self._held:
            message = f"the model has no adapter {name!r}; it has {', '.join(self._held) or 'none'}"
            raise MatchError(message)
        return self._held[name]

    def _act(self, now: Acting, slots: Slots | None = None) -> None:
        """Let this act from now on: gradients, tensors in their places, and the state that all layers read."""
        slots, before = slots or self._slots, self._now
        index = None if slots is None else slots.index(now.names)
        for name in before.active:
            if name not in now.active and name in self._held and self._held[name].trainable:
                self._held[name].let_train(False)
        for name in now.active:
            if name not in before.active and self._held[name].trainable:
                self._held[name].let_train(True)
        self._slots = slots
        self._switch.now = replace(now, index=index)
        self._show(now.whole)

    def _show(self, names: tuple[str, ...]) -> None:
        """Let tensors that these adapters replace be in their places, and the model's own in all others."""
        for held in self._held.values():
            for places in held.tensors.values():
                for place in places:
                    place.show(place.own)
        for name in names:
            for places in self._held[name].tensors.values() if name in self._held else ():
                for place in places:
                    place.show(place.its)

    @contextmanager
    def _pristine(self) -> Iterator[None]:
        """Within this, the model's own tensors are in their places."""
        self._show(())
        try:
            yield
        finally:
            self._show(self._now.whole)

    @contextmanager
    def _by_rows(self, names: Sequence[str | None], *, repeats: bool) -> Iterator[None]:
        """Within this, each row of a batch has its adapter."""
        now, rows = self._now, Rows.named(names, self._held, repeats=repeats)
        self._refuse_merged("name the adapters of rows")
        if not now.enabled:
            message = "adapters are disabled, and adapter_names names some; enable them, or leave the names out"
            raise ConfigError(message)
        whole = [name for name in rows.adapters if self._held[name].tensors]
        if whole:
            message = f"{whole[0]} replaces tensors of the model, such as biases, for a whole batch; run it by itself"
            raise UnsupportedError(message)
        if self.training and torch.is_grad_enabled() and _checkpoints(self.behind):
            message = (
                "with gradient checkpointing, layers run again when the names of the rows are gone; turn one of both "
                "off (gradient_checkpointing_disable())"
            )
            raise UnsupportedError(message)
        slots = self._slots
        index = None if slots is None else slots.index(rows.names)
        self._switch.now = replace(now, rows=rows if slots is None else None, index=index)
        self._show(())
        try:
            yield
        finally:
            self._switch.now = now
            self._show(now.whole)

    def _own_weight(self, layer: AdaptedLayer) -> Array:
        """The weight that a layer came with, also while another is merged into its place."""
        own: Any = own_module(layer)
        kept = (swap.own for swap in self._merged if swap.module is own and swap.key == "weight")
        weight = next(kept, own.weight)
        return own.quantised if weight is None else weight

    def _refuse_merged(self, what: str) -> None:
        if self._now.merged:
            message = f"{', '.join(self._now.merged)} is merged; unmerge_adapter() before you {what}"
            raise ConfigError(message)

    def _set_trained(self, trainable: bool) -> Self:
        for name in self._now.active:
            held = replace(self._held[name], trainable=trainable)
            held.let_train(trainable)
            self._held = {**self._held, name: held}
        return self


def _checkpoints(model: nn.Module) -> bool:
    """Whether a model of transformers keeps no activations."""
    return any(getattr(module, "gradient_checkpointing", False) is True for _, module in own_modules(model))


def _take_out(swaps: Sequence[Swap]) -> None:
    for swap in reversed(swaps):
        swap.unmerge()


def refuse_overlap(names: Sequence[str], held: Mapping[str, Held | Draft]) -> None:
    """Refuse adapters that cannot act together."""
    owners: dict[str, str] = {}
    for name in names:
        for tensor in (*held[name].saved, *held[name].tensors):
            if tensor in owners:
                message = f"{owners[tensor]} and {name} both bring {tensor} whole, so they cannot act together; set one"
                raise UnsupportedError(message)
            owners[tensor] = name
