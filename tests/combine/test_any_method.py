"""Every method on every layer into LoRA; and what a method says of its update holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import peftarray as pa

_spec = importlib.util.spec_from_file_location("law_cases", Path(__file__).parents[1] / "laws" / "cases.py")
assert _spec is not None
assert _spec.loader is not None
law_cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(law_cases)

every_case = pytest.mark.parametrize("case", law_cases.CASES, ids=law_cases.IDS)


def trained(case):
    """An adapter that changes its layer, and the weight as the model stores it."""
    weight = case.weight()
    made = case.init(weight)
    rng = np.random.default_rng(3)
    table = made.config.params(made.layer)
    moved = {
        name: array + 0.3 * rng.standard_normal(array.shape) if name in table and not table[name].frozen else array
        for name, array in made.params.items()
    }
    return pa.Adapter(made.config, made.layer, moved), weight


@every_case
def test_an_update_follows_from_what_the_method_says_it_needs(case):
    adapter, weight = trained(case)
    exact = adapter.layer.view(adapter.merge(weight)) - adapter.layer.view(weight)
    assert np.abs(exact).max() > 1e-3
    found = adapter.update(weight if adapter.config.needs_base() else None)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-10)
    product = adapter.product()
    if product is not None:
        np.testing.assert_allclose(product[0] @ product[1], exact, rtol=0, atol=1e-10)
        assert not adapter.config.needs_base()


@every_case
def test_any_method_becomes_lora(case):
    adapter, weight = trained(case)
    if "bias" in adapter.config.touches(adapter.layer) and adapter.config.needs_base():
        with pytest.raises(pa.UnsupportedError, match="changes the bias by what the bias is"):
            pa.to_lora(adapter, energy=1.0, base=weight)
        return
    fit = pa.to_lora(adapter, energy=1.0, base=weight)
    made = fit.adapter
    assert type(made.config) is pa.LoraConfig
    assert made.config.scale == 1
    np.testing.assert_allclose(made.merge(weight), adapter.merge(weight), rtol=0, atol=1e-9)
    cut = pa.to_lora(adapter, rank=1, base=weight)
    assert cut.rank == 1
    missing = np.linalg.norm(cut.adapter.merge(weight) - adapter.merge(weight))
    assert missing == pytest.approx(cut.error * cut.norm, abs=1e-9)
    bias = np.zeros(adapter.layer.out)
    np.testing.assert_allclose(made.merge_bias(bias), adapter.merge_bias(bias, weight), atol=1e-12)
    if adapter.product() is None:
        with pytest.raises(pa.ConfigError, match="give the rank, or the energy"):
            pa.to_lora(adapter, base=weight)
    if adapter.config.needs_base():
        with pytest.raises(pa.UnsupportedError, match="give the base"):
            pa.to_lora(adapter, rank=1)


def test_what_works_on_factors_needs_factors():
    weight = np.zeros((6, 5))
    adapter = pa.LoHaConfig(r=2, init_weights=False).init(weight)
    with pytest.raises(pa.UnsupportedError, match="linear works on the factors"):
        pa.combine([adapter], combination="linear")
    other = pa.LoraConfig(r=2, init_lora_weights=False).init(weight)
    both = pa.combine([adapter, other], [1.0, -2.0], combination="svd", energy=1.0)
    np.testing.assert_allclose(both.adapter.update(), adapter.update() - 2 * other.update(), atol=1e-12)
    arc = pa.combine([adapter, other], combination="slerp", energy=1.0)
    one, two = adapter.update(), other.update()
    angle = np.arccos((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
    np.testing.assert_allclose(arc.adapter.update(), (one + two) * np.sin(angle / 2) / np.sin(angle), atol=1e-12)
    knots = pa.combine([adapter], combination="knots_ties", density=1.0)
    np.testing.assert_allclose(knots.adapter.update(), one, atol=1e-12)


def test_convolutions_with_groups_are_refused():
    weight = np.zeros((6, 2, 3))
    adapter = pa.LoraConfig(r=2).init(weight, window=pa.Window(groups=2))
    with pytest.raises(pa.UnsupportedError, match="groups"):
        pa.combine([adapter])
