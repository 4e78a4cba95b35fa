"""The verbs by which adapters come to a model in memory and leave it, and by which they act.

Names and arguments are PEFT's. Each verb makes a new registry and puts it in place at its end, so that one that fails
changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from peftarray import trees
from peftarray.combining.recipe import Recipe, scaled_weights
from peftarray.errors import ConfigError
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.methods.adalora_budget import pruned_adapters
from peftarray.model.bases import weights_of
from peftarray.model.creation import combined, new_adapter
from peftarray.model.registry import AdapterSet, Entry, Loaded, PromptSet, Registry, Shelf
from peftarray.model.saving import check_folder, load_adapter, save_adapter
from peftarray.prompts import Prompt

__all__ = ["AdapterVerbs", "Merged", "Names"]

Names = str | Sequence[str]
"""The name of an adapter, or the names of several."""


class Merged(NamedTuple):
    """Weights that adapters are merged into for the time being.

    Attributes:
        names: of the adapters.
        base: the model with these weights.
    """

    names: tuple[str, ...]
    base: Any


@dataclass(eq=False)
class AdapterVerbs(ABC):
    """A model with adapters by name. Abstract: `PeftModel` is what has the weights.

    Attributes:
        base: the mapping, the nested mappings, or the object with `weights`, as they were given.
        registry: its adapters by name, and which of them act.
        layers: module's name -> its layer, for what the arrays do not say.
        merged_state: what is merged now; None for nothing.
    """

    base: Any
    registry: Registry = field(default_factory=Registry)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    merged_state: Merged | None = None

    @property
    @abstractmethod
    def weights(self) -> Any:
        """The weights under the adapters that act."""

    # What there is.

    @property
    def peft_config(self) -> dict[str, AdapterConfig | Prompt]:
        """Name of an adapter -> its configuration."""
        return {name: entry.settings for name, entry in self.registry.entries.items()}

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they were named."""
        return list(self.registry.active)

    @property
    def active_adapter(self) -> str | None:
        """The first of them; None where there is none."""
        return next(iter(self.registry.active), None)

    def get_adapter(self, name: str) -> Loaded:
        """An adapter with its arrays, which are loaded if need be.

        Raises:
            MatchError: there is none of this name.
        """
        self.registry = self.registry.ready([name], self._shelf)
        return self.registry.found(name)

    # Which there are.

    def add_adapter(self, adapter_name: str, peft_config: AdapterConfig | Prompt, *, seed: int = 0) -> None:
        """Add a new adapter, which is active if it is the first.

        Args:
            adapter_name: a name that is new.
            peft_config: a method with `target_modules`, or a soft prompt for a model of `peftarray.models`.
            seed: the same seed gives the same adapter on every library.

        Raises:
            PeftError: of the kind that fits.
        """
        self.registry.check_new(adapter_name)
        self._add(adapter_name, Entry(new_adapter(self.base, peft_config, seed=seed, layers=self.layers)))

    def load_adapter(
        self,
        folder: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        lazy: bool = False,
        allow_unknown: bool = False,
    ) -> None:
        """Add the adapter in a folder that PEFT or `save_pretrained` wrote; it is active if it is the first.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name: a name that is new.
            is_trainable: whether training changes it.
            lazy: read its configuration and what its files hold now, and its arrays when it is first used.
            allow_unknown: pass over fields of its configuration that are not known here and are set; they are kept.

        Raises:
            PeftError: of the kind that fits.
        """
        self.registry.check_new(adapter_name)
        place = Path(folder).absolute()
        if lazy and self.registry.active:
            config = check_folder(place, allow_unknown=allow_unknown)
            entry = Entry(None, folder=place, trainable=is_trainable, config=config)
        else:
            found = load_adapter(
                self.base, place, layers=self.layers, trainable=is_trainable, allow_unknown=allow_unknown
            )
            entry = Entry(found, folder=place, trainable=is_trainable)
        self._add(adapter_name, replace(entry, lenient=allow_unknown))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Other active ones stay active; where it was the only one, none is."""
        self._refuse_merged("delete_adapter")
        self.registry = self.registry.without(adapter_name)

    def rename_adapter(self, old_name: str, new_name: str) -> None:
        """Call an adapter by another name, which is new."""
        self._refuse_merged("rename_adapter")
        self.registry = self.registry.renamed(old_name, new_name)

    def hotswap(self, adapter_name: str, source: str | Path | Loaded) -> None:
        """Put another adapter in the place of one, under its name and with its scale, active or not as it was.

        Args:
            adapter_name: the one to replace.
            source: a folder, or an adapter from `get_adapter`.

        Raises:
            PeftError: the new one cannot be loaded, or cannot act with the others that are active.
        """
        self._refuse_merged("hotswap")
        entry, folder = self.registry.entry(adapter_name), None
        if isinstance(source, (AdapterSet, PromptSet)):
            found: Loaded = source
        else:
            folder = Path(source).absolute()
            found = load_adapter(self.base, folder, layers=self.layers, trainable=entry.trainable)
        new = replace(entry, found=found, folder=folder, trainable=found.trainable, hosted=False)
        changed = self.registry.replaced(adapter_name, new).scaled(adapter_name, entry.scale)
        if adapter_name in changed.active:
            changed = changed.activated(changed.active, self._shelf)
        self.registry = changed.fitted([adapter_name], self._shelf)

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
            UnsupportedError: one of them is a prompt, or cannot be combined.
            PeftError: of the kind that fits.
        """
        self.registry.check_new(adapter_name)
        recipe = Recipe(
            combination=combination_type,
            rank=svd_rank,
            density=density,
            majority_sign=majority_sign_method,
            seed=seed,
        )
        ready = self.registry.ready(adapters, self._shelf)
        scaled = scaled_weights(weights, [ready.entry(name).scale for name in adapters])
        made = combined({name: ready.found(name) for name in adapters}, scaled, recipe, weights_of(self.base))
        self.registry = ready.with_new(adapter_name, Entry(made)).fitted([adapter_name], self._shelf)

    def set_capacity(self, capacity: int | None, folder: str | Path | None = None) -> None:
        """Keep so many adapters in memory at most, the active ones and those of a batch always among them.

        An adapter that was not used for the longest time leaves first, and comes back when it is used. What no file
        holds, or training may have changed, is written to `folder`, or moved to the host's memory where there is none.

        Args:
            capacity: at least 1; None for all.
            folder: for adapters that no file holds.
        """
        place = None if folder is None else Path(folder).absolute()
        self.registry = self.registry.limited(capacity, place, self._shelf)

    # Which act.

    def set_adapter(self, adapter_name: Names) -> None:
        """Let one adapter act, or several together (`peftarray.composition` says how).

        Raises:
            MatchError: there is none of a name.
            UnsupportedError: they cannot act together.
        """
        self._refuse_merged("set_adapter")
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.registry = self.registry.activated(names, self._shelf)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply an adapter's update by a number, besides the method's own scale."""
        self._refuse_merged("set_scale")
        self.registry = self.registry.scaled(adapter_name, scale)

    def disable_adapters(self) -> None:
        """Let no adapter act until `enable_adapters`."""
        self.registry = replace(self.registry, enabled=False)

    def enable_adapters(self) -> None:
        """Let the active adapters act again."""
        self.registry = replace(self.registry, enabled=True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it no adapter acts."""
        before = self.registry.enabled
        self.disable_adapters()
        try:
            yield
        finally:
            self.registry = replace(self.registry, enabled=before)

    def prune(self, keep: Mapping[str, Sequence[bool]]) -> Self:
        """The same model with only these triples of its active AdaLoRA adapter, such as an `AdaLoraBudget`'s.

        Raises:
            ConfigError: none is active, or several adapters are.
        """
        names = self.registry.active
        found = self.registry.found(names[0]) if len(names) == 1 else None
        if not isinstance(found, AdapterSet):
            message = f"the active adapters are {list(names)}; make one AdaLoRA adapter active, and prune it"
            raise ConfigError(message)
        config, adapters = pruned_adapters(found.config, found.adapters, keep)
        return replace(self, registry=self.registry.changed(names[0], replace(found, config=config, adapters=adapters)))

    # What the above stand on.

    @property
    def _shelf(self) -> Shelf:
        def load(folder: Path, entry: Entry) -> Loaded:
            return load_adapter(
                self.base, folder, layers=self.layers, trainable=entry.trainable, allow_unknown=entry.lenient
            )

        return Shelf(load, save_adapter, lambda: trees.leaves(weights_of(self.base))[0])

    def _add(self, name: str, entry: Entry) -> None:
        changed = self.registry.with_new(name, entry)
        if not changed.active and self.merged_state is None:
            changed = changed.activated([name], self._shelf)
        self.registry = changed.fitted([name], self._shelf)

    def _refuse_merged(self, verb: str) -> None:
        if self.merged_state is not None:
            names = ", ".join(self.merged_state.names)
            message = f"{names} is merged into the weights now; unmerge_adapter() before {verb}"
            raise ConfigError(message)
