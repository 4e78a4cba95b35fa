"""Slots: the update of a chosen slot is the adapter's own, whichever library, and a switch changes no shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peftarray import (
    AdaLoraConfig,
    Adapter,
    ConfigError,
    LoraConfig,
    OFTConfig,
    ShapeError,
    UnsupportedError,
    VeraConfig,
)
from peftarray.slots import put_slot, slot_factors, slot_update, stack_slots

CONFIGS = (
    LoraConfig(r=2, init_lora_weights=False),
    LoraConfig(r=5, lora_alpha=3, init_lora_weights=False),
    VeraConfig(r=3, init_weights=False),
    AdaLoraConfig(init_r=4, init_lora_weights=False),
)


def made(weight: Any, kind: str = "linear") -> list[Adapter]:
    kinds = [config for config in CONFIGS if kind in config.kinds]
    return [config.init(weight, seed=seed, name="proj", kind=kind) for seed, config in enumerate(kinds)]


def places(values: list[int], asarray: Any, xp: Any) -> Any:
    return asarray(np.asarray(values), dtype=xp.int64)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_slot_is_the_adapter(kind, asarray, to_numpy, xp):
    draw = np.random.default_rng(0)
    weight = asarray(draw.standard_normal((7, 5)))
    adapters, scales = made(weight, kind), (1.0, 0.5, 2.0, 1.0)
    stacks = stack_slots([slot_factors(a, 6, scale=s) for a, s in zip(adapters, scales, strict=False)])
    chosen = [1, 0, 2, 1]
    x = asarray(draw.integers(0, 7, (4, 3)) if kind == "embedding" else draw.standard_normal((4, 3, 5)))
    flat = xp.reshape(x, (-1, *x.shape[2:]))
    layer = adapters[0].layer
    found = to_numpy(slot_update(x, *stacks, places(chosen, asarray, xp), layer))
    rows = to_numpy(slot_update(flat, *stacks, places(chosen, asarray, xp), layer))
    np.testing.assert_allclose(rows, found.reshape(rows.shape), atol=1e-12)
    for row, place in enumerate(chosen):
        one = x[row : row + 1, ...]
        if place:
            wanted = scales[place - 1] * to_numpy(adapters[place - 1].apply_update(one, None))
        else:
            wanted = np.zeros((1, 3, found.shape[-1]))
        np.testing.assert_allclose(found[row : row + 1], wanted, atol=1e-10)
        alone = to_numpy(slot_update(one, *stacks, places([place], asarray, xp), layer))
        np.testing.assert_allclose(alone, wanted, atol=1e-10)


def test_padding_is_exact(asarray, to_numpy):
    weight = asarray(np.random.default_rng(0).standard_normal((7, 5)))
    for adapter in made(weight):
        down, up = slot_factors(adapter, 9)
        own_up, own_down = map(to_numpy, adapter.config.factors(adapter.params, adapter.layer))
        rank = len(own_down)
        np.testing.assert_array_equal(to_numpy(down)[:rank], own_down)
        np.testing.assert_array_equal(to_numpy(up)[:, :rank], own_up)
        assert not to_numpy(down)[rank:].any()
        assert not to_numpy(up)[:, rank:].any()


def test_another_adapter_takes_a_place(asarray, to_numpy):
    weight = asarray(np.random.default_rng(0).standard_normal((7, 5)))
    first, second, third, _ = (slot_factors(adapter, 6) for adapter in made(weight))
    stacks = stack_slots([first, None, second])
    changed = put_slot(stacks, 2, third)
    for old, new, own in zip(stacks, changed, third, strict=True):
        assert new.shape == old.shape
        np.testing.assert_array_equal(to_numpy(new)[2], to_numpy(own))
        np.testing.assert_array_equal(to_numpy(new)[[0, 1, 3]], to_numpy(old)[[0, 1, 3]])
    emptied = put_slot(changed, 2, None)
    np.testing.assert_array_equal(to_numpy(emptied[1]), to_numpy(stacks[1]))
    with pytest.raises(ConfigError, match="slot 0 stays empty"):
        put_slot(stacks, 0, third)
    with pytest.raises(ShapeError, match="a slot holds"):
        put_slot(stacks, 1, slot_factors(made(weight)[0], 7))
    with pytest.raises(ConfigError, match="at least one"):
        stack_slots([])
    assert stack_slots([], like=first)[0].shape == (1, 6, 5)


def test_what_has_no_slot_is_refused():
    weight = np.ones((6, 6), np.float32)
    for config, words in (
        (LoraConfig(use_dora=True), "no update of two thin factors"),
        (OFTConfig(oft_block_size=3), "no update of two thin factors"),
        (LoraConfig(lora_bias=True), "changes the bias"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            slot_factors(config.init(weight), 8)
    with pytest.raises(UnsupportedError, match="convolution"):
        slot_factors(LoraConfig(r=2).init(np.ones((4, 4, 3), np.float32)), 8)
    adapter = LoraConfig(r=4).init(weight)
    with pytest.raises(ConfigError, match="max_rank=4"):
        slot_factors(adapter, 2)
    with pytest.raises(ShapeError, match="rows are not those of 2 samples"):
        slot_update(np.ones((3, 6)), *stack_slots([slot_factors(adapter, 4)]), np.asarray([0, 1]), adapter.layer)


@pytest.mark.parametrize("library", ["jax"], indirect=True)
def test_a_switch_traces_nothing_anew(asarray, to_numpy, xp):
    import jax

    weight = asarray(np.random.default_rng(0).standard_normal((7, 5)))
    adapters = made(weight)
    traces: list[int] = []

    @jax.jit
    def update(x: Any, down: Any, up: Any, index: Any) -> Any:
        traces.append(1)
        return slot_update(x, down, up, index, adapters[0].layer)

    x = asarray(np.ones((2, 3, 5)))
    stacks = stack_slots([slot_factors(adapter, 6) for adapter in adapters[:2]])
    for chosen in ([0, 1], [2, 2], [1, 0]):
        update(x, *stacks, places(chosen, asarray, xp))
    stacks = put_slot(stacks, 1, slot_factors(adapters[3], 6))
    found = update(x, *stacks, places([1, 1], asarray, xp))
    np.testing.assert_allclose(to_numpy(found), to_numpy(adapters[3].apply_update(x, None)), atol=1e-10)
    assert len(traces) == 1
