"""What `inspect` tells of an adapter: the figures of factors, and the arrays of methods that have none."""

from __future__ import annotations

import numpy as np
import pytest

import peftarray as pa
from peftarray.cli.render import inspection_text
from peftarray.formats.peft_writer import save_adapters

MODULES = {"block.q_proj": (8, 6), "block.up_proj": (6, 8)}


def saved(config, folder):
    """Adapters of both modules, away from their first values."""
    draw = np.random.default_rng(0)
    adapters = {}
    for name, shape in MODULES.items():
        adapter = config.init(np.ones(shape, np.float32), name=name)
        params = {key: array + draw.standard_normal(array.shape) for key, array in adapter.params.items()}
        adapters[name] = pa.Adapter(adapter.config, adapter.layer, params)
    save_adapters(folder, config, adapters)
    return adapters


def test_factors_have_a_rank_a_norm_and_a_spectrum(tmp_path):
    adapters = saved(pa.LoraConfig(r=2, lora_alpha=6), tmp_path)
    found = pa.inspect(tmp_path)
    assert found.facts["method"] == "LORA"
    assert {module.name for module in found.modules} == set(MODULES)
    for module in found.modules:
        params = adapters[module.name].params
        update = 3 * params["lora_B"] @ params["lora_A"]
        assert module.rank == 2
        assert module.norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
        np.testing.assert_allclose(module.spectrum[:2], np.linalg.svd(update)[1][:2], rtol=1e-5)
        assert module.name in inspection_text(found)


@pytest.mark.parametrize(
    "config",
    [
        pa.BOFTConfig(boft_block_size=2),
        pa.IA3Config(),
        pa.LoHaConfig(r=2),
        pa.LoKrConfig(r=1),
        pa.OFTConfig(oft_block_size=2),
    ],
    ids=lambda config: config.peft_type,
)
def test_other_methods_show_their_arrays(tmp_path, config):
    adapters = saved(config, tmp_path)
    found = pa.inspect(tmp_path)
    assert not found.replaced
    assert {module.name: module.shapes for module in found.modules} == {
        name: {key: array.shape for key, array in adapter.params.items()} for name, adapter in adapters.items()
    }
    text = inspection_text(found)
    assert all(name in text for adapter in adapters.values() for name in adapter.params)


def test_arrays_that_layers_share_stand_once(tmp_path):
    config = pa.VeraConfig(r=4)
    weight = np.ones((8, 8), np.float32)
    adapters = {name: config.init(weight, name=name) for name in MODULES}
    save_adapters(tmp_path, config, adapters)
    found = pa.inspect(tmp_path)
    assert found.shared == {"vera_A": (4, 8), "vera_B": (8, 4)}
    assert "shared by all: vera_A 4x8, vera_B 8x4" in inspection_text(found)
    assert all(set(module.shapes) == {"vera_lambda_b", "vera_lambda_d"} for module in found.modules)
