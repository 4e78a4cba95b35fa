"""The adapters of a model by name: which act, what each is multiplied by, and which of them memory holds.

A `Registry` is a value. Each of its verbs returns a new one, so that whoever holds a registry and replaces it in one
assignment is never left with half a change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftarray.acting import check_together
from peftarray.adapter_sets import AdapterSet, Loaded, PromptSet
from peftarray.arrays import Array, device, is_short, namespace, to_host
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.method import AdapterConfig
from peftarray.prompts import Prompt

__all__ = ["BASE_NAME", "AdapterSet", "Entry", "Loaded", "PromptSet", "Registry", "Shelf"]

BASE_NAME = "__base__"
"""PEFT's name for no adapter, in the names of a batch."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What a registry knows of one adapter.

    Attributes:
        found: the adapter; None where only its folder holds it.
        scale: what its update is multiplied by.
        folder: where a file holds these very arrays; None where none does.
        trainable: whether it is trained, once it is loaded.
        hosted: whether its arrays were moved to the host's memory.
        config: its configuration, where `found` is None.
        lenient: whether its folder may have fields that are not known here.
    """

    found: Loaded | None
    scale: float = 1.0
    folder: Path | None = None
    trainable: bool = False
    hosted: bool = False
    config: AdapterConfig | Prompt | None = None
    lenient: bool = False

    @property
    def settings(self) -> AdapterConfig | Prompt:
        """Its configuration."""
        settings = self.config if self.found is None else self.found.config
        assert settings is not None
        return settings

    @property
    def in_memory(self) -> bool:
        """Whether its arrays lie where the model's do."""
        return self.found is not None and not self.hosted


@dataclass(frozen=True)
class Shelf:
    """How adapters leave memory and come back; made by who knows the model.

    Attributes:
        load: a folder, and what is known of the adapter -> the adapter in it.
        save: a folder, an adapter -> nothing; writes it.
        like: gives an array of the model, beside which arrays are placed.
    """

    load: Callable[[Path, Entry], Loaded]
    save: Callable[[Path, Loaded], None]
    like: Callable[[], Array]


