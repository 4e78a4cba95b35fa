"""Merging IA3, VeRA and AdaLoRA against PEFT's own merge: gains, shared matrices from a seed, pruned triples."""

from __future__ import annotations

import json
import tempfile
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_oracle import (
    adapt,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    store_in_half,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

import peftarray as pa
from peftarray.formats.peft import read
from peftarray.stores.checkpoint import Checkpoint

from ..against_peft.draws import adalora, ia3, vera

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "dense"],
    "resnet": ["convolution", "classifier.1"],
    "convolutions": ["plane", "point", "down", "up"],
    "grouped": ["plane", "each", "space"],
}
TAKES = [
    *((method, name) for method in (ia3, vera, adalora) for name in ("llama", "gpt2", "bert")),
    *((method, name) for method in (ia3, adalora) for name in ("resnet", "convolutions")),
    (ia3, "grouped"),
]


@pytest.mark.parametrize(("method", "name"), TAKES, ids=[f"{method.PEFT}-{name}" for method, name in TAKES])
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_merges_to_what_peft_merges(bases, method: ModuleType, name: str, data: st.DataObject):
    base = bases(name, sharded=data.draw(st.booleans(), label="sharded"))
    ends = st.lists(st.sampled_from(TARGETS[name]), min_size=1, max_size=3, unique=True)
    chosen = method.kwargs(data.draw, "linear") | {"target_modules": data.draw(ends)}
    if method is ia3:
        some = st.lists(st.sampled_from(chosen["target_modules"]), unique=True)
        chosen["feedforward_modules"] = data.draw(some | st.sampled_from([".*", ".*[cnp].*", ".*down_proj"]))
    else:
        chosen["bias"] = data.draw(st.sampled_from(["none", "all"]))
    half = data.draw(st.sampled_from([None, None, "bfloat16", "float16"]), label="stored in")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with quiet():
            live = adapt(base, getattr(peft, method.PEFT)(**chosen), folder / "adapter")
        if half:
            live = store_in_half(base, folder / "adapter", half)
        wanted = live_outputs(live, base)

        report = pa.merge(base.folder, folder / "adapter", folder / "out", verify=True)

        assert_same_weights(report, base.folder, folder / "out", merged_by_peft(live, folder / "reference"))
        assert report.applied == report.given
        assert_same_outputs(loaded_outputs(base, folder / "out"), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_seed_gives_the_projections_of_a_half_precision_model(bases, tmp_path, dtype):
    """PEFT rounds them to the dtype of the model's weights, and keeps them in float32."""
    base = bases("llama", dtype=dtype)
    with quiet():
        config = peft.VeraConfig(r=5, target_modules=["q_proj", "down_proj"], save_projection=False)
        live = adapt(base, config, tmp_path / "adapter")
    checkpoint = Checkpoint.open(base.folder)
    adapter = read(tmp_path / "adapter", checkpoint)
    for site in adapter.sites:
        found = adapter.params(site, np.dtype(np.float32), lambda: np.zeros(()))
        for name in ("vera_A", "vera_B"):
            np.testing.assert_array_equal(found[name], getattr(live.base_model, name)["default"].numpy())
    first, second = (adapter.params(site, np.dtype(np.float32), lambda: np.zeros(())) for site in adapter.sites[:2])
    assert first["vera_A"] is second["vera_A"], "one matrix serves all layers"


HALF = {
    "ia3": peft.IA3Config(target_modules=["key", "dense"], feedforward_modules=["dense"]),
    "vera": peft.VeraConfig(r=4, target_modules=["key", "dense"]),
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["key", "dense"]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", HALF)
def test_a_half_precision_base_is_rounded_once_as_peft_does(bases, tmp_path, method, dtype):
    base = bases("bert", dtype=dtype)
    live = adapt(base, HALF[method], tmp_path / "adapter")
    for name, parameter in live.named_parameters():
        if "ranknum" in name:
            parameter.data.fill_(4)  # PEFT trains the divisor of half-precision models, and saves it nowhere
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out", verify=True)
    ours, wanted = tensors_of(tmp_path / "out"), merged_by_peft(live, tmp_path / "reference")
    changed = [tensor.name for tensor in report.tensors]
    off = sum(int((ours[name] != wanted[name]).sum()) for name in changed)
    assert off <= 1e-3 * sum(ours[name].numel() for name in changed)


def store(folder: Path, change: Any) -> None:
    """Rewrite an adapter's tensors."""
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_projections_that_are_larger_than_these_layers_need(bases, tmp_path):
    """As PEFT saves an adapter that was added to a model beside one on larger layers."""
    base = bases("llama")
    live = adapt(base, peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    expected = merged_by_peft(live, tmp_path / "reference")
    longer = {"base_model.vera_A": (0, 3), "base_model.vera_B": (0, 0, 0, 2)}
    store(tmp_path / "adapter", lambda found: found | {key: pad(found[key], more) for key, more in longer.items()})
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert_same_weights(report, base.folder, tmp_path / "out", expected)


def test_a_file_without_the_projections_that_it_should_hold_is_refused(bases, tmp_path):
    base = bases("llama")
    adapt(base, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    store(tmp_path / "adapter", lambda found: {name: x for name, x in found.items() if "vera_A" not in name})
    with pytest.raises(pa.MatchError, match="lacks vera_A"):
        pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", ["vera_A", "vera_B"])
def test_projections_that_are_too_small_are_refused(bases, tmp_path, name):
    base = bases("llama")
    adapt(base, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    store(tmp_path / "adapter", lambda found: found | {f"base_model.{name}": torch.zeros(4, 4)})
    with pytest.raises(pa.ShapeError, match=rf"{name} is \(4, 4\)"):
        pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("saved", [True, False])
def test_a_part_of_a_model_has_the_projections_of_the_whole_only_from_its_file(bases, tmp_path, saved):
    """The head, which the bare model lacks, is the largest layer: without it the seed would give other numbers."""
    base, bare = bases("llama"), bases("llama-bare")
    with quiet():
        config = peft.VeraConfig(r=4, target_modules=["q_proj", "lm_head"], save_projection=saved)
        adapt(base, config, tmp_path / "adapter")
    if saved:
        report = pa.merge(bare.folder, tmp_path / "adapter", tmp_path / "out", allow_unmatched=True)
        assert report.applied < report.given
        return
    with pytest.raises(pa.UnsupportedError, match="depends on every layer"):
        pa.merge(bare.folder, tmp_path / "adapter", tmp_path / "out", allow_unmatched=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "convolutions"])
def test_pruned_triples(bases, tmp_path, name):
    """Allocated by PEFT from drawn gradients, saved, and merged from the file with fewer rows."""
    base = bases(name)
    config = peft.AdaLoraConfig(init_r=5, target_r=2, total_step=4, lora_alpha=7, target_modules=TARGETS[name][:2])
    live = adapt(base, config, tmp_path / "adapter")
    draw = torch.Generator().manual_seed(0)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
    with quiet():
        live.base_model.update_and_allocate(3)
        live.save_pretrained(tmp_path / "adapter")
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert all(len(kept) == 5 for kept in pattern.values())
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)

    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out", verify=True)

    assert_same_weights(report, base.folder, tmp_path / "out", merged_by_peft(live, tmp_path / "reference"))
    assert report.applied == report.given


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(pa.ConfigError, match=r"2 entries for fc.lora_E; init_r is 3"):
        pa.AdaLoraConfig(init_r=3, rank_pattern={"fc.lora_E": [True, False]})


def test_a_gain_of_zero_cannot_be_unmerged(asarray):
    adapter = pa.IA3Config().init(asarray(np.ones((2, 3))))
    gone = pa.Adapter(adapter.config, adapter.layer, {"ia3_l": asarray(np.array([[1.0], [0.0]]))})
    with pytest.raises(pa.UnsupportedError, match="keep a copy of the base"):
        gone.unmerge(asarray(np.ones((2, 3))))


def test_feedforward_modules_are_ends_without_a_dot():
    """PEFT compares the ends of names, so that `fc` is one of `xfc` too."""
    config = pa.IA3Config(feedforward_modules=["fc"])
    module = types.SimpleNamespace(feedforward_modules={"fc"})
    for name in ("fc", "layer.fc", "layer.xfc", "fc.out", "layer.0"):
        expected = peft.IA3Model._check_target_module_feedforward(module, name)
        assert (config.at(name).params(pa.Layer(name, "linear", (2, 3)))["ia3_l"].shape == (1, 3)) == expected
