"""LoftQ starts closer to the weight than its codec alone, as PEFT's does; QA-LoRA merges into zero points exactly."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import peftarray as pa
from peftarray.inits.loftq import codec_of_bits, loftq_factors
from peftarray.quant import quantize_array
from peftarray.quantised_weight import QuantisedWeight, quantised_weight


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(48, 64), (64, 32), (33, 70)]),
    rank=st.integers(1, 12),
    transposed=st.booleans(),
    bits=st.sampled_from([4, 8]),
)
def test_loftq_is_closer_than_the_codec_alone(seed, shape, rank, transposed, bits):
    weight, codec = normal(*shape, seed=seed), codec_of_bits(bits)
    alone = np.linalg.norm(codec.dequantize(codec.quantize(weight), shape) - weight)

    def off(iterations: int) -> float:
        parts, up, down = loftq_factors(weight, codec, rank, iterations=iterations, transposed=transposed)
        update = (up @ down).T if transposed else up @ down
        return float(np.linalg.norm(codec.dequantize(parts, shape) + update - weight))

    once = off(1)
    assert once < alone
    # What the turns leave is no guarantee of the method, and is the reason to make several.
    assert off(4) < alone
    rest = codec.dequantize(codec.quantize(weight), shape) - weight
    left = np.linalg.svd(rest, compute_uv=False)[rank:]
    np.testing.assert_allclose(once, np.sqrt((left**2).sum()), rtol=1e-4)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_pefts(iterations, monkeypatch):
    """PEFT's own function computes on a GPU alone; its quantiser and its decomposition are called here as it does."""
    torch, bitsandbytes = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    utils = pytest.importorskip("peft.utils.loftq_utils")
    weight = torch.from_numpy(normal(96, 128))
    rest = weight
    for _ in range(iterations):
        codes, state = bitsandbytes.functional.quantize_4bit(rest, quant_type="nf4", compress_statistics=False)
        base = bitsandbytes.functional.dequantize_4bit(codes, state)
        found = utils._low_rank_decomposition(weight - base, reduced_rank=4)
        rest = weight - found["L"] @ found["R"]
    parts, up, down = loftq_factors(weight, codec_of_bits(4), 4, iterations=iterations)
    torch.testing.assert_close(codec_of_bits(4).dequantize(parts, (96, 128)), base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(up @ down, found["L"] @ found["R"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alpha", [4, 16])
def test_a_model_starts_from_loftq(alpha, asarray, to_numpy, tmp_path):
    values = {"up.weight": normal(64, 32), "down.weight": normal(32, 64, seed=1), "norm.weight": normal(32, seed=2)}
    weights = {name: asarray(array) for name, array in values.items()}
    config = pa.LoraConfig(
        r=4, lora_alpha=alpha, init_lora_weights="loftq", loftq_config={"loftq_iter": 2}, target_modules=["up"]
    )
    model = pa.loftq(weights, config)
    assert isinstance(model.base["down.weight"], QuantisedWeight)
    formed = model.effective_weights()["up.weight"]
    off = np.linalg.norm(to_numpy(formed) - values["up.weight"])
    alone = pa.quantize(weights, "nf4", double=False)["up.weight"]
    assert off < 0.95 * np.linalg.norm(to_numpy(alone.dense()) - values["up.weight"])
    model.save_pretrained(tmp_path)
    again = pa.PeftModel.from_pretrained(model.base, tmp_path)
    assert again.peft_config["default"].init_lora_weights is True
    np.testing.assert_array_equal(to_numpy(again.effective_weights()["up.weight"]), to_numpy(formed))


@pytest.mark.parametrize("codec", ["nf4", "int8", "mlx"])
def test_a_quantised_model_starts_from_what_it_lost(codec, asarray, to_numpy, tmp_path):
    """It stays as it is, and base and update are as close to the weight as LoftQ's first turn gets."""
    values = {"up.weight": normal(64, 32), "down.weight": normal(32, 64, seed=1), "norm.weight": normal(32, seed=2)}
    weights = {name: asarray(array) for name, array in values.items()}
    base = pa.quantize(weights, codec, **({"group": 32} if codec == "mlx" else {}))
    save_file(values, tmp_path / "model.safetensors")
    config = pa.LoraConfig(r=4, lora_alpha=16, target_modules=["up"])
    formed = [
        pa.loftq(base, config, originals=originals).effective_weights()["up.weight"]
        for originals in (weights, values, tmp_path)
    ]
    lost = values["up.weight"] - to_numpy(base["up.weight"].dense())
    least = np.sqrt((np.linalg.svd(lost, compute_uv=False)[4:] ** 2).sum())
    for found in map(to_numpy, formed):
        np.testing.assert_allclose(np.linalg.norm(found - values["up.weight"]), least, rtol=1e-4)


def test_what_cannot_be_the_originals(tmp_path):
    weights = {"up.weight": normal(64, 32), "down.weight": normal(32, 64, seed=1)}
    base = pa.quantize(weights, "nf4", skip=["down"])
    config = pa.LoraConfig(r=4, target_modules=["up"])
    for originals, changes, error, words in (
        ({"upp.weight": weights["up.weight"]}, {}, pa.MatchError, r"no up\.weight.*upp\.weight"),
        ({"up.weight": weights["down.weight"]}, {}, pa.ShapeError, r"\(32, 64\); the base has \(64, 32\)"),
        (tmp_path / "none", {}, pa.FormatError, "does not exist"),
        (weights, {"loftq_config": {"loftq_iter": 2}}, pa.ConfigError, "leave both out"),
        (weights, {"target_modules": ["down"]}, pa.ConfigError, "none of the 1 targets is quantised"),
        (weights, {"r": 40}, pa.ShapeError, "smaller side"),
    ):
        with pytest.raises(error, match=words):
            pa.loftq(base, replace(config, **changes), originals=originals)


def test_what_loftq_refuses():
    weights = {"up.weight": normal(64, 32)}
    for changes, error, words in (
        ({"loftq_config": {"loftq_bits": 2}}, pa.ConfigError, "4 or 8"),
        ({"loftq_config": {"loftq_iter": 0}}, pa.ConfigError, "at least 1"),
        ({"use_dora": True}, pa.UnsupportedError, "use_dora"),
        ({"r": 40}, pa.ShapeError, "smaller side"),
    ):
        with pytest.raises(error, match=words):
            pa.loftq(weights, pa.LoraConfig(target_modules=["up"], **changes))


# QA-LoRA.


def qalora(base: Any, *, group: int = 64, **changes: Any) -> pa.Adapter:
    config = pa.LoraConfig(
        r=3, lora_alpha=5, use_qalora=True, qalora_group_size=group, init_lora_weights=False, **changes
    )
    return config.init(base, seed=3)


def test_the_forward_is_pefts():
    torch = pytest.importorskip("torch")
    variant = pytest.importorskip("peft.tuners.lora.variants").QALoraLinearVariant
    weight, x = torch.from_numpy(normal(24, 64)), torch.from_numpy(normal(2, 5, 64, seed=1))
    adapter = qalora(weight, group=16)
    assert tuple(adapter.params["lora_A"].shape) == (3, 4)
    layer = SimpleNamespace(
        lora_A={"a": SimpleNamespace(weight=adapter.params["lora_A"])},
        lora_B={"a": SimpleNamespace(weight=adapter.params["lora_B"])},
        lora_dropout={"a": torch.nn.Identity()},
        scaling={"a": 5 / 3},
        qalora_group_size={"a": 16},
        training=False,
        in_features=64,
    )
    torch.testing.assert_close(adapter.forward(x, weight), variant.forward(layer, "a", x, x @ weight.T))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_zero_points_take_the_whole_update(bits, group, asarray, to_numpy):
    values = normal(24, 128)
    how, parts = quantize_array(values, "mlx", bits=bits, group=group)
    w = quantised_weight(how, {name: asarray(part) for name, part in parts.items()}, values.shape)
    adapter = qalora(w)
    merged = pa.merge_zero_points(adapter, w)
    for name in ("codes", "scale"):
        assert merged.parts[name] is w.parts[name]
    np.testing.assert_allclose(to_numpy(merged.dense()), to_numpy(adapter.merge(w)), atol=1e-5)
    assert np.abs(to_numpy(merged.dense()) - to_numpy(w.dense())).max() > 0.005
    x = asarray(normal(4, 128, seed=2))
    np.testing.assert_allclose(to_numpy(x @ merged.T), to_numpy(adapter.forward(x, w)), atol=1e-3)


def test_what_zero_points_refuse():
    base = normal(24, 128)
    w = quantised_weight(*quantize_array(base, "mlx", group=64), base.shape)
    with pytest.raises(pa.ShapeError, match="groups of 32"):
        pa.merge_zero_points(qalora(w, group=32), w)
    with pytest.raises(pa.UnsupportedError, match="use_qalora alone"):
        pa.merge_zero_points(pa.LoraConfig(r=2).init(w), w)
    other = quantised_weight(*quantize_array(base, "nf4"), base.shape)
    with pytest.raises(pa.UnsupportedError, match="mlx"):
        pa.merge_zero_points(qalora(other), other)
    with pytest.raises(pa.ConfigError, match="multiple"):
        qalora(w, group=60)
    with pytest.raises(pa.ConfigError, match="use_qalora"):
        pa.LoraConfig(use_qalora=True, use_dora=True)
