"""Writing on behind a prompt: kept keys change nothing, with padding before the texts or without."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray import models
from peftarray.errors import PeftError
from peftarray.model.prompted import PromptModel
from peftarray.prompts import AdaptionPromptConfig, PrefixTuningConfig, PromptTuningConfig

MODELS = (
    {"model_type": "gpt2", "vocab_size": 23, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    {
        "model_type": "llama",
        "vocab_size": 23,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
    },
)


@pytest.mark.parametrize("facts", MODELS, ids=lambda facts: facts["model_type"])
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3),
        PrefixTuningConfig(num_virtual_tokens=3),
        AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
    ],
    ids=lambda config: config.peft_type,
)
def test_each_token_is_the_likeliest_after_those_before(facts, config):
    base = models.create(facts)
    base.weights.update({name: array * 20 if array.ndim > 1 else array for name, array in base.weights.items()})
    model = PromptModel.create(base, config)
    model.params = {name: array + 1 if "gate" in name else array for name, array in model.params.items()}
    ids, mask = np.array([[3, 4, 5], [0, 6, 7]]), np.array([[1, 1, 1], [0, 1, 1]])
    texts = model.generate(ids, mask, max_new_tokens=4, eos_token_id=[])
    for length in range(3, 7):
        seen = np.concatenate([mask, np.ones((2, length - 3), np.int64)], axis=1)
        places = np.maximum(np.cumsum(seen, axis=1) - 1, 0)
        logits = model(texts[:, :length], seen, positions=places)
        assert (logits[:, -1].argmax(-1) == texts[:, length]).all()
    with pytest.raises(PeftError, match="more than the 16"):
        model.generate(ids, max_new_tokens=13 if config.peft_type != "ADAPTION_PROMPT" else 14)
