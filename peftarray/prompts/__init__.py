"""The soft prompts, one a file: `PROMPTS` lists them."""

from __future__ import annotations

from peftarray.prompts.adaption_prompt import AdaptionPromptConfig
from peftarray.prompts.cpt import CPTConfig
from peftarray.prompts.host import Host
from peftarray.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftarray.prompts.p_tuning import PromptEncoderConfig
from peftarray.prompts.prefix_tuning import PrefixTuningConfig
from peftarray.prompts.prompt import Prompt, TokenPrompt, VirtualTokens
from peftarray.prompts.prompt_tuning import PromptTuningConfig

__all__ = [
    "PROMPTS",
    "AdaptionPromptConfig",
    "CPTConfig",
    "Host",
    "MultitaskPromptTuningConfig",
    "PrefixTuningConfig",
    "Prompt",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "TokenPrompt",
    "VirtualTokens",
]

PROMPTS: dict[str, type[Prompt]] = {
    kind.peft_type: kind
    for kind in (
        AdaptionPromptConfig,
        CPTConfig,
        MultitaskPromptTuningConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
    )
}
"""`peft_type` -> class."""
