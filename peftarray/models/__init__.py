"""Reference models as array code: Llama and its kin, BERT, GPT-2, from the checkpoints that people have.

A model is functions over a flat mapping from names to arrays. The names are those of the checkpoint, and whatever
stands for an array may stand in the mapping.
"""

from __future__ import annotations

from peftarray.models.bert import Bert, BertConfig
from peftarray.models.cache import Cache
from peftarray.models.generation import generate
from peftarray.models.gpt2 import GPT2, GPT2Config
from peftarray.models.llama import Llama, LlamaConfig
from peftarray.models.loading import MODEL_TYPES, create, load
from peftarray.models.losses import causal_loss, classification_loss, cpt_loss, regression_loss
from peftarray.models.model import Decoder, Model
from peftarray.models.saving import save

__all__ = [
    "GPT2",
    "MODEL_TYPES",
    "Bert",
    "BertConfig",
    "Cache",
    "Decoder",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Model",
    "causal_loss",
    "classification_loss",
    "cpt_loss",
    "create",
    "generate",
    "load",
    "regression_loss",
    "save",
]
