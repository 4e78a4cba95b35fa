"""The methods, one file each. `METHODS` maps PEFT's `peft_type` to the class; this is the only list of them."""

from __future__ import annotations

from peftarray.method import AdapterConfig
from peftarray.methods.loha import LoHaConfig
from peftarray.methods.lokr import LoKrConfig
from peftarray.methods.lora import LoraConfig
from peftarray.methods.trainable_tokens import TrainableTokensConfig

__all__ = ["METHODS", "LoHaConfig", "LoKrConfig", "LoraConfig", "TrainableTokensConfig"]

METHODS: dict[str, type[AdapterConfig]] = {
    method.peft_type: method
    for method in (
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        TrainableTokensConfig,
    )
}
