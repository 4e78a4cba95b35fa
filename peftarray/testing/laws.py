"""The laws of a method. Each is a function that raises `LawError` where the law does not hold."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from peftarray.adapter import Adapter
from peftarray.arrays import Array, device, is_writable, namespace
from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError
from peftarray.formats.peft_config import config_from_dict, config_to_dict
from peftarray.formats.peft_writer import load_adapters, save_adapters
from peftarray.layers import contract
from peftarray.method import AdapterConfig
from peftarray.methods import METHODS
from peftarray.testing.trial import LawError, Trial

__all__ = ["ARRAY_LAWS", "LAWS", "VALUE_LAWS", "Law"]

Law = Callable[[Trial], None]


def the_configuration_is_a_value(trial: Trial) -> None:
    """Equal to what its file says; `at(name)` is hashable, the same each time, and at the same name itself."""
    config, method = trial.case.config, trial.method
    _require(hash(config.at(trial.layer.name)) == hash(method), "at(name) has another hash each time")
    _require(config.at(trial.layer.name) == method, "at(name) differs each time")
    _require(method.at(trial.layer.name) == method, f"at(name) of {method} is {method.at(trial.layer.name)}")
    written = config_to_dict(config)
    again = config_to_dict(config_from_dict(written, "its file", method=type(config)))
    _require(again == written, f"it is written as {written} and read as {again}")


def a_file_of_other_shapes_is_refused(trial: Trial) -> None:
    """The table takes what `init` makes, and nothing with an array too many, too few, or of another shape."""
    method, layer, table = trial.method, trial.layer, trial.method.params(trial.layer)
    shapes = {name: array.shape for name, array in trial.case.params().items() if table[name].stored}
    method.check_shapes(shapes, layer)
    for name, shape in shapes.items():
        without = {other: shapes[other] for other in shapes if other != name}
        _refused(partial(method.check_shapes, without, layer), MatchError, f"a file without {name}")
        # What layers share may be larger than this one needs.
        step = 1 if table[name].shared is None else -1
        for axis, wanted in enumerate(table[name].shape):
            other = {**shapes, name: tuple(n + step * (i == axis) for i, n in enumerate(shape))}
            if wanted is not None:
                _refused(partial(method.check_shapes, other, layer), ShapeError, f"{name} of {other[name]}")
    _refused(partial(method.check_shapes, {**shapes, "unknown": (1,)}, layer), MatchError, "an unknown array")


def nothing_is_allocated_to_count(trial: Trial) -> None:
    """`params` and `num_parameters` of a layer of a trillion weights take no memory."""
    shape = tuple(n << 16 if i < 2 else n for i, n in enumerate(trial.layer.shape))
    tracemalloc.start()
    try:
        trial.method.num_parameters(dataclasses.replace(trial.layer, shape=shape))
        peak = tracemalloc.get_traced_memory()[1]
    except ConfigError:
        return  # such a layer is refused
    finally:
        tracemalloc.stop()
    _require(peak < 1 << 20, f"the table of a layer {shape} took {peak >> 20} MiB")


def an_axis_that_is_not_declared_cannot_be_cut(trial: Trial) -> None:
    """Cut along it, `weight` fails or gives something else; otherwise `tiles` could name it."""
    adapter, matrix = trial.adapter(), trial.matrix()
    whole = adapter.config.weight(adapter.prepared, matrix, trial.layer)
    for axis, size in _axes(trial):
        if axis in trial.method.tiles.split():
            continue
        steps = {1, trial.method.granularity(adapter.prepared, trial.layer, axis)}
        for step in steps - {size}:
            try:
                parts = _in_tiles(trial, adapter, matrix, axis, step)
            except Exception:  # it says so in its own way
                continue
            trial.differ(parts, whole, f"cut along {axis} by {step} equals whole; add {axis!r} to tiles")


def init_makes_what_the_table_says(trial: Trial) -> None:
    """Names, axes and sizes of the table are those of the arrays; the count is the sum of the trained sizes."""
    table = trial.method.params(trial.layer)
    adapter = _started(trial)
    if adapter is None:
        return
    _require(set(adapter.params) == set(table), f"init makes {sorted(adapter.params)}, the table has {sorted(table)}")
    for name, row in table.items():
        shape = tuple(adapter.params[name].shape)
        fits = len(shape) == len(row.shape) and all(w in (None, n) for w, n in zip(row.shape, shape, strict=True))
        _require(fits, f"init makes {name} {shape}, the table says {row.shape}")
        _require(len(row.axes.split()) == len(shape), f"{name} {shape} has the axes {row.axes!r}")
    count = sum(math.prod(adapter.params[name].shape) for name, row in table.items() if not row.frozen)
    _require(adapter.num_parameters() == count, f"num_parameters is {adapter.num_parameters()}, the sizes make {count}")
    _require(adapter.freeze().num_parameters() == 0, "a frozen adapter has trained parameters")
    _require(adapter.freeze().unfreeze().num_parameters() == count, "an adapter lost parameters on being unfrozen")


def the_first_state_is_the_one_it_names(trial: Trial) -> None:
    """A new adapter leaves weight and bias alone if `starts_as_identity`, and changes one of them if not."""
    adapter = _started(trial)
    if adapter is None:
        return
    weight, bias = trial.weight(), trial.bias()
    merged = adapter.merge(weight)
    if trial.method.starts_as_identity:
        trial.equal(merged, weight, "a new adapter changes the weight")
        if bias is not None:
            trial.equal(adapter.merge_bias(bias, weight), bias, "a new adapter changes the bias")
    elif "weight" in trial.method.touches(trial.layer):
        trial.differ(merged, weight, "a new adapter changes nothing, and starts_as_identity is False")


def a_seed_gives_the_same_bits_everywhere(trial: Trial) -> None:
    """The same seed and name make the same first values on every library."""
    here = _started(trial, trial.case.weight().astype(np.float32), seed=7)
    there = _started(trial, trial.weight(np.float32), seed=7)
    for name, row in trial.method.params(trial.layer).items():
        if here is not None and there is not None and row.init is not None:
            trial.same_bits(there.params[name], here.params[name], f"{name} differs from NumPy's")


def apply_equals_the_weight(trial: Trial) -> None:
    """`forward(x, W, bias)` is the layer with the merged weight and the merged bias."""
    adapter, x, weight = trial.adapter(), trial.inputs(), trial.weight()
    through = contract(x, trial.layer.view(adapter.merge(weight)), trial.layer)
    trial.equal(adapter.forward(x, weight), through, "forward differs from the merged weight")
    matrix = trial.layer.view(weight)
    update = trial.method.apply_update(adapter.prepared, x, None if trial.method.adds_apart() else matrix, trial.layer)
    trial.equal(contract(x, matrix, trial.layer) + update, through, "apply_update is not what apply adds to the base")
    bias = trial.bias()
    if bias is None:
        return
    merged = adapter.merge_bias(bias, weight)
    if trial.layer.kind == "conv":
        merged = namespace(merged).reshape(merged, (-1, *(1 for _ in trial.layer.kernel)))
    trial.equal(adapter.forward(x, weight, bias=bias), through + merged, "forward differs from the merged bias")


def the_update_is_the_difference(trial: Trial) -> None:
    """`update(p, W) = weight(p, W) - W`, and trained parameters change something."""
    adapter, matrix = trial.adapter(), trial.matrix()
    merged = adapter.config.weight(adapter.prepared, matrix, trial.layer)
    update = adapter.config.update(adapter.prepared, matrix, trial.layer)
    trial.equal(update, merged - matrix, "update differs from weight - W")
    if "weight" in trial.method.touches(trial.layer):
        trial.differ(merged, matrix, "trained parameters change no weight")
    else:
        trial.equal(merged, matrix, "touches does not name the weight, which changes")
    bias = trial.bias()
    if bias is None:
        return
    changed = adapter.merge_bias(bias, trial.weight())
    if "bias" in trial.method.touches(trial.layer):
        trial.differ(changed, bias, "trained parameters change no bias")
    else:
        trial.equal(changed, bias, "touches does not name the bias, which changes")


def unmerge_restores_or_says_to_keep_the_base(trial: Trial) -> None:
    """Unmerging a merged weight gives the base to rounding, or refuses; neither changes an argument."""
    adapter, weight = trial.adapter(), trial.weight()
    merged = adapter.merge(weight)
    try:
        trial.equal(adapter.unmerge(merged), weight, "unmerge(merge(W)) differs from W")
    except UnsupportedError as error:
        _require("keep a copy of the base" in str(error), f"the refusal to unmerge does not say what to do: {error}")
    trial.same_bits(weight, trial.weight(), "merging changed its argument")
    for name, values in trial.adapter().params.items():
        trial.same_bits(adapter.params[name], values, f"merging changed {name}")


def merging_in_place_is_merging(trial: Trial) -> None:
    """`merge_into` leaves in the weight what `merge` returns, to rounding; where it cannot, it refuses."""
    adapter, weight = trial.adapter(), trial.weight()
    merged = adapter.merge(weight)
    weight = namespace(weight).asarray(weight, copy=True)
    if not is_writable(weight):
        _refused(lambda: adapter.merge_into(weight), UnsupportedError, "a weight that cannot be written into")
        return
    adapter.merge_into(weight)
    trial.equal(weight, merged, "merge_into differs from merge")
    for name, values in trial.adapter().params.items():
        trial.same_bits(adapter.params[name], values, f"merge_into changed {name}")


def the_scale_is_linear(trial: Trial) -> None:
    """Where the update does not depend on the base, equal steps of `scale` are equal steps of the update."""
    adapter, matrix = trial.adapter(), trial.matrix()
    once = _update(adapter, matrix)
    if not np.array_equal(trial.host(once), trial.host(_update(adapter, 2 * matrix))):
        return
    for field in _factors_of_the_scale(trial.method):
        value = getattr(trial.method, field)
        twice, thrice = (
            _update(
                dataclasses.replace(adapter, config=dataclasses.replace(trial.method, **{field: n * value})), matrix
            )
            for n in (2, 3)
        )
        trial.equal(thrice - twice, twice - once, f"the update is not linear in {field}")


def library_dtype_and_device_stay(trial: Trial) -> None:
    """float32 in, float32 out, of the same library on the same device; no float64 leaks in."""
    weight, x = trial.weight(np.float32), trial.inputs(np.float32)
    adapter = _started(trial, weight)
    if adapter is None:
        return
    made = {
        "merge": adapter.merge(weight),
        "forward": adapter.forward(x, weight, bias=trial.bias(np.float32)),
        **{name: array for name, array in adapter.params.items() if "float" in str(array.dtype)},
        **{name: array for name, array in adapter.prepared.items() if "float" in str(array.dtype)},
    }
    for name, array in made.items():
        _require(type(array) is type(weight), f"{name} is a {type(array)}, the weight a {type(weight)}")
        _require(array.dtype == weight.dtype, f"{name} is {array.dtype}, the weight {weight.dtype}")
        _require(device(array) == device(weight), f"{name} is on {device(array)}, the weight on {device(weight)}")


def libraries_agree_with_numpy(trial: Trial) -> None:
    """Every library merges, applies and changes the bias as NumPy does, but for rounding."""
    here = Trial(trial.case, dataclasses.replace(trial.library, name="numpy", from_host=np.asarray, to_host=np.asarray))
    merged, expected = (each.adapter().merge(each.weight()) for each in (trial, here))
    trial.equal(merged, expected, "merge differs from NumPy's")
    y, expected = (each.adapter().forward(each.inputs(), each.weight(), bias=each.bias()) for each in (trial, here))
    trial.equal(y, expected, "forward differs from NumPy's")


def cut_and_concatenated_equals_whole(trial: Trial) -> None:
    """Along every axis in `tiles`, at multiples of the granularity."""
    _check_cuts(trial, lambda step, size: [step, 2 * step, 3 * step])


def halves_make_the_whole(trial: Trial) -> None:
    """The same in two tiles: a library takes the cuts."""
    _check_cuts(trial, lambda step, size: [max(1, size // step // 2) * step])


def half_precision_is_storage_alone(trial: Trial) -> None:
    """A weight or parameters in float16 or bfloat16 are computed with in float32, and the result is rounded once."""
    adapter = trial.adapter(np.float32)
    for half in _half_dtypes(namespace(trial.weight())):
        weight: np.ndarray = trial.case.weight().astype(half)
        merged = adapter.merge(trial.library.from_host(weight))
        wide = trial.host(adapter.merge(trial.array(weight.astype(np.float32), np.float32)))
        trial.same_bits(merged, wide.astype(half), f"a weight of {half.__name__} is not computed with in float32")
        stored = {n: p.astype(half) if p.dtype.kind == "f" else p for n, p in trial.case.params().items()}
        short = {n: trial.library.from_host(p) for n, p in stored.items()}
        long = {n: trial.array(p.astype(np.float32) if p.dtype == half else p, np.float32) for n, p in stored.items()}
        one, other = (dataclasses.replace(adapter, params=p).merge(trial.weight(np.float32)) for p in (short, long))
        trial.same_bits(one, other, f"parameters of {half.__name__} are not computed with in float32")


def what_is_written_is_read_back(trial: Trial) -> None:
    """An adapter in PEFT's layout, read again, has the same configuration and the same bits."""
    adapter, weight, name = trial.adapter(np.float32), trial.weight(np.float32), trial.layer.name
    config = trial.case.config
    if config.why_not_mergeable() is not None:
        return  # the file does not hold all of it
    if config.target_modules is None:
        config = dataclasses.replace(config, target_modules=re.escape(name))
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(Path(folder) / "adapter", config, {name: adapter})
        weights = {f"{name}.weight": weight, f"{name}.bias": trial.bias(np.float32)}
        weights = {key: array for key, array in weights.items() if array is not None}
        known = config.peft_type in METHODS
        loaded = load_adapters(
            Path(folder) / "adapter", weights, config=None if known else config, layers={name: trial.layer}
        )
    again = loaded.adapters[name]
    _require(again.config == adapter.config, f"{adapter.config} is read as {again.config}")
    for key, row in trial.method.params(trial.layer).items():
        if row.stored:
            trial.same_bits(again.params[key], adapter.params[key], f"{key} is read back otherwise")
    trial.equal(again.merge(weight), adapter.merge(weight), "the read adapter merges otherwise")


