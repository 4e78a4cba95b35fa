"""AdaLoRA's budget against PEFT's allocator: the same triples pruned at every step, the same penalty."""

from __future__ import annotations

import types
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftarray import AdaLoraConfig, ConfigError
from peftarray.methods.adalora_budget import allocate, budget_at, orthogonality_penalty, pruned

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")


class Layers(torch.nn.Module):
    """Linear layers that are never called; the loss is what the adapters add to it."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*shape) for shape in shapes)

    def forward(self) -> Any:
        return types.SimpleNamespace(loss=torch.zeros(()))


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of both classes, with a total rank above the target: PEFT's allocator fails on others."""
    rank = draw(st.integers(2, 6))
    tinit, pruning, tfinal = draw(st.integers(0, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 4))
    shares = st.floats(0.05, 0.95)
    return {
        "init_r": rank,
        "target_r": draw(st.integers(0, rank - 1)),
        "tinit": tinit,
        "tfinal": tfinal,
        "total_step": tinit + pruning + tfinal,
        "deltaT": draw(st.integers(1, 4)),
        "beta1": draw(shares),
        "beta2": draw(shares),
        "orth_reg_weight": draw(st.floats(0, 2)),
    }


def adapters(live: Any) -> dict[str, dict[str, Any]]:
    """The parameters of a live PEFT model, by module."""
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            module, local = name.removesuffix(".default").removeprefix("base_model.model.").split(".lora_")
            found.setdefault(module, {})[f"lora_{local}"] = parameter
    return found


@settings(max_examples=40)
@given(chosen=schedules(), shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4))
def test_the_same_triples_are_pruned_at_every_step(chosen, shapes):
    torch.manual_seed(0)
    target = {"target_modules": r"layers\.\d+"}
    live = peft.get_peft_model(Layers(shapes), peft.AdaLoraConfig(**chosen, **target))
    config = AdaLoraConfig(**chosen)
    state: tuple[Any, Any] = (None, None)
    for step in range(chosen["total_step"]):
        for p in adapters(live).values():
            for parameter in p.values():
                parameter.data.normal_()
                parameter.grad = torch.randn_like(parameter)
        before = {module: {n: x.detach().clone() for n, x in p.items()} for module, p in adapters(live).items()}
        gradients = {module: {n: x.grad for n, x in p.items()} for module, p in adapters(live).items()}
        expected = live.base_model.rankallocator.budget_schedule(step)
        total = chosen["init_r"] * len(shapes)
        assert budget_at(config, step, total, len(shapes)) == expected

        live.base_model.update_and_allocate(step)
        after, *state = allocate(config, step, before, gradients, *state)
        for module, p in adapters(live).items():
            for name, parameter in p.items():
                assert torch.equal(after[module][name], parameter.data), (step, module, name)
        pattern = live.peft_config["default"].rank_pattern
        assert pattern == (state[1] and {f"{m}.lora_E.default": keep for m, keep in state[1].items()})

    if state[1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT takes a layer without triples for one that was sharded
            saved = peft.get_peft_model_state_dict(live)
        for module, p in after.items():
            for name, array in pruned(p, state[1][module]).items():
                assert torch.equal(array, saved[f"base_model.model.{module}.{name}"])


@settings(max_examples=20)
@given(chosen=schedules(), seed=st.integers(0, 99))
def test_the_penalty_is_what_peft_adds_to_the_loss(chosen, seed):
    torch.manual_seed(seed)
    live = peft.get_peft_model(
        Layers([(4, 7), (6, 2)]), peft.AdaLoraConfig(**chosen, target_modules=r"layers\.\d+", init_lora_weights=False)
    )
    expected = live.base_model().loss
    arrays = {m: {n: x.detach().numpy() for n, x in p.items()} for m, p in adapters(live).items()}
    found = orthogonality_penalty(AdaLoraConfig(**chosen), arrays)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)


def test_on_every_library(xp, asarray, to_numpy):
    draw = np.random.default_rng(0)
    config = AdaLoraConfig(init_r=4, target_r=1, total_step=3)
    shapes = {"lora_A": (4, 5), "lora_E": (4, 1), "lora_B": (6, 4)}

    def run(make: Any) -> tuple[Any, Any]:
        layers = {m: {n: make(values[m, n]) for n in shapes} for m in "xy"}
        after, *state = allocate(config, 1, layers, layers)
        return after, pruned(after["x"], state[1]["x"])

    values = {(m, n): draw.standard_normal(shape) for m in "xy" for n, shape in shapes.items()}
    here, cut = run(np.asarray)
    there, cut_there = run(asarray)
    assert (here["x"]["lora_E"] == 0).any()
    for name in shapes:
        np.testing.assert_array_equal(to_numpy(there["y"][name]), here["y"][name])
        np.testing.assert_array_equal(to_numpy(cut_there[name]), cut[name])


def test_a_schedule_needs_the_number_of_steps():
    with pytest.raises(ConfigError, match="total_step is None"):
        budget_at(AdaLoraConfig(), 0, 12, 1)
