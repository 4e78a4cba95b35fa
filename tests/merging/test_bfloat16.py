"""Bases in half precision: every entry is the exact result rounded once, but for float32's noise where terms cancel."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_oracle import adapt, assert_config, same_bits, tensors_of
from safetensors.torch import load_file, save_file

import peftarray as pa

HALVES = {"bfloat16": (torch.bfloat16, ml_dtypes.bfloat16), "float16": (torch.float16, np.float16)}
# The share of entries on which float32's noise may decide the rounding: float16 has 8 times as many numbers to miss.
NOISE = {"bfloat16": 1e-4, "float16": 8e-4}
Exact = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def exact_updates(adapter: Path, settings: dict[str, Any]) -> dict[str, Exact]:
    """For each module, its weight `(out, in)` to the float64 result, and to the sizes of the terms that make it up.

    Written from the papers' formulas, on the adapter's file alone.
    """
    raw = {name: tensor.double().numpy() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    arrays = {name.removeprefix("base_model.model."): array for name, array in raw.items()}
    modules = {name.removesuffix(".lora_A.weight") for name in arrays if name.endswith(".lora_A.weight")}
    scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"])
    return {module: _exact(arrays, module, scale) for module in modules}


def _exact(arrays: dict[str, np.ndarray], module: str, scale: float) -> Exact:
    down, up = arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"]
    magnitude = arrays.get(f"{module}.lora_magnitude_vector")

    def result(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, size = w + scale * up @ down, abs(w) + scale * abs(up) @ abs(down)
        if magnitude is None:
            return value, size
        gain = (magnitude / np.linalg.norm(value, axis=1))[:, None]
        return gain * value, abs(gain) * size

    return result


def ulp(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance to the next number of `dtype`, at each value."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.maximum(np.floor(np.log2(np.maximum(abs(values), float(info.tiny)))), np.log2(float(info.tiny)))
    return 2.0 ** (exponent - info.nmant)


def assert_rounded_once(merged: np.ndarray, exact: np.ndarray, size: np.ndarray, dtype: Any) -> int:
    """Every entry within half an ulp and float32's noise; returns how many are not the rounded float64 result."""
    # NumPy's float64 to bfloat16 goes through float32, and a tie made on the way would be rounded the wrong way.
    nearest = np.rint(exact / ulp(exact, dtype)) * ulp(exact, dtype)
    assert np.array_equal(nearest, nearest.astype(dtype).astype(np.float64))
    wrong = abs(merged - exact) - (ulp(exact, dtype) / 2 + 1e-6 * size)
    assert wrong.max() <= 0
    return int((merged != nearest).sum())


@pytest.mark.parametrize("half", HALVES)
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["llama", "bert", "gpt2"]),
    chosen=st.fixed_dictionaries(
        {
            "r": st.integers(1, 8),
            "lora_alpha": st.integers(1, 16),
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "autocast": st.booleans(),
        }
    ),
)
def test_tiny_models(bases, half, name, chosen):
    stored, dtype = HALVES[half]
    base = bases(name, dtype=stored)
    chosen = dict(chosen)
    autocast = chosen.pop("autocast")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adapt(base, peft.LoraConfig(**chosen, target_modules="all-linear"), folder / "adapter", autocast=autocast)
        report = pa.merge(base.folder, folder / "adapter", folder / "out", verify=True)
        before, after = tensors_of(base.folder), tensors_of(folder / "out")
        updates = exact_updates(folder / "adapter", chosen)
        assert {f"{module}.weight" for module in updates} == {tensor.name for tensor in report.tensors}
        others, entries = 0, 0
        for tensor, old in before.items():
            assert after[tensor].dtype == old.dtype
            module = tensor.removesuffix(".weight")
            if module not in updates:
                assert same_bits(after[tensor], old)
                continue
            flip = np.transpose if name == "gpt2" else np.asarray
            exact, size = updates[module](flip(old.double().numpy()))
            others += assert_rounded_once(flip(after[tensor].double().numpy()), exact, size, dtype)
            entries += old.numel()
        # A few thousand entries may have some more by chance.
        assert others <= NOISE[half] * entries + 3
        assert_config(base.folder, folder / "out")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dora", [False, True])
def test_layers_of_ordinary_size(tmp_path, half, dora):
    """Rows and columns enough for sums to be long, and for several tiles."""
    stored, dtype = HALVES[half]
    torch.manual_seed(11)
    draw = torch.Generator().manual_seed(11)
    weight = (0.02 * torch.randn(1500, 1100, generator=draw)).to(stored)
    model = torch.nn.Sequential(torch.nn.Linear(1100, 1500, bias=False, dtype=stored))
    model[0].weight.data = weight
    base = tmp_path / "base"
    base.mkdir()
    save_file({"0.weight": weight}, base / "model.safetensors")
    chosen = {"r": 16, "lora_alpha": 32, "use_dora": dora}
    live = peft.get_peft_model(model, peft.LoraConfig(**chosen, target_modules=["0"]))
    with torch.no_grad():
        live.base_model.model[0].lora_B["default"].weight.normal_(0, 0.01, generator=draw)
    live.save_pretrained(tmp_path / "adapter")

    pa.merge(base, tmp_path / "adapter", tmp_path / "out")

    merged = tensors_of(tmp_path / "out")["0.weight"]
    exact, size = exact_updates(tmp_path / "adapter", chosen)["0"](weight.double().numpy())
    others = assert_rounded_once(merged.double().numpy(), exact, size, dtype)
    assert others <= NOISE[half] * merged.numel()


def test_the_check_itself_sees_a_second_rounding():
    """An update that is rounded before it is added, as some tools do, does not pass."""
    draw = np.random.default_rng(0)
    w = draw.normal(size=(64, 64)).astype(ml_dtypes.bfloat16).astype(np.float64)
    delta = 0.1 * draw.normal(size=w.shape)
    twice = (w + delta.astype(ml_dtypes.bfloat16).astype(np.float64)).astype(ml_dtypes.bfloat16).astype(np.float64)
    with pytest.raises(AssertionError):
        assert assert_rounded_once(twice, w + delta, abs(w) + abs(delta), ml_dtypes.bfloat16) <= 1e-4 * w.size + 3
