"""The methods, one file each. `METHODS` maps PEFT's `peft_type` to the class; this is the only list of them.

A class is imported when it is first asked for. Other packages bring methods of their own by the entry points of the
group `peftarray.methods`, each named by its `peft_type`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftarray.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from peftarray.method import AdapterConfig
    from peftarray.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from peftarray.methods.boft import BOFTConfig as BOFTConfig
    from peftarray.methods.ia3 import IA3Config as IA3Config
    from peftarray.methods.loha import LoHaConfig as LoHaConfig
    from peftarray.methods.lokr import LoKrConfig as LoKrConfig
    from peftarray.methods.lora import LoraConfig as LoraConfig
    from peftarray.methods.oft import OFTConfig as OFTConfig
    from peftarray.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from peftarray.methods.vera import VeraConfig as VeraConfig

_OWN = {
    "ADALORA": ("adalora", "AdaLoraConfig"),
    "BOFT": ("boft", "BOFTConfig"),
    "IA3": ("ia3", "IA3Config"),
    "LOHA": ("loha", "LoHaConfig"),
    "LOKR": ("lokr", "LoKrConfig"),
    "LORA": ("lora", "LoraConfig"),
    "OFT": ("oft", "OFTConfig"),
    "TRAINABLE_TOKENS": ("trainable_tokens", "TrainableTokensConfig"),
    "VERA": ("vera", "VeraConfig"),
}
_HOME = {name: module for module, name in _OWN.values()}

__all__ = ["METHODS", *sorted(_HOME)]


class _Methods(Mapping[str, "type[AdapterConfig]"]):
    """`peft_type` -> class: those of this package, then those that installed packages announce."""

    def __getitem__(self, kind: str) -> type[AdapterConfig]:
        if kind in _OWN:
            module, name = _OWN[kind]
            return getattr(import_module(f"peftarray.methods.{module}"), name)
        found = self._announced().get(kind)
        if found is None:
            raise KeyError(kind)
        try:
            method = found.load()
        except (ImportError, AttributeError) as error:
            message = (
                f"peft_type {kind}: {found.value}, which an installed package announces, cannot be imported: {error}"
            )
            raise ConfigError(message) from None
        if getattr(method, "peft_type", None) != kind:
            message = (
                f"the entry point {kind} of the group peftarray.methods names {found.value}, whose peft_type is "
                f"{getattr(method, 'peft_type', None)!r}; both must be the same"
            )
            raise ConfigError(message)
        return method

    def __contains__(self, kind: object) -> bool:
        return kind in _OWN or kind in self._announced()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*_OWN, *self._announced()}))

    def __len__(self) -> int:
        return len({*_OWN, *self._announced()})

    @staticmethod
    def _announced() -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points  # takes longer than planning a merge

        return {point.name: point for point in entry_points(group="peftarray.methods")}


METHODS: Mapping[str, type[AdapterConfig]] = _Methods()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        message = f"module 'peftarray.methods' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"peftarray.methods.{_HOME[name]}"), name)