@dataclass(frozen=True, eq=False)
class Registry:
    """Adapters by name. A value.

    Attributes:
        entries: name -> what is known of the adapter.
        active: the names of those that act, in the order in which they were named.
        enabled: whether the active ones do act.
        capacity: how many adapters stay in memory beside the model; None for all.
        spill: the folder that adapters go to which no file holds; None for the host's memory.
        recent: names in the order of their last use, kept where there is a capacity.

    Example:
        >>> Registry().with_new("a", Entry(None)).renamed("a", "b").entries["b"].scale
        1.0
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    capacity: int | None = None
    spill: Path | None = None
    recent: tuple[str, ...] = ()

    # Names.

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """What is known of an adapter.

        Raises:
            MatchError: there is none of this name.
        """
        try:
            return self.entries[name]
        except (KeyError, TypeError):
            message = (
                f"there is no adapter {name!r}{nearest(str(name), self.entries)}; there are {_listed(self.entries)}"
            )
            raise MatchError(message) from None

    def found(self, name: str) -> Loaded:
        """The adapter of a name, which memory holds."""
        found = self.entry(name).found
        assert found is not None
        return found

    @property
    def acting(self) -> tuple[str, ...]:
        """The names of the adapters that act now."""
        return self.active if self.enabled else ()

    def with_new(self, name: str, entry: Entry) -> Registry:
        """With one more adapter.

        Raises:
            ConfigError: the name is taken, or cannot be one.
        """
        self.check_new(name)
        return replace(self, entries={**self.entries, name: entry}, recent=self._used([name]))

    def without(self, name: str) -> Registry:
        """Without an adapter; if it was active, the other active ones remain."""
        self.entry(name)
        return replace(
            self,
            entries={other: entry for other, entry in self.entries.items() if other != name},
            active=tuple(other for other in self.active if other != name),
            recent=tuple(other for other in self.recent if other != name),
        )

    def renamed(self, old: str, new: str) -> Registry:
        """With another name for an adapter, in the same place."""
        self.entry(old)
        self.check_new(new)

        def name(known: str) -> str:
            return new if known == old else known

        return replace(
            self,
            entries={name(known): entry for known, entry in self.entries.items()},
            active=tuple(map(name, self.active)),
            recent=tuple(map(name, self.recent)),
        )

    def scaled(self, name: str, scale: float) -> Registry:
        """With another factor for an adapter's update.

        Raises:
            ConfigError: it is no finite number.
            UnsupportedError: the adapter is a prompt.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            message = f"the scale of {name} is {scale!r}; give a finite number"
            raise ConfigError(message)
        entry = self.entry(name)
        if isinstance(entry.settings, Prompt) and scale != 1:
            message = f"{name} is a prompt, which is read or not and has no scale; leave it at 1"
            raise UnsupportedError(message)
        return self.replaced(name, replace(entry, scale=float(scale)))

    def replaced(self, name: str, entry: Entry) -> Registry:
        """With something else known of an adapter."""
        self.entry(name)
        return replace(self, entries={**self.entries, name: entry})

    def changed(self, name: str, found: Loaded) -> Registry:
        """With other arrays in an adapter, which then no file holds."""
        entry = replace(self.entry(name), found=found, folder=None, trainable=found.trainable, hosted=False)
        return self.replaced(name, entry)

    # What acts.

    def activated(self, names: Sequence[str], shelf: Shelf) -> Registry:
        """With these adapters active, and in memory.

        Raises:
            ConfigError: none is named, or one twice.
            MatchError: a name is unknown.
            UnsupportedError: two of them cannot act together.
        """
        if not names or len(set(names)) != len(names):
            message = (
                f"the active adapters are {list(names)}; name at least one, and each once (disable_adapter for none)"
            )
            raise ConfigError(message)
        for name in names:
            self.entry(name)
        ready = replace(self, active=tuple(names)).ready(names, shelf)
        if len(names) > 1:
            check_together({name: ready.found(name) for name in names})
        return ready

    def ready(self, names: Iterable[str], shelf: Shelf) -> Registry:
        """With these adapters in memory, and others out of it where there is a capacity."""
        wanted = list(names)
        new = {}
        for name in wanted:
            entry = self.entry(name)
            if entry.found is None:
                assert entry.folder is not None
                new[name] = replace(entry, found=shelf.load(entry.folder, entry), hosted=False)
            elif entry.hosted:
                new[name] = replace(entry, found=entry.found.moved(_placing(shelf.like())), hosted=False)
        if not new and self.capacity is None:
            return self
        changed = replace(self, entries={**self.entries, **new} if new else self.entries, recent=self._used(wanted))
        return changed.fitted(wanted, shelf)

    def limited(self, capacity: int | None, spill: Path | None, shelf: Shelf) -> Registry:
        """With another capacity.

        Raises:
            ConfigError: it is less than 1.
        """
        if capacity is not None and (type(capacity) is not int or capacity < 1):
            message = f"the capacity is {capacity!r}; it must be at least 1 adapter, or None for all"
            raise ConfigError(message)
        known = [*self.recent, *(name for name in self.entries if name not in self.recent)]
        changed = replace(self, capacity=capacity, spill=spill, recent=tuple(known) if capacity else ())
        return changed.fitted((), shelf)

    def fitted(self, names: Iterable[str], shelf: Shelf) -> Registry:
        """With the adapters out of memory that were not used for the longest time, so that the capacity is kept.

        These names and the active ones stay. An adapter whose arrays a file holds, and that training does not change,
        is dropped; any other is written to `spill`, or else moved to the host's memory.
        """
        if self.capacity is None:
            return self
        kept = {*names, *self.active}
        inside = [name for name in self.recent if self.entries[name].in_memory]
        gone = [name for name in inside if name not in kept][: max(0, len(inside) - self.capacity)]
        entries = dict(self.entries)
        for name in gone:
            entry = entries[name]
            found = entry.found
            assert found is not None
            if entry.folder is not None and not found.trainable:
                entries[name] = replace(entry, found=None, config=found.config)
            elif self.spill is not None and found.restorable():
                folder = _free(self.spill, name, entries)
                shelf.save(folder, found)
                entries[name] = replace(
                    entry, found=None, folder=folder, trainable=found.trainable, config=found.config
                )
            else:
                entries[name] = replace(entry, found=found.moved(_hosted), hosted=True)
        return replace(self, entries=entries) if gone else self

    def check_new(self, name: str) -> None:
        """Refuse what cannot be the name of one more adapter.

        Raises:
            ConfigError: it is taken, or no name.
        """
        taken = name in self.entries if isinstance(name, str) else False
        is_name = isinstance(name, str) and name.isprintable() and name == name.strip() and name not in ("", "..")
        if taken or not is_name or name == BASE_NAME or any(mark in name for mark in "./\\"):
            reason = "is taken" if taken else "cannot be the name of an adapter"
            message = (
                f"{name!r} {reason}; give one that is new, without dots and slashes, and not {BASE_NAME!r} (a folder "
                "and the names of parameters are made of it)"
            )
            raise ConfigError(message)

    def _used(self, names: Iterable[str]) -> tuple[str, ...]:
        if self.capacity is None:
            return ()
        last = dict.fromkeys(names)
        return (*(name for name in self.recent if name not in last), *last)


def _free(spill: Path, name: str, entries: Mapping[str, Entry]) -> Path:
    """A folder for an adapter that no other one lies in, which may have had its name."""
    taken = {entry.folder for other, entry in entries.items() if other != name}
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(spill / own for own in names if spill / own not in taken)


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    return (", ".join(known[:8]) + (" ..." if len(known) > 8 else "")) or "none"


def _hosted(array: Array) -> Array:
    """The array in the host's memory; as it is where NumPy lacks its dtype."""
    return array if is_short(array) else to_host(array)


def _placing(like: Array) -> Callable[[Array], Array]:
    def place(array: Array) -> Array:
        return array if is_short(array) else namespace(like).asarray(array, device=device(like))

    return place
