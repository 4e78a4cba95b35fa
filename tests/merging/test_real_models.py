"""Real models with adapters that PEFT trains here: merged, they compute what the live PEFT model computes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import quiet, same_bits, tensors_of
from real_models import minilm, smollm2
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import peftarray as pa

SENTENCES = [
    "The adapter is merged into the weights of the base.",
    "A lighthouse keeper counts the ships that pass at night.",
    "Rain fell on the tin roof, and nobody in the house could sleep.",
    "Mitochondria turn sugar and oxygen into what a cell can spend.",
]
# Of the largest number; what the adapter does must be far above it.
NOISE = 2e-5


@pytest.fixture(scope="module")
def language_model(quiet_and_offline):
    with tempfile.TemporaryDirectory() as folder:
        yield smollm2(Path(folder))


@pytest.fixture(scope="module")
def sentence_model(quiet_and_offline):
    with tempfile.TemporaryDirectory() as folder:
        yield minilm(Path(folder))


@pytest.fixture
def work():
    """A folder that is gone after the test: pytest keeps its own, and these models are large."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def trained(model: torch.nn.Module, config: peft.LoraConfig, folder: Path, loss: Callable[[Any], torch.Tensor]) -> Any:
    """A PEFT model after some steps of AdamW on a loss, saved to `folder`."""
    torch.manual_seed(0)
    with quiet():
        live = peft.get_peft_model(model, config).eval()
        optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(4):
            optimizer.zero_grad()
            loss(live).backward()
            optimizer.step()
        live.save_pretrained(folder)
    return live


def assert_equal_and_moved(merged: torch.Tensor, live: torch.Tensor, base: torch.Tensor) -> None:
    largest = live.abs().max()
    assert (merged - live).abs().max() <= NOISE * largest
    assert (base - live).abs().max() >= 500 * NOISE * largest


@pytest.mark.parametrize(
    ("chosen", "changed"),
    [
        ({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, 210),
        (
            {
                "r": 4,
                "use_dora": True,
                "use_rslora": True,
                "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"],
                "exclude_modules": r".*\.(3|17)\..*",
                "rank_pattern": {r"layers\.1\d\.self_attn\.q_proj": 7},
                "modules_to_save": ["norm"],
            },
            3 * 28 + 1 + 61,
        ),
    ],
    ids=["all-linear", "dora-head-and-norms"],
)
def test_smollm2(language_model, work, chosen, changed):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    # As a label, padding counts for nothing.
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(**batch).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", **chosen)
    live = trained(model, config, work / "adapter", lambda model: model(**batch, labels=labels).loss)
    with torch.no_grad():
        wanted = live(**batch).logits
    del live, model

    report = pa.merge(language_model, work / "adapter", work / "out")

    merged = AutoModelForCausalLM.from_pretrained(work / "out").eval()
    with torch.no_grad():
        assert_equal_and_moved(merged(**batch).logits, wanted, before)
    assert report.applied == report.given
    assert len(report.tensors) == changed
    assert report.retained > 0.999999
    assert pa.verify(language_model, work / "adapter", work / "out", rows=4).passed
    ids = [AutoTokenizer.from_pretrained(folder)(SENTENCES)["input_ids"] for folder in (language_model, work / "out")]
    assert ids[0] == ids[1]


def embedded(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Sentence embeddings as this model is used: the mean over tokens, of length 1."""
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["query", "key", "value", "dense"], "bias": "all", "r": 8},
        {"target_modules": ["word_embeddings", "value"], "lora_alpha": 16, "modules_to_save": ["LayerNorm"]},
    ],
    ids=["layers-and-biases", "embedding-and-norms"],
)
def test_minilm(sentence_model, work, chosen):
    batch = AutoTokenizer.from_pretrained(sentence_model)(SENTENCES, return_tensors="pt", padding=True)
    model = AutoModel.from_pretrained(sentence_model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = embedded(model, batch)

    def apart(model: torch.nn.Module) -> torch.Tensor:
        vectors = embedded(model, batch)
        return (vectors @ vectors.T - 0.8).square().mean()

    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", **chosen)
    live = trained(model, config, work / "adapter", apart)
    with torch.no_grad():
        wanted = embedded(live, batch)

    report = pa.merge(sentence_model, work / "adapter", work / "out")

    with torch.no_grad():
        merged = embedded(AutoModel.from_pretrained(work / "out").eval(), batch)
    assert_equal_and_moved(merged, wanted, before)
    old, new = tensors_of(sentence_model), tensors_of(work / "out")
    assert old.keys() == new.keys()
    changed = {tensor.name for tensor in report.tensors}
    assert all(same_bits(old[name], new[name]) for name in old.keys() - changed)
    # What else the folder holds makes it a sentence model, and comes along.
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "vocab.txt"):
        assert (work / "out" / name).read_bytes() == (sentence_model / name).read_bytes()
