"""Several adapters, weights, other dtypes and other files: what `merge` does beyond one adapter as it stands."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    same_bits,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY

import peftarray as pa

ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear", "r": 3, "use_rslora": True},
    "dora": {"target_modules": ["query", "dense"], "r": 2, "use_dora": True, "bias": "all"},
    "rows": {"target_modules": ["value"], "trainable_token_indices": [1, 30], "modules_to_save": ["LayerNorm"]},
    "embedding": {"target_modules": ["word_embeddings", "key"], "r": 2, "bias": "lora_only", "lora_bias": False},
}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """Adapters of one base that touch the same tensors in different ways, and what each makes of it alone."""
    root = tmp_path_factory.mktemp("adapters")
    base = bases("bert", sharded=True)
    for seed, (name, chosen) in enumerate(ADAPTERS.items()):
        adapt(base, peft.LoraConfig(**chosen), root / name, seed=seed)
        pa.merge(base.folder, root / name, root / f"{name}-merged")
    return root


def combined(base: Path, adapters: Path, scales: dict[str, float]) -> dict[str, torch.Tensor]:
    """W + sum c (F(W) - W) in float64, from what each adapter makes of W alone."""
    before = {name: tensor.double() for name, tensor in tensors_of(base).items()}
    total = {name: tensor.clone() for name, tensor in before.items()}
    for adapter, scale in scales.items():
        for name, tensor in tensors_of(adapters / f"{adapter}-merged").items():
            total[name] += scale * (tensor.double() - before[name])
    return total


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(list(ADAPTERS)), min_size=1, max_size=4, unique=True),
    scales=st.lists(st.sampled_from([1.0, 0.7, -0.5, 2.0, 0.25]), min_size=4, max_size=4),
)
def test_updates_add_with_their_weights(bases, adapters, tmp_path_factory, names, scales):
    base, out = bases("bert", sharded=True), tmp_path_factory.mktemp("out") / "out"
    chosen = dict(zip(names, scales, strict=False))
    report = pa.merge(base.folder, [adapters / name for name in names], out, scale=list(chosen.values()), verify=True)
    wanted, before, merged = combined(base.folder, adapters, chosen), tensors_of(base.folder), tensors_of(out)
    changed = {tensor.name for tensor in report.tensors}
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        if name in changed:
            largest = max(before[name].abs().max(), tensor.abs().max(), 1e-3)
            assert (tensor.double() - wanted[name]).abs().max() <= 2e-6 * largest * len(names), name
        else:
            assert same_bits(tensor, before[name])


def test_their_order_does_not_matter(bases, adapters, tmp_path):
    base = bases("bert", sharded=True)
    pairs = [("linear", 0.7), ("dora", -0.5), ("rows", 0.3)]
    results = []
    for i, order in enumerate(itertools.permutations(pairs)):
        folders, scales = zip(*((adapters / name, scale) for name, scale in order), strict=True)
        pa.merge(base.folder, folders, tmp_path / str(i), scale=scales)
        results.append(tensors_of(tmp_path / str(i)))
    for other in results[1:]:
        for name, tensor in results[0].items():
            # Sums of three floating numbers depend on their order in the last bit.
            assert (tensor - other[name]).abs().max() <= 3e-7 * tensor.abs().max()
    two = [tmp_path / "ab", tmp_path / "ba"]
    pa.merge(base.folder, [adapters / "linear", adapters / "dora"], two[0], scale=[0.7, -0.5])
    pa.merge(base.folder, [adapters / "dora", adapters / "linear"], two[1], scale=[-0.5, 0.7])
    files = [sorted(file.name for file in folder.iterdir()) for folder in two]
    assert files[0] == files[1]
    assert len([name for name in files[0] if name.endswith(".safetensors")]) > 1
    for name in files[0]:
        assert (two[0] / name).read_bytes() == (two[1] / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_the_weight_zero_gives_the_bytes_of_the_base(bases, tmp_path, name, dtype):
    base = bases("bert", dtype=dtype)
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = load_file(base.folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[:3] = torch.tensor([-0.0, 0.0, -1e-30])  # zero has two signs, and both are bytes of the base
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((base.folder / "config.json").read_bytes())
    adapt(base, peft.LoraConfig(**ADAPTERS[name]), tmp_path / "adapter")
    pa.merge(folder, tmp_path / "adapter", tmp_path / "out", scale=0)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert_config(folder, tmp_path / "out")


def test_the_weight_of_one_adapter(bases, adapters, tmp_path):
    base = bases("bert", sharded=True)
    pa.merge(base.folder, adapters / "linear", tmp_path / "out", scale=-1.5)
    wanted = combined(base.folder, adapters, {"linear": -1.5})
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor.double() - wanted[name]).abs().max() <= 2e-6 * tensor.abs().max(), name


def test_a_tensor_of_another_shape_cannot_be_weighted(bases, tmp_path):
    base = bases("llama")
    model = base.fresh()
    with quiet():
        model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    adapt(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "wide", model)
    adapt(base, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), tmp_path / "other")
    with pytest.raises(pa.UnsupportedError, match=r"replaced whole .* cannot be weighted \(0.5\)"):
        pa.merge(base.folder, tmp_path / "wide", tmp_path / "out", scale=0.5)
    with pytest.raises(pa.UnsupportedError, match="no other adapter for this tensor"):
        pa.merge(base.folder, [tmp_path / "wide", tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_was_tied_can_be_weighted(bases, tmp_path):
    """The base has a value for it, if under another name: W + c (R - W)."""
    base = bases("llama-tied", dtype=torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapt(base, config, tmp_path / "adapter")
    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out", scale=0.25)
    brought = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].double()
    before = tensors_of(base.folder)["model.embed_tokens.weight"].double()
    merged = tensors_of(tmp_path / "out")
    assert merged["lm_head.weight"].dtype == torch.bfloat16
    wanted = before + 0.25 * (brought - before)
    assert ((merged["lm_head.weight"].double() - wanted).abs() <= 2**-8 * wanted.abs()).all()
    assert same_bits(merged["model.embed_tokens.weight"], before.bfloat16())


def test_adapters_that_disagree_about_a_tied_head_are_refused(bases, tmp_path):
    base = bases("llama-tied")
    adapt(base, peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "unties")
    adapt(base, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4]), tmp_path / "follows")
    with pytest.raises(pa.UnsupportedError, match=r"unties lm_head\.weight"):
        pa.merge(base.folder, [tmp_path / "unties", tmp_path / "follows"], tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "resnet", "qwen3-moe"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]
)
def test_another_dtype(bases, tmp_path, name, stored, dtype):
    """The result is rounded once to the dtype that was asked for; what is not a floating number stays."""
    base = bases(name, dtype=getattr(torch, stored))
    target = getattr(torch, dtype)
    chosen = {"target_modules": ["q_proj", "convolution"], "r": 3, "modules_to_save": ["norm", "normalization"]}
    live = adapt(base, peft.LoraConfig(**chosen), tmp_path / "adapter", base.fresh().float())
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out", dtype=dtype, verify=True)
    wanted = merged_by_peft(live, tmp_path / "reference")
    merged = tensors_of(tmp_path / "out")
    assert merged.keys() == wanted.keys()
    changed = {tensor.name for tensor in report.tensors}
    for name, tensor in merged.items():
        if not wanted[name].is_floating_point():
            assert same_bits(tensor, wanted[name])
            continue
        assert tensor.dtype == target
        if name not in changed:
            assert same_bits(tensor, wanted[name].to(target))
            continue
        ulp = torch.finfo(target).eps * wanted[name].abs() / 2
        assert ((tensor.float() - wanted[name]).abs() <= ulp + 1e-6 * wanted[name].abs().max() + 1e-7).all(), name
    assert_config(base.folder, tmp_path / "out", dtype=dtype)
    assert next(base.load(tmp_path / "out").parameters()).dtype == target


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [9_000, "20KB", "5GB"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_other_files(bases, tmp_path, name, size, sharded):
    base = bases(name, sharded=sharded)
    live = adapt(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path / "adapter")
    wanted = live_outputs(live, base)
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out", max_shard_size=size)
    assert_same_weights(report, base.folder, tmp_path / "out", merged_by_peft(live, tmp_path / "reference"))
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), wanted)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    limit = {"20KB": 20_000, "5GB": 5_000_000_000}.get(size, size)
    for file in files:
        tensors = load_file(file).values()
        assert sum(tensor.nbytes for tensor in tensors) <= limit or len(tensors) == 1
    assert (len(files) == 1) == (size == "5GB")
    index = tmp_path / "out" / "model.safetensors.index.json"
    if len(files) > 1:
        listed = json.loads(index.read_text())
        assert set(listed["weight_map"].values()) == {file.name for file in files}
        assert listed["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())


def test_new_tensors_go_into_the_shards(bases, tmp_path):
    """A head that is untied, in a sharded base: the index lists it, and transformers loads it."""
    base = bases("llama-tied", sharded=True)
    live = adapt(base, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), tmp_path / "adapter")
    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), live_outputs(live, base))
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" in weight_map
    assert weight_map.keys() == tensors_of(tmp_path / "out").keys()
