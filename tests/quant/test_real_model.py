"""SmolLM2 quantised by transformers with bitsandbytes is read here, and what is written here is loaded there."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from real_models import smollm2

import peftarray as pa
from peftarray.dtypes import rounded
from peftarray.quant import FourBitFloat, Int8Rows, NormalFloat
from peftarray.quant.layouts import LAYOUTS, find_quantised
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import save_file

transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

LAYERS = 2  # of thirty: the others are like them
SKIPPED = ["lm_head"]
CODECS = {
    "nf4": (NormalFloat(), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    "fp4": (FourBitFloat(double=False), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": (Int8Rows(), {"load_in_8bit": True}),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The first layers of SmolLM2 in float32."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TQDM_DISABLE", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so the mean of scales, hangs on it
    folder = tmp_path_factory.mktemp("smollm2")
    whole = smollm2(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, num_hidden_layers=LAYERS)
    model.save_pretrained(folder / "short")
    for part in (whole, folder / "bfloat16"):
        shutil.rmtree(part)
    yield folder / "short"
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module", params=CODECS)
def quantised(request, original, tmp_path_factory):
    """The codec, transformers' model of it, and the folder that transformers saved it in."""
    how, settings = CODECS[request.param]
    config = transformers.BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        original, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return how, model.eval(), folder


def dequantised(model) -> dict[str, np.ndarray]:
    """The weight of every layer that bitsandbytes quantised, by bitsandbytes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, scale)
        else:
            continue
        found[f"{name}.weight"] = weight.float().numpy()
    assert len(found) == 7 * LAYERS
    return found


def test_what_transformers_saved_is_read(quantised):
    how, model, folder = quantised
    expected = dequantised(model)
    with Checkpoint.open(folder) as checkpoint:
        found = find_quantised(checkpoint, checkpoint.config, checkpoint.read_stored)
        assert found.keys() == expected.keys()
        for name, weight in found.items():
            assert weight.codec == how
            np.testing.assert_array_equal(weight.dequantize(checkpoint.read_stored), expected[name], err_msg=name)
            rows = (weight.shape[0] // 3, weight.shape[0] // 3 + 5)
            some = weight.dequantize(checkpoint.read_stored, rows=rows)
            np.testing.assert_array_equal(some, expected[name][slice(*rows)])


def test_what_is_written_here_is_what_transformers_saved(quantised, original, tmp_path):
    """The same tensors of the same bytes, made from the same weights; and transformers computes the same with them."""
    how, model, folder = quantised
    with Checkpoint.open(original) as before, Checkpoint.open(folder) as theirs:
        tensors = {name: before.read_stored(name) for name in before}
        for name in find_quantised(theirs, theirs.config, theirs.read_stored):
            weight = tensors.pop(name)
            # LLM.int8 takes weights in float16.
            weight = rounded(weight, "float16") if isinstance(how, Int8Rows) else weight
            parts = how.quantize(weight)
            tensors |= LAYOUTS["bitsandbytes"].write(name, weight.shape, how, parts, dtype="F32")
        assert tensors.keys() == set(theirs)
        for name, tensor in tensors.items():
            stored = theirs.read_stored(name)
            if "quant_state" in name:
                assert json.loads(tensor.tobytes()) == json.loads(stored.tobytes()), name
            else:
                np.testing.assert_array_equal(tensor, stored, err_msg=name, strict=True)
    ours = tmp_path / "ours"
    shutil.copytree(original, ours, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, ours / "model.safetensors")
    config = json.loads((ours / "config.json").read_text())
    config["quantization_config"] = LAYOUTS["bitsandbytes"].config(how, skipped=SKIPPED, dtype="F32")
    (ours / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(ours, device_map="cpu", dtype=torch.float32).eval()
    expected = dequantised(model)
    for name, weight in dequantised(loaded).items():
        np.testing.assert_array_equal(weight, expected[name], err_msg=name)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(tokens).logits.numpy(), model(tokens).logits.numpy())


def read_back(folder: Path) -> dict[str, np.ndarray]:
    """The quantised weights of a checkpoint; the model itself has others once bitsandbytes has computed on the CPU."""
    with Checkpoint.open(folder) as files:
        found = find_quantised(files, files.config, files.read_stored)
        return {name: weight.dequantize(files.read_stored) for name, weight in found.items()}


def test_a_whole_checkpoint_is_quantised_as_transformers_does_it(quantised, original, tmp_path):
    how, model, folder = quantised
    settings = {item.name: getattr(how, item.name) for item in fields(how)}
    report = pa.quantize_checkpoint(original, tmp_path / "ours", how.kind, **settings)
    assert len(report.tensors) == 7 * LAYERS
    with Checkpoint.open(folder) as theirs, Checkpoint.open(tmp_path / "ours") as ours:
        assert set(theirs) == set(ours)
        for name in theirs:
            # LLM.int8 takes weights in float16, and `quantize` as they are.
            if "quant_state" not in name and not isinstance(how, Int8Rows):
                np.testing.assert_array_equal(ours.read_stored(name), theirs.read_stored(name), err_msg=name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu").eval()
    expected = read_back(folder)
    for name, weight in dequantised(loaded).items():
        np.testing.assert_allclose(weight, expected[name], atol=0.01 * np.abs(expected[name]).max(), err_msg=name)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        found, wanted = loaded(tokens).logits.numpy(), model(tokens).logits.numpy()
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def test_a_lora_is_merged_into_what_transformers_saved(quantised, tmp_path):
    folder = quantised[2]
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (4, 576), "lora_B": (576, 4)}
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{key}.{name}.weight": rng.standard_normal(shape, np.float32) * 0.1 for name, shape in shapes.items()}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    said["layers_to_transform"] = [1]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    report = pa.merge(
        folder, tmp_path / "adapter", tmp_path / "out", base_as="dequantised", dtype="float32", verify=True
    )
    expected = read_back(folder)
    (changed,) = report.tensors
    down, up = (factors[f"{key}.{name}.weight"].astype(np.float64) for name in shapes)
    with Checkpoint.open(tmp_path / "out") as merged:
        for name, weight in expected.items():
            exact = weight + (2 * up @ down if name == changed.name else 0)
            np.testing.assert_allclose(merged.read(name), exact, rtol=1e-6, atol=1e-6, err_msg=name)
    pa.merge(folder, tmp_path / "adapter", tmp_path / "kept", base_as="dequantised", keep_touched_in="float32")
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept", device_map="cpu", dtype=torch.float32)
    module = kept.get_submodule(changed.name.removesuffix(".weight"))
    assert type(module) is torch.nn.Linear
    np.testing.assert_allclose(module.weight.data.numpy(), expected[changed.name] + 2 * up @ down, atol=1e-6)