VALUE_LAWS: tuple[Law, ...] = (
    the_configuration_is_a_value,
    a_file_of_other_shapes_is_refused,
    nothing_is_allocated_to_count,
    cut_and_concatenated_equals_whole,
    an_axis_that_is_not_declared_cannot_be_cut,
)
"""Laws that no library can break alone: one is enough to try them on."""

ARRAY_LAWS: tuple[Law, ...] = (
    init_makes_what_the_table_says,
    the_first_state_is_the_one_it_names,
    a_seed_gives_the_same_bits_everywhere,
    apply_equals_the_weight,
    the_update_is_the_difference,
    unmerge_restores_or_says_to_keep_the_base,
    merging_in_place_is_merging,
    the_scale_is_linear,
    library_dtype_and_device_stay,
    libraries_agree_with_numpy,
    halves_make_the_whole,
    half_precision_is_storage_alone,
    what_is_written_is_read_back,
)
LAWS = (*VALUE_LAWS, *ARRAY_LAWS)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise LawError(message)


def _refused(act: Callable[[], Any], kind: type[Exception], what: str) -> None:
    try:
        act()
    except kind:
        return
    message = f"{what} is not refused by {kind.__name__}"
    raise LawError(message)


def _started(trial: Trial, weight: Array = None, *, seed: int = 0) -> Adapter | None:
    """A new adapter; None where a seed alone cannot make one."""
    try:
        return trial.case.init(trial.weight() if weight is None else weight, seed=seed)
    except UnsupportedError:
        return None


