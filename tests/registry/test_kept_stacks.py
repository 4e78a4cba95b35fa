"""Stacks of loaded adapters: batches come out as they do without, whatever becomes of the adapters in between."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peftarray as pa
from peftarray import LoraConfig
from peftarray.arrays import is_constant
from peftarray.model import PeftModel, kept_stacks
from peftarray.model.kept_stacks import KeptStacks
from peftarray.slots import thin_factors
from peftarray.stacked_weight import Run, StackedWeight, runs_of

from ..model.cases import base_weights, run

QUERY = "model.layers.0.self_attn.q_proj.weight"
IDS = np.asarray([[1, 7, 3], [0, 1, 10], [2, 2, 5], [9, 0, 4], [3, 3, 8], [6, 1, 1]])
CONFIGS = {
    "a": LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False),
    "b": LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    "c": pa.VeraConfig(r=4, target_modules=["o_proj"], init_weights=False),
    "d": LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        pa.get_peft_model(base_weights(), config, seed=seed).save_pretrained(place / name)
    return {name: place / name for name in CONFIGS}


def loaded(folders: dict[str, Path]) -> PeftModel:
    made = PeftModel(base_weights())
    for name, folder in folders.items():
        made.load_adapter(folder, name)
    return made


@pytest.fixture
def model(folders: dict[str, Path]) -> PeftModel:
    return loaded(folders)


def gathered(model: PeftModel, rows: Sequence[str | None], ids: Any = IDS) -> Any:
    """What a batch gives where nothing is kept."""
    apart = replace(model, kept_stacks=None)
    weights = apart.weights_for(rows)
    assert not isinstance(weights[QUERY], StackedWeight)
    return run(weights, ids)


def kept(model: PeftModel, rows: Sequence[str | None], ids: Any = IDS) -> Any:
    weights = model.weights_for(rows)
    assert isinstance(weights[QUERY], StackedWeight)
    return run(weights, ids)


ROWS = st.lists(st.sampled_from([None, *CONFIGS]), min_size=6, max_size=6)


@pytest.fixture(scope="module")
def model_of_all(folders: dict[str, Path]) -> PeftModel:
    return loaded(folders)


@given(batches=st.lists(ROWS, min_size=1, max_size=4))
def test_batches_one_after_another_are_as_without(model_of_all: PeftModel, batches: list[list[str | None]]):
    for rows in batches:
        found = run(model_of_all.weights_for(rows), IDS)
        wanted = run(replace(model_of_all, kept_stacks=None).weights_for(rows), IDS)
        np.testing.assert_allclose(found, wanted, atol=1e-10)


@given(slots=st.lists(st.none() | st.integers(0, 5), max_size=30))
def test_runs_are_the_slots_of_the_samples(slots: list[int | None]):
    found: list[int | None] = [None] * len(slots)
    for each in runs_of(slots):
        assert each.slot_count * each.width * each.times == each.stop - each.start > 0
        of_run = range(6)[each.slots]
        assert len(of_run) == each.slot_count
        for place in range(each.start, each.stop):
            assert found[place] is None
            found[place] = of_run[(place - each.start) // each.width % each.slot_count]
    assert found == slots


def test_a_batch_in_the_order_of_its_slots_is_one_run():
    assert runs_of(range(64)) == (Run(0, 64, 0, 1),)
    assert runs_of([row % 8 for row in range(64)]) == (Run(0, 64, 0, times=8),)
    assert runs_of([3] * 64) == (Run(0, 64, 3, width=64),)
    assert runs_of([row // 8 for row in range(64)]) == (Run(0, 64, 0, width=8),)


def test_loaded_arrays_cannot_be_written_into_and_trained_ones_can(model: PeftModel, folders: dict[str, Path]):
    array = model.get_adapter("a").adapters["model.layers.0.self_attn.q_proj"].params["lora_A"]
    assert is_constant(array)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    model.load_adapter(folders["a"], "trained", is_trainable=True)
    assert not any(is_constant(array) for array in model.get_adapter("trained").arrays())
    model.set_adapter("a")
    for made in (model.unfreeze(), PeftModel.from_pretrained(base_weights(), folders["a"], is_trainable=True)):
        for array in made.params.values():
            array *= 2


def test_what_is_trained_is_never_kept(model: PeftModel, folders: dict[str, Path]):
    model.load_adapter(folders["a"], "trained", is_trainable=True)
    rows = ["b", "trained", None, "trained", "a", "b"]
    before = run(model.weights_for(rows), IDS)
    assert not isinstance(model.weights_for(rows)[QUERY], StackedWeight)
    for array in model.get_adapter("trained").arrays():
        array *= 2
    after = run(model.weights_for(rows), IDS)
    assert np.abs(after[1] - before[1]).max() > 1e-3
    assert (after[0] == before[0]).all()


def test_an_adapter_that_takes_the_name_of_another_acts(model: PeftModel, folders: dict[str, Path]):
    rows = ["a", "b", None, "b", "a", "d"]
    before = kept(model, rows)
    model.delete_adapter("a")
    model.load_adapter(folders["d"], "a")
    after = kept(model, rows)
    np.testing.assert_allclose(after, gathered(model, rows), atol=1e-10)
    assert np.abs(after[0] - before[0]).max() > 1e-3


def test_scales_act(model: PeftModel):
    rows = ["a", "b", None, "b", "a", "d"]
    before = kept(model, rows)
    model.set_scale("b", 0.5)
    after = kept(model, rows)
    np.testing.assert_allclose(after, gathered(model, rows), atol=1e-10)
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_stacks_go_with_their_adapters(model: PeftModel):
    kept(model, ["a", "b", "d", "b", "a", "d"])
    assert model.kept_stacks._kept is not None
    for name in ("d", "a", "b"):
        assert model.kept_stacks._kept is not None
        model.delete_adapter(name)
        gc.collect()
    assert model.kept_stacks._kept is None


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose factors are gathered for stacks."""
    seen: list[str] = []

    def counted(adapter: Any, **options: Any) -> Any:
        seen.append(adapter.layer.name)
        return thin_factors(adapter, **options)

    monkeypatch.setattr(kept_stacks, "thin_factors", counted)
    return seen


