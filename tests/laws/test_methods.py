"""The laws of the methods: each is tried on every case and on every array library; then on drawn cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peftarray import Adapter, ConfigError, LoraConfig
from peftarray.testing import ARRAY_LAWS, LAWS, VALUE_LAWS, Library, Trial, check_law, find_libraries

from .cases import CASES, IDS

NUMPY = Library("numpy", np.asarray)
every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def laws(chosen):
    return pytest.mark.parametrize("law", chosen, ids=[law.__name__ for law in chosen])


@pytest.fixture(scope="session")
def backend(xp, device) -> Library:
    """The library of `xp` by its backend."""
    name = xp.__name__.removeprefix("array_api_compat.").removesuffix(".numpy")
    found = find_libraries([name])[0]
    return replace(found, from_host=lambda array: found.from_host(array, device=device)) if name == "torch" else found


@every_case
@laws(VALUE_LAWS)
def test_a_law_of_values(law, case):
    check_law(law, Trial(case, NUMPY))


@every_case
@laws(ARRAY_LAWS)
def test_a_law(law, case, backend):
    # JAX compiles every operation for every shape and dtype: one dtype for all laws, its default one, halves the time.
    check_law(law, Trial(case, backend, np.float32 if backend.name == "jax" else np.float64))


@settings(max_examples=300)
@given(data=st.data())
def test_laws_hold_for_layers_of_any_size(data):
    case = data.draw(st.sampled_from(CASES), label="case")
    sizes = st.integers(2, 24)
    rows = st.integers(12, 24) if case.kind == "embedding" else sizes
    kernel = [data.draw(st.integers(1, 3)) for _ in case.layer.kernel]
    shape = (data.draw(rows), data.draw(sizes), *kernel)
    case = replace(case, shape=shape, seed=data.draw(st.integers(0, 99), label="seed"))
    try:
        case.method.prepare(case.params(), case.layer)
    except ConfigError:
        assume(False)
    assume(case.method.num_parameters(case.layer))  # blocks of one number have nothing to turn
    trial = Trial(case, NUMPY, data.draw(st.sampled_from([np.float64, np.float32]), label="dtype"))
    for law in LAWS:
        check_law(law, trial)


@pytest.mark.parametrize("case", [case for case in CASES if getattr(case.config, "kasa_config", None)], ids=str)
def test_kasa_starts_without_the_smallest_singular_triples(case):
    weight = case.weight()
    u, s, vh = np.linalg.svd(case.layer.view(weight), full_matrices=False)
    keep = len(s) - case.method.r
    start = case.layer.unview((u[:, :keep] * s[:keep]) @ vh[:keep])
    np.testing.assert_allclose(case.init(weight).merge(weight), start, atol=1e-12)


def test_lora_bias_adds_its_scaled_bias(asarray, to_numpy):
    config = LoraConfig(r=2, lora_alpha=6, lora_bias=True)
    weight = np.random.default_rng(0).standard_normal((3, 4))
    adapter = config.init(asarray(weight))
    params = dict(adapter.params) | {"lora_B.bias": asarray(np.array([1.0, 2.0, 3.0]))}
    changed = Adapter(adapter.config, adapter.layer, params).merge_bias(asarray(np.ones(3)))
    np.testing.assert_allclose(to_numpy(changed), [4.0, 7.0, 10.0])


@pytest.mark.parametrize("seed", range(3))
def test_two_seeds_differ(seed):
    weight = np.ones((4, 5), np.float32)
    first, second = (LoraConfig().init(weight, seed=s).params["lora_A"] for s in (seed, seed + 1))
    assert (first != second).any()
