"""Merging with the updates computed by every array library, wherever its arrays lie."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from checkpoints import layer_shapes, read_tensors, write_base

import peftarray as pa
from peftarray import Adapter, BOFTConfig, ConfigError, LoraConfig, UnsupportedError
from peftarray.backend import backend_names, load_backend
from peftarray.formats.peft_writer import save_adapters

METHODS = [
    LoraConfig(r=2),
    LoraConfig(r=2, use_dora=True),
    pa.AdaLoraConfig(init_r=3),
    BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2),
    pa.IA3Config(feedforward_modules=["up_proj"], target_modules=["q_proj", "up_proj"]),
    pa.LoHaConfig(r=2),
    pa.LoKrConfig(r=2),
    pa.OFTConfig(oft_block_size=4, coft=True, eps=0.1),
    pa.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
]
NAMES = [method.peft_type + ("-dora" if getattr(method, "use_dora", False) else "") for method in METHODS]
TARGETS = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture(params=[name for name in backend_names() if name != "numpy"])
def backend(request) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    try:
        load_backend(request.param).from_host(np.zeros(1, np.float32))
    except Exception as error:
        pytest.skip(f"{request.param} has no device here ({error})")
    return request.param


def based(folder: Path, dtype: type = np.float32) -> Path:
    write_base(folder / "base", dtype=dtype)
    return folder / "base"


def trained(config, folder: Path) -> Path:
    """An adapter of a method whose arrays are all away from their first values."""
    config = config if config.target_modules else dataclasses.replace(config, target_modules=TARGETS)
    draw = np.random.default_rng(1)
    adapters = {}
    for layer in range(2):
        for name, shape in layer_shapes(layer).items():
            if name.rpartition(".")[2] not in config.target_modules:
                continue
            adapter = config.init(np.ones(shape, np.float32), name=name)
            table = adapter.config.params(adapter.layer)
            moved = {
                key: array if table[key].frozen else array + 0.1 * draw.standard_normal(array.shape).astype(np.float32)
                for key, array in adapter.params.items()
            }
            adapters[name] = Adapter(adapter.config, adapter.layer, moved)
    save_adapters(folder, config, adapters)
    return folder


@pytest.mark.parametrize("config", METHODS, ids=NAMES)
def test_every_library_writes_what_numpy_writes(tmp_path, backend, config):
    base = based(tmp_path)
    adapter = trained(config, tmp_path / "adapter")
    pa.merge(base, adapter, tmp_path / "here", threads=2, verify=True)
    report = pa.merge(base, adapter, tmp_path / "there", backend=backend, threads=2, verify=True)
    here, there = read_tensors(tmp_path / "here"), read_tensors(tmp_path / "there")
    assert here.keys() == there.keys()
    assert {tensor.name for tensor in report.tensors} == {
        name for name, before in read_tensors(base).items() if (here[name] != before).any()
    }
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-6 * np.abs(values).max(), err_msg=name)


def test_weights_of_64_bits_stay_so_or_are_refused(tmp_path, backend):
    base = based(tmp_path, np.float64)
    adapter = trained(LoraConfig(r=2), tmp_path / "adapter")
    pa.merge(base, adapter, tmp_path / "here")
    kept = load_backend(backend).to_host(load_backend(backend).from_host(np.zeros(1))).dtype == np.float64
    if not kept:
        with pytest.raises(UnsupportedError, match="would lose digits"):
            pa.merge(base, adapter, tmp_path / "there", backend=backend)
        return
    pa.merge(base, adapter, tmp_path / "there", backend=backend)
    here, there = read_tensors(tmp_path / "here"), read_tensors(tmp_path / "there")
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"backend": "abacus"}, "no backend 'abacus'"),
        ({"backend": "numpy", "device": "cuda:0"}, "NumPy has 'cpu' alone"),
        ({"backend": "torch", "device": "abacus:0"}, "device is 'abacus:0'"),
        ({"backend": "jax", "device": "abacus:0"}, "device is 'abacus:0'"),
    ],
)
def test_places_that_do_not_exist(tmp_path, where, words):
    base = based(tmp_path)
    adapter = trained(LoraConfig(r=2), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=words) as caught:
        pa.merge(base, adapter, tmp_path / "out", **where)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_device_by_its_name(tmp_path):
    base = based(tmp_path)
    adapter = trained(LoraConfig(r=2), tmp_path / "adapter")
    pa.merge(base, adapter, tmp_path / "here")
    for backend, device in (("torch", "cpu"), ("jax", "cpu"), ("jax", "cpu:0"), ("array_api_strict", "device2")):
        (tmp_path / backend).mkdir(exist_ok=True)
        pa.merge(base, adapter, tmp_path / backend / device, backend=backend, device=device)
        for name, values in read_tensors(tmp_path / "here").items():
            np.testing.assert_allclose(read_tensors(tmp_path / backend / device)[name], values, rtol=0, atol=1e-7)
