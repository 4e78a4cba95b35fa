"""Every prompt gives the same on every array library, and gradients reach whatever trains."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import SETTINGS

from peftarray.prompts import PROMPTS, Host

HOST = Host("llama", 8, 2, 4, 2, 2, tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)))
CONFIGS = {
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"},
    "PREFIX_TUNING": {"num_virtual_tokens": 3, "prefix_projection": True},
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2, 5], "cpt_tokens_type_mask": [1, 2, 4]},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_on_every_library(kind, asarray, to_numpy):
    config = PROMPTS[kind](**CONFIGS.get(kind, {"num_virtual_tokens": 3})).for_model(HOST)
    words = np.arange(48, dtype=np.float32).reshape(6, 8) / 7
    tasks = [1, 0] if kind.startswith("MULTI") else None
    wanted = config.init_params(words, embedding=words)
    made = config.init_params(asarray(words), embedding=asarray(words))
    for name, array in wanted.items():
        assert (to_numpy(made[name]) == array).all()
    if kind == "CPT":  # beyond its balls
        wanted["delta_embedding.weight"] = wanted["delta_embedding.weight"] + 1
        made["delta_embedding.weight"] = made["delta_embedding.weight"] + 1
    found, reference = config.weights(made, task_ids=tasks), config.weights(wanted, task_ids=tasks)
    assert found.keys() == reference.keys()
    for name, array in reference.items():
        assert type(found[name]) is type(asarray(words))
        np.testing.assert_allclose(to_numpy(found[name]), array, rtol=1e-5, atol=1e-6)


def test_gradients_of_cpt_pass_its_balls_and_leave_labels_alone():
    """What is scaled back gets the gradient of what it was scaled to, as PEFT's does; a label gets none."""
    from peftarray.autodiff import value_and_grad

    config = PROMPTS["CPT"](**CONFIGS["CPT"]).for_model(HOST)
    words = np.ones((6, 8), np.float32)
    p = config.init_params(words, embedding=words)
    weights = np.arange(24, dtype=np.float32).reshape(3, 8)

    def loss(move):
        tokens = config.tokens({**p, "delta_embedding.weight": move["delta"]})
        return (tokens * weights).sum()

    _, gradient = value_and_grad(loss)({"delta": np.ones((3, 8), np.float32)})
    assert (gradient["delta"] == weights * np.array([[1], [1], [0]])).all()
