"""torch's modules with adapters: `get_peft_model` and `PeftModel.from_pretrained` for a `torch.nn.Module`.

The model's layers are wrapped in place, as PEFT does it, and its state dict has PEFT's names: `base_model.model.`
before the names of the model, `base_layer` and the adapter's name within them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peftarray.backends.torch_acting import refuse_overlap
from peftarray.backends.torch_adalora import Budgeted
from peftarray.backends.torch_arrays import parameters_within
from peftarray.backends.torch_drafts import Draft, load_draft, start_draft
from peftarray.backends.torch_holding import Base, attach, bare, detach, exchange
from peftarray.backends.torch_layers import AdaptedLayer
from peftarray.backends.torch_merging import Swap, form_merged, settle_ties
from peftarray.backends.torch_rows import BASE
from peftarray.backends.torch_saved import SavedModule
from peftarray.backends.torch_slots import Slots
from peftarray.backends.torch_switch import Acting, Switch
from peftarray.backends.torch_tree import own_modules
from peftarray.backends.torch_whole import WholeModel
from torch import nn

from peftarray.combining import Recipe, combine_sets
from peftarray.combining.recipe import scaled_weights
from peftarray.errors import ConfigError
from peftarray.formats.peft_writer import SavedAdapters, save_adapters
from peftarray.method import AdapterConfig

__all__ = ["PeftModule", "adapt_module", "load_module"]


def adapt_module(
    module: nn.Module, config: AdapterConfig, *, seed: int = 0, adapter_name: str = "default"
) -> PeftModule:
    """A module with a new adapter; `peftarray.get_peft_model` says the rest."""
    _refuse_adapted(module)
    return PeftModule(module, start_draft(module, config, seed=seed), adapter_name, trainable=True)


def load_module(
    module: nn.Module, folder: str | Path, *, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModule:
    """A module with the adapter in a folder; `peftarray.PeftModel.from_pretrained` says the rest."""
    _refuse_adapted(module)
    return PeftModule(module, load_draft(module, folder), adapter_name, trainable=is_trainable)


class PeftModule(WholeModel, Budgeted):
    """A module with adapters: it is used like the module, and trained like any other.

    An adapter that is active acts, and its parameters require a gradient if it is trainable; those of the others do
    not. Every verb does its work or changes nothing.

    Attributes:
        base_model: holds the module as `model`, and what layers share.
    """

    holds: ClassVar[tuple[str, ...]] = ("base_model",)

    def __init__(self, module: nn.Module, draft: Draft, adapter_name: str, *, trainable: bool) -> None:
        super().__init__()
        _check_name(adapter_name, ())
        self.base_model = Base(module)
        self.training = module.training
        self._switch = Switch()
        self._slots: Slots | None = None
        self._merged: tuple[Swap, ...] = ()
        self._held = {adapter_name: attach(self.base_model, self._switch, adapter_name, draft, trainable=trainable)}
        for parameter in parameters_within(module):
            parameter.requires_grad_(False)
        self.set_adapter(adapter_name)
        self._show_inputs(inspect.signature(module.forward))

    # Running.

    def forward(self, *arguments: Any, adapter_names: Sequence[str | None] | None = None, **options: Any) -> Any:
        """What the module makes, adapted.

        Args:
            arguments, options: the module's own.
            adapter_names: for each row of the batch the adapter that acts on it; None or `"__base__"` for none.

        Raises:
            MatchError: there is no adapter of a name.
            ShapeError: there are not as many names as rows.
        """
        if adapter_names is None:
            return self.base_model.model(*arguments, **options)
        with self._by_rows(adapter_names, repeats=False):
            return self.base_model.model(*arguments, **options)

    def generate(self, *arguments: Any, adapter_names: Sequence[str | None] | None = None, **options: Any) -> Any:
        """What the module generates; arguments as for `forward`. Beams of a row have its adapter."""
        generate: Any = self.base_model.model.generate
        if adapter_names is None:
            return generate(*arguments, **options)
        with self._by_rows(adapter_names, repeats=True):
            return generate(*arguments, **options)

    @property
    def behind(self) -> nn.Module:
        return self.base_model.model

    def get_base_model(self) -> nn.Module:
        """The module, with its wrapped layers."""
        return self.base_model.model

    # What there is.

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Name of an adapter -> its configuration."""
        return {name: held.config for name, held in self._held.items()}

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are set."""
        return list(self._switch.now.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the one that is set, or those of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def get_adapter(self, adapter_name: str) -> SavedAdapters:
        """An adapter as a value: its configuration, module's name -> its adapter, and what is trained whole."""
        held = self._known(adapter_name)
        lent = {module: layer.adapter(adapter_name) for module, layer in held.layers.items()}
        return replace(held.value(adapter_name), adapters=lent)

    # Coming and going.

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig, *, seed: int = 0) -> None:
        """Add a new adapter beside the others. It does not act before it is set.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`. The module is as it was.
        """
        self._add(adapter_name, lambda root: start_draft(root, peft_config, seed=seed), trainable=True)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, *, allow_unknown: bool = False
    ) -> None:
        """Add the adapter in a folder beside the others. It does not act before it is set.

        Args:
            model_id: the folder.
            adapter_name: a name that is new.
            is_trainable: whether training changes it where it acts.
            allow_unknown: pass over fields of its configuration that are not known here and are set; they are kept.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`. The module is as it was.
        """
        self._add(
            adapter_name, lambda root: load_draft(root, model_id, allow_unknown=allow_unknown), trainable=is_trainable
        )

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        *,
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
    ) -> None:
        """Add the LoRA adapter that stands for several, which stay; it is not active, and not trained.

        Args:
            adapters: names of those to combine, each taken with its scale.
            weights: one for each.
            adapter_name: a name that is new.
            combination_type: one of `peftarray.combining.COMBINATIONS`.
            svd_rank, density, majority_sign_method, seed: as `rank`, `density`, `majority_sign` and `seed` of
                `peftarray.Recipe`.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`. The module is as it was.
        """
        recipe = Recipe(
            combination=combination_type,
            rank=svd_rank,
            density=density,
            majority_sign=majority_sign_method,
            seed=seed,
        )
        scaled = scaled_weights(weights, [self._now.scales.get(name, 1.0) for name in adapters])
        found = [self._known(name).value(name) for name in adapters]

        def make(root: nn.Module) -> Draft:
            own = dict(own_modules(root))
            with torch.no_grad():
                made = combine_sets(found, scaled, recipe, base=lambda name, _: own[name].weight, names=list(adapters))
            return load_draft(root, made.saved)

        self._add(adapter_name, make, trainable=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away, and its memory. Where it was the only one that is set, none is afterwards.

        Raises:
            MatchError: there is none of that name.
        """
        held = self._known(adapter_name)
        self._refuse_merged("delete an adapter")
        now, slots = self._now, None if self._slots is None else self._slots.without(adapter_name)
        active = tuple(name for name in now.active if name != adapter_name)
        scales = {name: scale for name, scale in now.scales.items() if name != adapter_name}
        self._act(replace(now, active=active, scales=scales), slots)
        self._held = {name: other for name, other in self._held.items() if name != adapter_name}
        detach(self.base_model, adapter_name, held.layers, held.saved)

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Give an adapter another name; its parameters stay the same ones.

        Raises:
            MatchError: there is none of that name.
            ConfigError: the new name is taken, or cannot be one.
        """
        held, now = self._known(adapter_name), self._now
        self._refuse_merged("rename an adapter")
        _check_name(new_name, self._held)

        def renamed(name: str) -> str:
            return new_name if name == adapter_name else name

        try:
            again = attach(self.base_model, self._switch, new_name, held.draft(adapter_name), trainable=held.trainable)
        finally:
            held.let_train(held.trainable and adapter_name in now.active)
        again = replace(again, tensors=held.tensors, budget=held.budget)
        slots = None if self._slots is None else self._slots.renamed(adapter_name, new_name)
        scales = {renamed(name): scale for name, scale in now.scales.items()}
        self._held = {renamed(name): again if name == adapter_name else old for name, old in self._held.items()}
        self._act(replace(now, active=tuple(map(renamed, now.active)), scales=scales), slots)
        detach(self.base_model, adapter_name, held.layers, held.saved)

    def hotswap(self, adapter_name: str, source: str | Path | SavedAdapters) -> None:
        """Let another adapter take the place and name of one; it acts if that one does.

        Args:
            adapter_name: of the one that goes.
            source: a folder, or an adapter in memory as `get_adapter` gives it, of which a copy is taken.

        Raises:
            PeftError: of the kind that fits; see `peftarray.errors`. The module is as it was.
        """
        old, now = self._known(adapter_name), self._now
        self._refuse_merged("swap an adapter")
        with self._pristine():
            draft = load_draft(self.base_model.model, source)
            refuse_overlap(now.active, {**self._held, adapter_name: draft})
            factors = None if self._slots is None else self._slots.factors(draft, now.scales.get(adapter_name, 1.0))
            found, wrong = exchange(self.base_model, self._switch, adapter_name, old, draft)
            self._held = {name: found if name == adapter_name else held for name, held in self._held.items()}
            found.let_train(found.trainable and adapter_name in now.active)
        if wrong is not None:
            raise wrong
        if self._slots is not None and factors is not None:
            self._slots.write(adapter_name, factors)

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Write adapters as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        An adapter that is not called `"default"` goes to a folder of its name within the directory.

        Args:
            save_directory: made if it does not exist.
            selected_adapters: names; all of them if None.

        Raises:
            MatchError: there is none of a name.
        """
        chosen = {name: self._known(name) for name in (self._held if selected_adapters is None else selected_adapters)}
        for name, held in chosen.items():
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            whole = {key: parameter.detach() for key, parameter in held.whole(name).items()}
            config, adapters = held.budget.within(held.config, held.adapters(name))
            save_adapters(folder, config, adapters, replace=whole, extra=held.extra)

    # Ends.

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> nn.Module:
        """The module with adapters merged into its weights, in place; nothing of the adapters is left in it.

        Args:
            safe_merge: raise where a merged weight is not finite.
            adapter_names: names; those that are set if None.

        Raises:
            MatchError: there is none of a name.
            NumberError: as `safe_merge` asks.
        """
        self.merge_adapter(adapter_names, safe_merge=safe_merge)
        model = self._left()
        form_merged(model)
        settle_ties(model)
        return model

    def unload(self) -> nn.Module:
        """The module as it was."""
        self._refuse_merged("unload")
        self._act(replace(self._now, active=()))
        return self._left()

    # What the above stand on.

    def _add(self, name: str, make: Callable[[nn.Module], Draft], *, trainable: bool) -> None:
        _check_name(name, self._held)
        self._refuse_merged("add an adapter")
        with self._pristine():
            draft = make(self.base_model.model)
            slots, factors = self._slots, None
            if slots is not None:
                factors, slots = slots.factors(draft, 1.0), slots.with_adapter(name)
            held = attach(self.base_model, self._switch, name, draft, trainable=trainable and slots is None)
        if slots is not None and factors is not None:
            slots.write(name, factors)
        self._held = {**self._held, name: held}
        self._slots = slots

    def _left(self) -> nn.Module:
        """The module without any wrapper; this object has no adapter any more."""
        model = bare(self.base_model.model, self._now.whole)
        for name in self._held:
            self.base_model.drop(name)
        self._held, self._merged, self._slots, self._switch.now = {}, (), None, Acting()
        return model


def _refuse_adapted(module: nn.Module) -> None:
    if any(isinstance(inner, (PeftModule, AdaptedLayer, SavedModule)) for inner in module.modules()):
        message = "the model has an adapter already; use its add_adapter, or unload or merge it first"
        raise ConfigError(message)


def _check_name(name: str, taken: Iterable[str]) -> None:
    is_name = isinstance(name, str) and name.isprintable() and name == name.strip() and name not in ("", BASE)
    if not is_name or any(mark in name for mark in "./\\") or hasattr(nn.Module, name):
        message = (
            f"adapter_name is {name!r}; it must be a name without dots and slashes (a folder and the names of "
            f"parameters are made of it), not {BASE!r}, and none that torch's modules use"
        )
        raise ConfigError(message)
    if name in taken:
        message = f"the model has an adapter {name!r} already; delete it first, or choose another name"
        raise ConfigError(message)
