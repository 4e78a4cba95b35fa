"""Losses and their gradients are those of transformers, through the tape as through the libraries' own autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import VOCABULARY, Batch, batches, berts, built, gpt2s, llamas, saved

from peftarray import models
from peftarray.autodiff import checkpoint, value_and_grad
from peftarray.backend import load_backend
from peftarray.errors import PeftError
from peftarray.models.model import Model

SHARE = 1e-4  # of the largest entry of a gradient, in float32
# transformers leaves out the gradient of the padding token's row, which the head may share.
PADDED = {"pad_token_id": None}


def assert_same_gradients(model: Model, loss, batch, oracle, wanted: torch.Tensor, to_numpy, backend: str) -> None:
    """The loss, and its gradient for every weight, are those that torch finds in the model of transformers."""
    value, gradients = load_backend(backend).value_and_grad(loss, unused="zero")(dict(model.weights), batch)
    wanted.backward()
    np.testing.assert_allclose(float(to_numpy(value)), wanted.item(), rtol=1e-5)
    largest = max(float(p.grad.abs().max()) for p in oracle.parameters() if p.grad is not None)
    assert set(gradients) == {name for name, _ in oracle.named_parameters()}
    for name, parameter in oracle.named_parameters():
        reference = 0 if parameter.grad is None else parameter.grad.numpy()
        assert np.abs(to_numpy(gradients[name]) - reference).max() <= SHARE * largest, name


@pytest.mark.parametrize("family", [llamas, gpt2s])
def test_causal(family, loaded, backend, examples, to_numpy):
    @examples
    @given(drawn=family(), batch=batches(longest=9), labelled=st.booleans())
    def agrees(drawn, batch: Batch, labelled: bool):
        name, config = drawn
        oracle = built(name, config | PADDED)
        with saved(oracle) as folder:
            model = loaded(folder)
        ids = np.concatenate([batch.ids, batch.ids[:, :1]], axis=1)  # two tokens at least
        mask = None if batch.mask is None else np.pad(batch.mask, ((0, 0), (0, 1)), constant_values=1)
        given = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        real = np.ones_like(ids) if mask is None else mask
        # What a row of padding says of the next token is nobody's concern.
        labels = np.where(real & np.concatenate([real[:, :1], real[:, :-1]], axis=1), ids, -100)
        if labelled:
            labels[:, :-1][ids[:, :-1] % 3 == 0] = -100
            given["labels"] = labels
        more = {} if mask is None else {"attention_mask": torch.asarray(mask)}
        wanted = oracle(input_ids=torch.asarray(ids), labels=torch.asarray(labels), **more).loss
        assert_same_gradients(model, models.causal_loss(model), given, oracle, wanted, to_numpy, backend)

    agrees()


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_heads(kind, loaded, backend, examples, to_numpy):
    @examples
    @given(drawn=berts(), batch=batches(longest=9), data=st.data())
    def agrees(drawn, batch: Batch, data):
        name, config = drawn
        config["layer_norm_eps"] = 1e-2  # a norm over one or two channels has no gradient but for this
        least = 2 if kind == "classification" else 1
        outputs, count = max(least, config["num_labels"]), len(batch.ids)
        if kind == "classification":
            loss, problem = models.classification_loss, "single_label_classification"
            labels = np.asarray(data.draw(st.lists(st.integers(0, outputs - 1), min_size=count, max_size=count)))
        else:
            loss, problem = models.regression_loss, "regression"
            labels = np.linspace(-1, 1, count * outputs, dtype=np.float32).reshape(count, outputs)
            labels = labels[:, 0] if outputs == 1 else labels
        oracle = built(name, config | PADDED | {"problem_type": problem, "num_labels": outputs})
        with saved(oracle) as folder:
            model = loaded(folder)
        given = {"input_ids": batch.ids, "labels": labels.tolist()}
        given |= {} if batch.mask is None else {"attention_mask": batch.mask}
        mask = None if batch.mask is None else torch.asarray(batch.mask)
        wanted = oracle(input_ids=torch.asarray(batch.ids), attention_mask=mask, labels=torch.asarray(labels)).loss
        assert_same_gradients(model, loss(model), given, oracle, wanted, to_numpy, backend)

    agrees()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_may_be_run_again_on_the_way_back(kind):
    config = {"model_type": kind, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    config |= {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": VOCABULARY, "intermediate_size": 12}
    model = models.create(config)
    batch = {"input_ids": [[1, 2, 3], [4, 5, 6]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    found = [
        value_and_grad(models.causal_loss(each))(dict(model.weights), batch)
        for each in (model, replace(model, around=checkpoint))
    ]
    assert float(found[0][0]) == float(found[1][0])
    for name, gradient in found[0][1].items():
        np.testing.assert_array_equal(gradient, found[1][1][name])


def test_a_new_classifier_learns():
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    model = models.create(config | {"vocab_size": VOCABULARY, "intermediate_size": 12}, seed=1)
    weights = {**model.weights, **model.new_classifier(3, seed=2)}
    batch = {"input_ids": [[1, 2], [3, 4], [5, 6]], "labels": [0, 1, 2]}
    loss = models.classification_loss(model)
    before = float(loss(weights, batch))
    assert abs(before - np.log(3)) < 0.1
    for _ in range(60):
        _, gradients = value_and_grad(loss)(weights, batch)
        weights = {name: value - 0.5 * gradients[name] for name, value in weights.items()}
    assert float(loss(weights, batch)) < before / 4
    assert model(weights, batch["input_ids"]).argmax(axis=1).tolist() == [0, 1, 2]


def test_labels_that_are_refused():
    gpt2 = models.create({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9})
    bert = models.create({"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2})
    weights, one = ({**bert.weights, **bert.new_classifier(outputs)} for outputs in (2, 1))
    for loss, more, words in (
        (models.causal_loss(gpt2), {"labels": [[1]]}, "labels are (1, 1); they must be (1, 2), (batch, length)"),
        (models.causal_loss(gpt2), {"labels": [[-100, -100]]}, "every target is -100"),
        (models.classification_loss(bert), {"labels": [[1]]}, "labels are (1, 1); they must be (1,), (batch,)"),
        (models.regression_loss(bert), {"labels": [1.0]}, "labels are (1, 1); they must be (1, 2), (batch, outputs)"),
    ):
        with pytest.raises(PeftError) as caught:
            loss(gpt2.weights if "causal" in loss.__qualname__ else weights, {"input_ids": [[1, 2]]} | more)
        assert words in str(caught.value)
    with pytest.raises(PeftError, match="the classifier has one output"):
        models.classification_loss(bert)(one, {"input_ids": [[1, 2]], "labels": [0]})
