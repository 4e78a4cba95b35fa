"""Prompts of PEFT's, drawn, on tiny models: what this package's prompts must agree with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from hypothesis import strategies as st
from oracles import VOCABULARY, built, saved

from peftarray import models
from peftarray.prompts import PROMPTS, Host, Prompt

LLAMA = st.fixed_dictionaries(
    {
        "hidden_size": st.just(16),
        "intermediate_size": st.just(12),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([4]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([4, 6]),
    }
)
GPT2 = st.fixed_dictionaries({"n_embd": st.just(12), "n_head": st.integers(2, 3), "n_layer": st.integers(1, 3)})
BERT = st.fixed_dictionaries(
    {
        "hidden_size": st.just(12),
        "num_attention_heads": st.integers(2, 3),
        "num_hidden_layers": st.integers(1, 2),
        "intermediate_size": st.just(10),
        "num_labels": st.just(3),
    }
)
FAMILIES = {"LlamaForCausalLM": LLAMA, "GPT2LMHeadModel": GPT2, "BertForSequenceClassification": BERT}

_tokens = st.integers(1, 5)
_hidden = st.none() | st.integers(2, 7)
_vocabulary = st.integers(0, VOCABULARY - 1)


def _cpt(ids: list[int], types: list[int], epsilons: tuple[float, float]) -> dict[str, Any]:
    kinds = [types[i % len(types)] for i in range(len(ids))]
    return {
        "cpt_token_ids": ids,
        "cpt_tokens_type_mask": kinds,
        "opt_projection_epsilon": epsilons[0],
        "opt_projection_format_epsilon": epsilons[1],
    }


SETTINGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "PROMPT_TUNING": st.fixed_dictionaries({"num_virtual_tokens": _tokens}),
    "MULTITASK_PROMPT_TUNING": st.fixed_dictionaries(
        {"num_virtual_tokens": _tokens, "num_tasks": st.integers(1, 3), "num_ranks": st.integers(1, 3)}
    ),
    "P_TUNING": st.one_of(
        st.fixed_dictionaries({"num_virtual_tokens": _tokens, "encoder_hidden_size": _hidden}),
        st.fixed_dictionaries(
            {
                "num_virtual_tokens": _tokens,
                "encoder_hidden_size": _hidden,
                "encoder_reparameterization_type": st.just("LSTM"),
                "encoder_num_layers": st.integers(1, 3),
            }
        ),
    ),
    "PREFIX_TUNING": st.fixed_dictionaries(
        {
            "num_virtual_tokens": _tokens,
            "encoder_hidden_size": _hidden,
            "prefix_projection": st.booleans(),
            "init_weights": st.sampled_from([None, None, "zero"]),
        }
    ),
    "CPT": st.builds(
        _cpt,
        st.lists(_vocabulary, min_size=1, max_size=5),
        st.lists(st.integers(0, 9), min_size=1, max_size=5),
        st.tuples(st.sampled_from([0.1, 3.0]), st.sampled_from([0.1, 3.0])),
    ),
    "ADAPTION_PROMPT": st.fixed_dictionaries({"adapter_len": _tokens, "adapter_layers": st.just(1)}),
}
CONFIGS = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "CPT": peft.CPTConfig,
    "ADAPTION_PROMPT": peft.AdaptionPromptConfig,
}


@dataclass(frozen=True)
class Case:
    """One prompt on one model, here and there.

    Attributes:
        oracle: PEFT's model, with random numbers in the prompt.
        config: the prompt here, with the model's sizes.
        params: the same numbers, under the names of its table.
        folder: of the base model.
    """

    oracle: Any
    config: Prompt
    params: dict[str, np.ndarray]
    folder: Path


@contextmanager
def case(kind: str, family: str, model: dict[str, Any], settings: dict[str, Any]) -> Iterator[Case]:
    """A prompt of PEFT's on a new model, and the same here."""
    task = "SEQ_CLS" if family.startswith("Bert") else "CAUSAL_LM"
    base = built(family, model)
    with saved(base) as folder:
        oracle = peft.get_peft_model(base, CONFIGS[kind](task_type=task, **settings)).eval()
        torch.manual_seed(1)
        for name, parameter in oracle.named_parameters():
            own = parameter.requires_grad and "classifier" not in name
            if own and settings.get("init_weights") != "zero":
                parameter.data = torch.randn_like(parameter) * (0.3 if "delta" not in name else 0.02)
        here = models.load(folder)
        config = PROMPTS[kind](task_type=task, **settings).for_model(Host.read(vars(here.config), here.weights))
        yield Case(oracle, config, trained(oracle, config), folder)


def trained(oracle: Any, config: Prompt) -> dict[str, np.ndarray]:
    """What trains in PEFT's model, under the names of the table here."""
    if hasattr(oracle, "prompt_encoder"):
        state = oracle.prompt_encoder["default"].state_dict()
        plain = "prompt_embeddings" in config.params()
        named = {"prompt_embeddings" if plain and name == "embedding.weight" else name: a for name, a in state.items()}
    else:
        named = {n.removeprefix("base_model.model."): a for n, a in oracle.state_dict().items() if "adaption_" in n}
    return {name: array.detach().numpy().copy() for name, array in named.items()}


@contextmanager
def saved_by_peft(oracle: Any) -> Iterator[Path]:
    """The folder that PEFT saved a prompt to."""
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        yield Path(folder)


def logits(oracle: Any, ids: np.ndarray, mask: np.ndarray | None, task_ids: list[int] | None) -> np.ndarray:
    """PEFT's, without those of the virtual tokens."""
    more = {} if task_ids is None else {"task_ids": torch.asarray(task_ids)}
    with torch.no_grad():
        attention_mask = None if mask is None else torch.asarray(mask)
        found = oracle(input_ids=torch.asarray(ids), attention_mask=attention_mask, **more).logits
    return (found if found.ndim == 2 else found[:, -ids.shape[1] :]).numpy()


def fields_of(config: Any) -> dict[str, Any]:
    """A configuration's fields as plain values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: getattr(value, "value", value) for name, value in values.items()}
