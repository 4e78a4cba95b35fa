"""Real models: MiniLM's embeddings, and SmolLM2's logits and texts, are those of transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import assert_close
from real_models import minilm, smollm2
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from peftarray import models

SENTENCES = [
    "The array is on the device, and nobody copied it to the host.",
    "A lighthouse keeper counts the ships that pass at night.",
    "Rain fell.",
]
SHARE = 1e-4


@pytest.fixture(scope="module")
def language_model(quiet_and_offline):
    with tempfile.TemporaryDirectory() as folder:
        yield smollm2(Path(folder))


@pytest.fixture(scope="module")
def sentence_model(quiet_and_offline):
    with tempfile.TemporaryDirectory() as folder:
        yield minilm(Path(folder))


def test_minilm(sentence_model, loaded, run, to_numpy):
    batch = AutoTokenizer.from_pretrained(sentence_model)(SENTENCES, return_tensors="pt", padding=True)
    oracle = AutoModel.from_pretrained(sentence_model, dtype=torch.float32).eval()
    with torch.no_grad():
        states = oracle(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    wanted = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    model = loaded(sentence_model)
    ids, kept, kinds = (batch[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids"))
    vectors = to_numpy(run(lambda w: model.embed(w, ids, kept, token_type_ids=kinds), model.weights))
    assert_close(vectors, wanted, SHARE)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_smollm2(language_model):
    """In one go: the model takes half a gigabyte, once for each library that holds it."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    oracle = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
    right = tokenizer(SENTENCES, return_tensors="pt", padding=True, padding_side="right")
    left = tokenizer(SENTENCES, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        wanted = oracle(**right).logits
        texts = oracle.generate(**left, max_new_tokens=24, do_sample=False).numpy()
    del oracle

    model = models.load(language_model)
    assert "lm_head.weight" not in model.weights
    ids, mask = right["input_ids"].numpy(), right["attention_mask"].numpy()
    assert_close(model(model.weights, ids, mask), wanted, SHARE, mask)
    found = model.generate(model.weights, left["input_ids"].numpy(), left["attention_mask"].numpy(), max_new_tokens=24)
    np.testing.assert_array_equal(found, texts)
    del model

    on_torch = models.load(language_model, backend="torch")
    with torch.no_grad():
        assert_close(
            on_torch(on_torch.weights, right["input_ids"], right["attention_mask"]).numpy(), wanted, SHARE, mask
        )
