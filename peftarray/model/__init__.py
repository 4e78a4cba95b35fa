"""Whole models with adapters: `PeftModel` over mappings of weights, and what it stands on."""

from peftarray.model.peft_model import PeftModel, get_peft_model
from peftarray.model.prompted import PromptModel

__all__ = ["PeftModel", "PromptModel", "get_peft_model"]
