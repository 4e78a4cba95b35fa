"""The laws of `peftarray.method`, each one test over all cases, on every array library."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray import Adapter, LoraConfig, UnsupportedError
from peftarray.arrays import namespace

from .cases import CASES, IDS, Case

every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
AXES = ("out", "in")


def numbers(arrays: dict, asarray) -> dict:
    return {name: asarray(array) for name, array in arrays.items()}


def sizes(case: Case) -> dict[str, int]:
    return {"out": case.layer.out, "in": case.layer.fan_in}


def tile(matrix, axis: str, start: int, stop: int):
    return matrix[start:stop, ...] if axis == "out" else matrix[:, start:stop]


def in_tiles(case: Case, axis: str, step: int, prepared: dict, matrix) -> np.ndarray:
    method, layer, size = case.method, case.layer, sizes(case)[axis]
    cut = method.cutter(prepared, layer, axis)
    parts = [
        method.weight(cut(i, min(i + step, size)), tile(matrix, axis, i, min(i + step, size)), layer)
        for i in range(0, size, step)
    ]
    return namespace(matrix).concat(parts, axis=0 if axis == "out" else 1)


@every_case
def test_the_table_is_what_a_file_must_hold(case, xp, asarray):
    params = numbers(case.params(), asarray)
    stored = {name: tuple(params[name].shape) for name, row in case.method.params(case.layer).items() if row.stored}
    case.method.check_shapes(stored, case.layer)
    for name, array in params.items():
        assert len(case.method.params(case.layer)[name].axes.split()) == array.ndim


@every_case
def test_init_makes_what_the_table_says_and_counts_it(case, asarray):
    weight = asarray(case.weight())
    adapter = case.config.init(weight, name=case.layer.name, kind=case.kind, transposed=case.transposed)
    table = case.method.params(case.layer)
    assert set(adapter.params) == set(table)
    trained = [name for name, row in table.items() if not row.frozen]
    assert adapter.num_parameters() == sum(int(np.prod(adapter.params[name].shape)) for name in trained)
    assert adapter.freeze().num_parameters() == 0
    assert adapter.freeze().unfreeze().num_parameters() == adapter.num_parameters()


@every_case
def test_cut_and_concatenated_equals_whole(case, xp, asarray, to_numpy):
    prepared = case.method.prepare(numbers(case.params(), asarray), case.layer)
    matrix = case.layer.view(asarray(case.weight()))
    whole = to_numpy(case.method.weight(prepared, matrix, case.layer))
    axes = [axis for axis in case.method.tiles.split() if axis == "out" or case.kind != "conv"]
    for axis in axes:
        step = case.method.granularity(prepared, case.layer, axis)
        for rows in {step, 2 * step, 4 * step}:
            np.testing.assert_allclose(to_numpy(in_tiles(case, axis, rows, prepared, matrix)), whole, atol=1e-12)


@every_case
def test_cuts_along_an_undeclared_axis_fail_or_differ(case):
    prepared = case.method.prepare(case.params(), case.layer)
    matrix = case.layer.view(case.weight())
    whole = case.method.weight(prepared, matrix, case.layer)
    for axis in set(AXES) - set(case.method.tiles.split()):
        try:
            tiled = in_tiles(case, axis, 1, prepared, matrix)
        except (ValueError, IndexError):
            continue
        assert not np.allclose(tiled, whole, atol=1e-6)


@every_case
def test_apply_equals_the_effective_weight(case, asarray, to_numpy):
    params, weight = numbers(case.params(), asarray), asarray(case.weight())
    x = asarray(case.inputs())
    adapter = Adapter(case.method, case.layer, params)
    plain = LoraConfig(r=1).at("").init(weight, kind=case.kind, transposed=case.transposed, window=case.layer.window)
    through = plain.forward(x, adapter.merge(weight))
    np.testing.assert_allclose(to_numpy(adapter.forward(x, weight)), to_numpy(through), atol=1e-10)


@every_case
def test_update_is_the_difference(case, asarray, to_numpy):
    prepared = case.method.prepare(numbers(case.params(), asarray), case.layer)
    matrix = case.layer.view(asarray(case.weight()))
    effective = to_numpy(case.method.weight(prepared, matrix, case.layer))
    update = to_numpy(case.method.update(prepared, matrix, case.layer))
    np.testing.assert_allclose(effective - to_numpy(matrix), update, atol=1e-12)
    assert np.abs(update).max() > 1e-3


@every_case
def test_the_first_state_is_the_identity(case, asarray, to_numpy):
    weight = asarray(case.weight())
    adapter = case.config.init(weight, name=case.layer.name, kind=case.kind, transposed=case.transposed)
    start = case.weight()
    if case.method.reads_base(case.layer):
        # KaSA first drops the base's smallest singular triples, as many as its rank.
        u, s, vh = np.linalg.svd(case.layer.view(start), full_matrices=False)
        keep = len(s) - case.method.r
        start = case.layer.unview((u[:, :keep] * s[:keep]) @ vh[:keep])
    np.testing.assert_allclose(to_numpy(adapter.merge(weight)), start, atol=1e-12)


@every_case
def test_unmerge_restores_or_says_to_keep_the_base(case, asarray, to_numpy):
    adapter = Adapter(case.method, case.layer, numbers(case.params(), asarray))
    merged = adapter.merge(asarray(case.weight()))
    if getattr(case.method, "use_dora", False) or case.config.peft_type == "TRAINABLE_TOKENS":
        with pytest.raises(UnsupportedError, match="keep a copy of the base"):
            adapter.unmerge(merged)
        return
    np.testing.assert_allclose(to_numpy(adapter.unmerge(merged)), case.weight(), atol=1e-12)


@every_case
def test_libraries_agree_with_numpy(case, asarray, to_numpy):
    adapter = Adapter(case.method, case.layer, numbers(case.params(), asarray))
    expected = Adapter(case.method, case.layer, case.params()).merge(case.weight())
    np.testing.assert_allclose(to_numpy(adapter.merge(asarray(case.weight()))), expected, atol=1e-12)


@every_case
def test_dtype_device_and_library_stay(case, xp, device, asarray):
    weight = asarray(case.weight().astype(np.float32))
    adapter = case.config.init(weight, name=case.layer.name, kind=case.kind, transposed=case.transposed)
    merged = adapter.merge(weight)
    assert type(merged) is type(weight)
    assert merged.dtype == weight.dtype
    assert namespace(merged) is namespace(weight)
    assert all(array.dtype == weight.dtype for array in adapter.params.values())
    assert str(merged.device) == str(weight.device)


@every_case
def test_a_seed_gives_the_same_bits_everywhere(case, asarray, to_numpy):
    weight = case.weight().astype(np.float32)
    here = case.config.init(weight, seed=7, name=case.layer.name, kind=case.kind, transposed=case.transposed)
    there = case.config.init(asarray(weight), seed=7, name=case.layer.name, kind=case.kind, transposed=case.transposed)
    drawn = [name for name, row in case.method.params(case.layer).items() if row.init is not None]
    for name in drawn:
        np.testing.assert_array_equal(to_numpy(there.params[name]), here.params[name])


@every_case
def test_a_method_at_a_name_is_hashable_and_equal(case):
    again = case.config.at(case.layer.name)
    assert hash(again) == hash(case.method)
    assert again == case.method


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
