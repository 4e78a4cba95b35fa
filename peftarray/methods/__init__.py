"""The methods, one file each. `METHODS` maps PEFT's `peft_type` to the class; this is the only list of them."""

from __future__ import annotations

from peftarray.method import AdapterConfig
from peftarray.methods.boft import BOFTConfig
from peftarray.methods.loha import LoHaConfig
from peftarray.methods.lokr import LoKrConfig
from peftarray.methods.lora import LoraConfig
from peftarray.methods.oft import OFTConfig
from peftarray.methods.trainable_tokens import TrainableTokensConfig

__all__ = ["METHODS", "BOFTConfig", "LoHaConfig", "LoKrConfig", "LoraConfig", "OFTConfig", "TrainableTokensConfig"]

METHODS: dict[str, type[AdapterConfig]] = {
    method.peft_type: method
    for method in (
        BOFTConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        OFTConfig,
        TrainableTokensConfig,
    )
}
