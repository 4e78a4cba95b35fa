"""CPT's loss is PEFT's, on every library; the reference models have it as the torch modules do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import built
from peft.tuners.cpt.model import CPTEmbedding

import peftarray as pa
from peftarray.autodiff import value_and_grad
from peftarray.prompts import CPTConfig

EXAMPLES = {"cpt_token_ids": [1, 2, 3, 4, 7, 8, 9, 9], "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8]}
IDS = np.asarray([[3, 4, 5, 6, 7], [8, 9, 5, 4, 2]])


@st.composite
def cases(draw):
    length, batch = draw(st.integers(2, 9)), draw(st.integers(1, 3))
    types = draw(st.lists(st.integers(0, 13), min_size=length * batch, max_size=length * batch))
    types = np.asarray(types).reshape(batch, length)
    types[:, -1] = 4  # one label at least
    config = CPTConfig(
        task_type="CAUSAL_LM",
        opt_weighted_loss_type=draw(st.sampled_from(["none", "decay"])),
        opt_loss_decay_factor=draw(st.floats(0.1, 1.0)),
    )
    seed = np.random.default_rng(draw(st.integers(0, 99)))
    labels = np.where((types > 0) & (types % 4 == 0), seed.integers(0, 6, types.shape), -100)
    return config, seed.standard_normal((batch, length, 6)).astype(np.float32), labels, types


@settings(max_examples=40)
@given(case=cases())
def test_it_is_that_of_peft(case):
    config, *arrays = case
    tensors = [torch.asarray(array) for array in arrays]
    output = CPTEmbedding.calculate_loss(SimpleNamespace(logits=tensors[0]), *tensors[1:], config)
    assert config.weighted_loss(*arrays) == pytest.approx(float(output.loss), abs=1e-6, rel=1e-6)
    assert config.weighted_loss(*tensors).item() == pytest.approx(float(output.loss), abs=1e-6, rel=1e-6)


def test_it_is_the_same_on_every_library(asarray, to_numpy):
    config = CPTConfig(task_type="CAUSAL_LM", opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5, **EXAMPLES)
    logits = np.random.default_rng(0).standard_normal((2, 13, 11)).astype(np.float32)
    wanted = config.weighted_loss(logits, *config.labelled(IDS))
    found = config.weighted_loss(asarray(logits), *config.labelled(asarray(IDS)))
    assert float(to_numpy(found)) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "decay"])
def test_a_reference_model_has_the_loss_of_the_module(kind, tmp_path):
    more = {"opt_weighted_loss_type": kind, "opt_loss_decay_factor": 0.5}
    config = CPTConfig(task_type="CAUSAL_LM", **EXAMPLES, **more)
    module = built("GPT2LMHeadModel", {"n_embd": 12, "n_head": 2, "n_layer": 1})
    module.save_pretrained(tmp_path)
    base = pa.models.load(tmp_path)
    model = pa.get_peft_model(base, config)
    types = np.asarray([[1, 2, 3, 4, 4], [2, 2, 3, 4, 4]])
    batch = {"input_ids": IDS, "labels": IDS, "input_type_mask": types}
    loss = pa.models.cpt_loss(base, model.config)
    found, gradients = value_and_grad(lambda params: loss(model.with_params(params).weights, batch))(model.params)
    prompted = pa.get_peft_model(module, config).eval()
    wanted = prompted(**{name: torch.asarray(array) for name, array in batch.items()}).loss
    wanted.backward()
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    moved = prompted.prompt_encoder.default.delta_embedding.weight.grad.numpy()
    np.testing.assert_allclose(gradients["delta_embedding.weight"], moved, atol=1e-5)
    history = pa.fit(
        model, lambda m, given: loss(m.weights, given), [batch], steps=5, optimizer=pa.AdamW(0.01), progress=False
    )
    assert history.losses[-1] < history.losses[0]
