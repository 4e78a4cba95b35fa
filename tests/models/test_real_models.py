"""Real models: MiniLM's embeddings, and SmolLM2's logits and texts, are those of transformers; SmolLM2 is fine-tuned
without torch, and its adapter is PEFT's and back.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from oracles import assert_close
from real_models import minilm, smollm2
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import peftarray as pa
from peftarray import models

SENTENCES = [
    "The array is on the device, and nobody copied it to the host.",
    "A lighthouse keeper counts the ships that pass at night.",
    "Rain fell.",
]
SHARE = 1e-4
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fine_tune_smollm2.py"
# Runs a program as if these were not installed.
WITHOUT = """
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft", "jax"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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


def test_smollm2_is_fine_tuned_without_torch_and_its_adapter_is_pefts(language_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES) * 80, encoding="utf-8")
    sizes = ["--steps", "6", "--batch", "2", "--length", "48"]
    command = [sys.executable, "-c", WITHOUT, str(EXAMPLE), str(language_model), str(text), "ours", *sizes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[2]) < 0.8 * float(found[1]), done.stdout

    ids = AutoTokenizer.from_pretrained(language_model)(SENTENCES[0], return_tensors="pt")["input_ids"]
    base = models.load(language_model)
    oracle = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(oracle, tmp_path / "ours", is_trainable=True)

    def assert_equal_logits(adapter):
        with torch.no_grad():
            wanted = theirs(ids).logits
        model = pa.PeftModel.from_pretrained(base, adapter)
        assert_close(model(ids.numpy()), wanted, SHARE)
        return wanted

    before = assert_equal_logits(tmp_path / "ours")
    optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    after = assert_equal_logits(tmp_path / "theirs")
    assert float((after - before).abs().max()) > 1.0
