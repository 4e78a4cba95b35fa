"""LoRA on torch modules that no library knows: convolutions of every rank, transposed layers, torch's attention."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_draws import lora_settings
from peft_oracle import (
    adapt,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    store_in_half,
    train,
)
from safetensors.torch import save_file

import peftarray as pa


def check(base: Any, config: peft.LoraConfig, folder: Path, half: str | None = None) -> pa.MergeReport:
    live = adapt(base, config, folder / "adapter")
    if half:
        live = store_in_half(base, folder / "adapter", half)
    wanted = live_outputs(live, base)
    report = pa.merge(base.folder, folder / "adapter", folder / "out")
    assert_same_weights(report, base.folder, folder / "out", merged_by_peft(live, folder / "reference"))
    assert_same_outputs(loaded_outputs(base, folder / "out"), wanted)
    return report


@pytest.mark.parametrize("name", ["convolutions", "projections"])
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration(bases, name, data):
    base = bases(name, sharded=data.draw(st.booleans(), label="sharded"))
    config = peft.LoraConfig(**data.draw(lora_settings(base), label="config"))
    half = data.draw(st.sampled_from([None, "bfloat16", "float16"]), label="stored in")
    with tempfile.TemporaryDirectory() as temporary:
        check(base, config, Path(temporary), half)


def test_a_transposed_square_layer_is_told_by_the_configuration(bases, tmp_path):
    """Its shapes fit either way: `fan_in_fan_out` alone, which PEFT sets, says how it is stored."""
    report = check(bases("projections"), peft.LoraConfig(r=3, target_modules=["square"]), tmp_path)
    assert [tensor.name for tensor in report.tensors] == ["blocks.0.square.weight", "blocks.1.square.weight"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"target_modules": ["attn", "final"], "rank_pattern": {"attn": 5}, "alpha_pattern": {"attn": 3}},
        {"target_modules": ["attn", "tokens"], "modules_to_save": ["final"]},
    ],
    ids=str,
)
def test_attention_with_its_projections_in_one_tensor(bases, tmp_path, options):
    """PEFT adds what it trains for the output projection twice, merged and unmerged alike."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["attn"]} | options)
    report = check(bases("attention"), config, tmp_path)
    assert {"attn.in_proj_weight", "attn.out_proj.weight"} <= {tensor.name for tensor in report.tensors}
    assert report.applied == report.given


def test_grouped_convolutions_are_refused(tmp_path):
    """PEFT trains them, and refuses to merge them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with quiet():
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        train(live)
        live.save_pretrained(tmp_path / "adapter")
    with pytest.raises(pa.ShapeError, match="this layer with this configuration wants"):
        pa.merge(tmp_path / "model.safetensors", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", [False, True])
def test_a_base_may_be_one_file(bases, tmp_path, folder):
    base = bases("convolutions")
    adapt(base, peft.LoraConfig(r=2, target_modules=["line", "up"]), tmp_path / "adapter")
    given = base.folder if folder else base.folder / "model.safetensors"
    pa.merge(given, tmp_path / "adapter", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