def _axes(trial: Trial) -> list[tuple[str, int]]:
    """The axes along which a tile may be cut, with their lengths; convolutions are never cut along `in`."""
    layer = trial.layer
    return [("out", layer.out), *([] if layer.kind == "conv" else [("in", layer.fan_in)])]


def _check_cuts(trial: Trial, steps: Callable[[int, int], list[int]]) -> None:
    adapter, matrix = trial.adapter(), trial.matrix()
    whole = adapter.config.weight(adapter.prepared, matrix, trial.layer)
    for axis, size in _axes(trial):
        if axis in trial.method.tiles.split():
            for step in steps(trial.method.granularity(adapter.prepared, trial.layer, axis), size):
                parts = _in_tiles(trial, adapter, matrix, axis, step)
                trial.equal(parts, whole, f"cut along {axis} by {step} differs from whole")


def _in_tiles(trial: Trial, adapter: Adapter, matrix: Array, axis: str, step: int) -> Array:
    method, layer = adapter.config, trial.layer
    size = dict(_axes(trial))[axis]
    cut = method.cutter(adapter.prepared, layer, axis)
    parts = []
    for start in range(0, size, step):
        stop = min(start + step, size)
        tile = matrix[start:stop, :] if axis == "out" else matrix[:, start:stop]
        parts.append(method.weight(cut(start, stop), tile, layer))
    return namespace(matrix).concat(parts, axis=0 if axis == "out" else 1)


def _update(adapter: Adapter, matrix: Array) -> Array:
    return adapter.config.update(adapter.prepared, matrix, adapter.layer)


def _factors_of_the_scale(method: AdapterConfig) -> list[str]:
    """The fields that double the scale when they are doubled."""
    found = []
    for item in dataclasses.fields(method):
        value = getattr(method, item.name)
        if type(value) in (int, float) and value:
            try:
                doubled = dataclasses.replace(method, **{item.name: 2 * value})
            except (ConfigError, UnsupportedError):
                continue
            if method.scale and doubled.scale == 2 * method.scale:
                found.append(item.name)
    return found


def _half_dtypes(xp: Any) -> list[type]:
    """NumPy's and ml_dtypes' types for the halves that a library has; NumPy stores ml_dtypes' bfloat16."""
    halves: dict[str, type] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    return [kind for name, kind in halves.items() if hasattr(xp, name) or xp is np]
