"""The methods, one file each. `METHODS` maps PEFT's `peft_type` to the class; this is the only list of them."""

from __future__ import annotations

from peftarray.method import AdapterConfig
from peftarray.methods.adalora import AdaLoraConfig
from peftarray.methods.boft import BOFTConfig
from peftarray.methods.ia3 import IA3Config
from peftarray.methods.loha import LoHaConfig
from peftarray.methods.lokr import LoKrConfig
from peftarray.methods.lora import LoraConfig
from peftarray.methods.oft import OFTConfig
from peftarray.methods.trainable_tokens import TrainableTokensConfig
from peftarray.methods.vera import VeraConfig

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "BOFTConfig",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "OFTConfig",
    "TrainableTokensConfig",
    "VeraConfig",
]

METHODS: dict[str, type[AdapterConfig]] = {
    method.peft_type: method
    for method in (
        AdaLoraConfig,
        BOFTConfig,
        IA3Config,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        OFTConfig,
        TrainableTokensConfig,
        VeraConfig,
    )
}
