"""Factors that torch's layers keep between mixed batches: right after whatever was changed, and no more work than that.

One by one, each row under its adapter, says what is right.
"""

from __future__ import annotations

from typing import Any

import pytest

from peftarray import LoraConfig
from peftarray.model import get_peft_model

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import strategies as st  # noqa: E402
from peftarray.backends import torch_kept  # noqa: E402

from .test_torch_rows import close, ids, one_by_one  # noqa: E402
from .torch_net import Net, randomise  # noqa: E402

NAMES = ["a", "b", "c", "d", "e"]
RANKS = {"a": 2, "b": 2, "c": 3, "d": 1, "e": 2}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def config(name: str) -> LoraConfig:
    return LoraConfig(r=RANKS[name], target_modules=["q_proj", "o_proj"], init_lora_weights=False)


def five() -> Any:
    model = randomise(get_peft_model(Net(), config("a"), adapter_name="a"))
    for seed, name in enumerate(NAMES[1:], start=1):
        model.add_adapter(name, config(name), seed=seed)
    return model.eval()


def array(model: Any, name: str) -> Any:
    return model.get_submodule(LAYER).lora_A[name].weight


def write(model: Any, name: str) -> None:
    array(model, name).mul_(1.5)


def point_elsewhere(model: Any, name: str) -> None:
    array(model, name).data = array(model, name).data * 0.5


def replace(model: Any, name: str) -> None:
    holder = model.get_submodule(LAYER).lora_A[name]
    holder.weight = torch.nn.Parameter(-holder.weight.detach(), requires_grad=False)


def scale(model: Any, name: str) -> None:
    model.set_scale(name, 0.5 if model.get_submodule(LAYER).switch.now.scales.get(name, 1) == 1 else 1)


def swap(model: Any, name: str) -> None:
    """Under the same name, another adapter of another rank."""
    model.set_adapter("a" if name != "a" else "b")
    model.delete_adapter(name)
    model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), seed=9)
    model.eval()


ACTS = [write, point_elsewhere, replace, scale, swap]
BATCHES = st.lists(st.sampled_from([*NAMES, None]), min_size=1, max_size=7)


@hypothesis.given(st.lists(BATCHES | st.tuples(st.sampled_from(ACTS), st.sampled_from(NAMES)), max_size=8))
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.example([["a", "b"], ["c"], ["d", "e", "d"], ["b", "a"], (write, "a"), ["b", "a"]])
def test_each_batch_is_right_after_whatever_came_before(steps):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch_kept, "_MOST", 3)  # so that adapters must make room for others
        model = five()
        for step in steps:
            if isinstance(step, tuple):
                act, name = step
                act(model, name)
                continue
            x = ids(len(step))
            found = model(x, adapter_names=step)
            torch.testing.assert_close(found, one_by_one(model, x, step), **close)


@pytest.fixture
def filled(monkeypatch):
    """The adapters whose slots were filled, layer by layer."""
    seen, fill = [], torch_kept.KeptFactors._fill

    def counted(kept: Any, new: Any, *rest: Any) -> None:
        seen.extend(new)
        fill(kept, new, *rest)

    monkeypatch.setattr(torch_kept.KeptFactors, "_fill", counted)
    return seen


def test_only_what_is_new_or_changed_is_gathered(filled):
    model = five()
    layers = sum(type(module).__name__ == "AdaptedLayer" for module in model.modules())
    with torch.no_grad():
        for names, new in [
            (["a", "b"], ["a", "b"]),
            (["b", None, "a", "a"], []),
            (["a", "e"], ["e"]),
            (["e", "b", "a"], []),
        ]:
            model(ids(len(names)), adapter_names=names)
            assert sorted(filled) == sorted(new * layers)
            filled.clear()
        write(model, "e")
        model(ids(2), adapter_names=["a", "e"])
        assert filled == ["e"]  # in the one layer that it was written in


def test_who_was_used_longest_ago_makes_room(filled, monkeypatch):
    monkeypatch.setattr(torch_kept, "_MOST", 3)
    model = five()
    with torch.no_grad():
        for names in (["a", "b", "e"], ["b"], ["a"], ["a", "d"]):
            model(ids(len(names)), adapter_names=names)
        filled.clear()
        model(ids(3), adapter_names=["b", "a", "d"])
        assert not filled
        model(ids(1), adapter_names=["e"])
        assert set(filled) == {"e"}


def test_nothing_is_kept_for_gradients_nor_beside_inference_tensors(filled):
    model = five()
    model.set_adapter("a")  # which is trained
    model(ids(2), adapter_names=["a", "b"]).sum().backward()
    assert not filled
    x, names = ids(2), ["b", "c"]
    with torch.inference_mode():
        model(x, adapter_names=names)
    assert filled
    filled.clear()
    torch.testing.assert_close(model(x, adapter_names=names), one_by_one(model, x, names), **close)
    model.set_adapter("d")
    with torch.no_grad():
        write(model, "b")
    model(x, adapter_names=names)
    assert filled == ["b"]  # what was made in inference mode is written into outside of it
    filled.clear()
    with torch.inference_mode():
        replace(model, "c")
        found = model(x, adapter_names=names)
        assert not filled
        torch.testing.assert_close(found, one_by_one(model, x, names), **close)