def test_only_adapters_that_are_new_are_gathered(model: PeftModel, folders: dict[str, Path], gathering: list[str]):
    """And what stood in a slot before is not seen by the next that gets it, whichever layers they have."""
    for rows, new in [
        (["b", "d", "b", None, "d", "b"], 12),  # two layers in each of three blocks
        (["d", "b", "b", "b", None, "d"], 0),
        (["a", "b", "d", "b", "a", "d"], 3),
    ]:
        np.testing.assert_allclose(kept(model, rows), gathered(model, rows), atol=1e-10)
        assert len(gathering) == new
        gathering.clear()
    slot = {one.found(): slot for one, slot in model.kept_stacks._kept.slots.items()}[model.get_adapter("d")]
    model.delete_adapter("d")
    gc.collect()
    model.load_adapter(folders["a"], "small")
    rows = ["small", "b", None, "b", "a", "small"]
    np.testing.assert_allclose(kept(model, rows), gathered(model, rows), atol=1e-10)
    assert len(gathering) == 3
    assert slot in model.kept_stacks._kept.slots.values()


def test_an_adapter_that_fits_no_slot_makes_new_stacks(model: PeftModel, tmp_path: Path):
    kept(model, ["a", "b", "a", "b", "a", "b"])
    wide = LoraConfig(r=9, target_modules=["q_proj"], init_lora_weights=False)
    pa.get_peft_model(base_weights(), wide).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "wide")
    rows = ["wide", "b", None, "wide", "a", "d"]
    np.testing.assert_allclose(kept(model, rows), gathered(model, rows), atol=1e-10)


def test_batches_of_threads_bring_adapters_at_the_same_time(model: PeftModel, folders: dict[str, Path]):
    for number in range(60):
        model.load_adapter(folders[["a", "b", "d"][number % 3]], f"more{number}")
    batches = [[f"more{(7 * batch + row) % 60}" for row in range(6)] for batch in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda rows: run(model.weights_for(rows), IDS), batches))
    for rows, y in zip(batches, found, strict=True):
        np.testing.assert_allclose(y, gathered(model, rows), atol=1e-10)


def test_no_more_than_64_are_kept(model: PeftModel, folders: dict[str, Path]):
    for number in range(70):
        model.load_adapter(folders["a"], f"more{number}")
    for first in range(0, 70, 7):
        kept(model, [f"more{first + place}" for place in range(6)])
        assert len(model.kept_stacks._kept.slots) <= 64
    rows = [f"more{number}" for number in range(70)]
    ids = np.resize(IDS, (70, 3))
    np.testing.assert_allclose(kept(model, rows, ids), gathered(model, rows, ids), atol=1e-10)


def test_inputs_that_are_traced_have_gradients(model: PeftModel):
    rows = ["a", "b", None, "b", "a", "d"]
    weights = model.weights_for(rows)
    x = np.random.default_rng(0).standard_normal((6, 2, base_weights()[QUERY].shape[1]))

    def loss(params: Any, weight: Any) -> Any:
        return np.sum(np.square(params["x"] @ weight.T))

    value, found = pa.autodiff.value_and_grad(loss)({"x": x}, weights[QUERY])
    again, wanted = pa.autodiff.value_and_grad(loss)({"x": x}, weights[QUERY]._mixed)
    assert value == pytest.approx(again, rel=1e-10)
    np.testing.assert_allclose(found["x"], wanted["x"], rtol=1e-8)


def test_other_uses_of_the_weight_are_as_without(model: PeftModel):
    rows = ["a", "b", None, "b", "a", "d"]
    weight = model.weights_for(rows)[QUERY]
    plain = weight._mixed
    for make in (lambda w: w + 1, lambda w: w[0], np.sum):
        with pytest.raises(pa.UnsupportedError, match="different weights"):
            make(weight)
    x = np.ones((6, 2, weight.shape[0]))
    np.testing.assert_allclose(x @ weight, x @ plain, atol=1e-10)
    with pytest.raises(pa.ShapeError, match="6 samples"):
        np.ones((5, weight.shape[1])) @ weight.T
    assert (weight.shape, weight.T.shape, weight.dtype) == (plain.shape, plain.T.shape, plain.dtype)


def test_a_model_with_stacks_can_be_pickled(model: PeftModel):
    rows = ["a", "b", None, "b", "a", "d"]
    wanted = kept(model, rows)
    assert isinstance(pickle.loads(pickle.dumps(model.kept_stacks)), KeptStacks)
    np.testing.assert_array_equal(kept(model, rows), wanted)
