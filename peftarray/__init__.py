"""Parameter-efficient fine-tuning methods for every array library, and merging of adapter weights without torch.

Names are looked up when they are first used, so that `import peftarray` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftarray import models as models
    from peftarray.adapted_weight import AdaptedWeight as AdaptedWeight
    from peftarray.adapter import Adapter as Adapter
    from peftarray.combining import CombinedAdapters as CombinedAdapters
    from peftarray.combining import CombineReport as CombineReport
    from peftarray.combining import LoraFit as LoraFit
    from peftarray.combining import Recipe as Recipe
    from peftarray.combining import combine as combine
    from peftarray.combining import combine_folders as combine_folders
    from peftarray.combining import combine_sets as combine_sets
    from peftarray.combining import to_lora as to_lora
    from peftarray.draws import KeyedDraws as KeyedDraws
    from peftarray.draws import dropout as dropout
    from peftarray.draws import step_key as step_key
    from peftarray.errors import ConfigError as ConfigError
    from peftarray.errors import FormatError as FormatError
    from peftarray.errors import MatchError as MatchError
    from peftarray.errors import NumberError as NumberError
    from peftarray.errors import OutputError as OutputError
    from peftarray.errors import PeftError as PeftError
    from peftarray.errors import QualityError as QualityError
    from peftarray.errors import ShapeError as ShapeError
    from peftarray.errors import UnsupportedError as UnsupportedError
    from peftarray.formats.peft_writer import SavedAdapters as SavedAdapters
    from peftarray.formats.peft_writer import load_adapters as load_adapters
    from peftarray.formats.peft_writer import save_adapters as save_adapters
    from peftarray.inspection import Inspection as Inspection
    from peftarray.inspection import inspect as inspect
    from peftarray.layers import Layer as Layer
    from peftarray.layers import Window as Window
    from peftarray.merging import MergeReport as MergeReport
    from peftarray.merging import Verification as Verification
    from peftarray.merging import merge as merge
    from peftarray.merging import quantize_checkpoint as quantize_checkpoint
    from peftarray.merging import verify as verify
    from peftarray.method import AdapterConfig as AdapterConfig
    from peftarray.method import Param as Param
    from peftarray.method_kinds import Additive as Additive
    from peftarray.method_kinds import LowRank as LowRank
    from peftarray.method_kinds import Transform as Transform
    from peftarray.methods import METHODS as METHODS
    from peftarray.methods import AdaLoraConfig as AdaLoraConfig
    from peftarray.methods import BOFTConfig as BOFTConfig
    from peftarray.methods import IA3Config as IA3Config
    from peftarray.methods import LoHaConfig as LoHaConfig
    from peftarray.methods import LoKrConfig as LoKrConfig
    from peftarray.methods import LoraConfig as LoraConfig
    from peftarray.methods import OFTConfig as OFTConfig
    from peftarray.methods import TrainableTokensConfig as TrainableTokensConfig
    from peftarray.methods import VeraConfig as VeraConfig
    from peftarray.model import PeftModel as PeftModel
    from peftarray.model import PromptModel as PromptModel
    from peftarray.model import get_peft_model as get_peft_model
    from peftarray.prompts import PROMPTS as PROMPTS
    from peftarray.prompts import AdaptionPromptConfig as AdaptionPromptConfig
    from peftarray.prompts import CPTConfig as CPTConfig
    from peftarray.prompts import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from peftarray.prompts import PrefixTuningConfig as PrefixTuningConfig
    from peftarray.prompts import PromptEncoderConfig as PromptEncoderConfig
    from peftarray.prompts import PromptTuningConfig as PromptTuningConfig
    from peftarray.quant import Codec as Codec
    from peftarray.quant import codec as codec
    from peftarray.quant import quantize_array as quantize_array
    from peftarray.quantised_start import loftq as loftq
    from peftarray.quantised_weight import QuantisedWeight as QuantisedWeight
    from peftarray.quantising import quantize as quantize
    from peftarray.training import SGD as SGD
    from peftarray.training import Adafactor as Adafactor
    from peftarray.training import AdaLoraBudget as AdaLoraBudget
    from peftarray.training import AdamW as AdamW
    from peftarray.training import Batches as Batches
    from peftarray.training import Group as Group
    from peftarray.training import History as History
    from peftarray.training import Lion as Lion
    from peftarray.training import LossScale as LossScale
    from peftarray.training import Moment as Moment
    from peftarray.training import Precision as Precision
    from peftarray.training import Schedule as Schedule
    from peftarray.training import Trainable as Trainable
    from peftarray.training import clip_by_norm as clip_by_norm
    from peftarray.training import clip_by_value as clip_by_value
    from peftarray.training import constant as constant
    from peftarray.training import cosine as cosine
    from peftarray.training import cosine_with_restarts as cosine_with_restarts
    from peftarray.training import early_stopping as early_stopping
    from peftarray.training import fit as fit
    from peftarray.training import inverse_sqrt as inverse_sqrt
    from peftarray.training import linear as linear
    from peftarray.training import lora_plus as lora_plus
    from peftarray.training import one_cycle as one_cycle
    from peftarray.training import orthogonality_penalty as orthogonality_penalty
    from peftarray.training import polynomial as polynomial
    from peftarray.zero_points import merge_zero_points as merge_zero_points

__version__ = "0.1.0"

_HOMES = {
    "adapted_weight": "AdaptedWeight",
    "adapter": "Adapter",
    "combining": "CombineReport CombinedAdapters LoraFit Recipe combine combine_folders combine_sets to_lora",
    "draws": "KeyedDraws dropout step_key",
    "errors": "ConfigError FormatError MatchError NumberError OutputError PeftError QualityError ShapeError"
    " UnsupportedError",
    "formats.peft_writer": "SavedAdapters load_adapters save_adapters",
    "inspection": "Inspection inspect",
    "layers": "Layer Window",
    "merging": "MergeReport Verification merge quantize_checkpoint verify",
    "method": "AdapterConfig Param",
    "method_kinds": "Additive LowRank Transform",
    "methods": "METHODS AdaLoraConfig BOFTConfig IA3Config LoHaConfig LoKrConfig LoraConfig OFTConfig"
    " TrainableTokensConfig VeraConfig",
    "model": "PeftModel get_peft_model PromptModel",
    "prompts": "PROMPTS AdaptionPromptConfig CPTConfig MultitaskPromptTuningConfig PrefixTuningConfig"
    " PromptEncoderConfig PromptTuningConfig",
    "quant": "Codec codec quantize_array",
    "quantised_weight": "QuantisedWeight",
    "quantised_start": "loftq",
    "quantising": "quantize",
    "training": "SGD Adafactor AdaLoraBudget AdamW Batches Group History Lion LossScale Moment Precision Schedule"
    " Trainable clip_by_norm clip_by_value constant cosine cosine_with_restarts early_stopping fit"
    " inverse_sqrt linear lora_plus one_cycle orthogonality_penalty polynomial",
    "zero_points": "merge_zero_points",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
# Used as `pa.models.load`.
_PARTS = ("models",)

__all__ = sorted([*_HOME, *_PARTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"peftarray.{name}")
    if name not in _HOME:
        message = f"module 'peftarray' has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(f"peftarray.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
