"""Factors that torch's layers keep between mixed batches: right after whatever was changed, and no more work than that.

One by one, each row under its adapter, says what is right.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from peftarray import AdaLoraConfig, LoraConfig, VeraConfig
from peftarray.model import get_peft_model

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import strategies as st  # noqa: E402
from peftarray.backends import torch_kept  # noqa: E402
from peftarray.backends.torch_layers import AdaptedLayer  # noqa: E402

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


def convert(model: Any, name: str) -> None:
    """There and back, by which digits are lost."""
    model.get_submodule(LAYER).lora_B[name].bfloat16().double()


def load(model: Any, name: str) -> None:
    holder = model.get_submodule(LAYER).lora_A[name]
    holder.load_state_dict({key: array * 2 for key, array in holder.state_dict().items()})


def rename(model: Any, name: str) -> None:
    model.rename_adapter(name, "new")
    model.rename_adapter("new", name)


ACTS = [write, point_elsewhere, replace, scale, swap, convert, load, rename]
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


@pytest.mark.parametrize("act", ACTS)
def test_what_nobody_had_before_is_right_after_a_change(act):
    model, x, names = five(), ids(4), ["b", "c", "b", "e"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        act(model, "b")
        found = model(x, adapter_names=names)
        torch.testing.assert_close(found, one_by_one(model, x, names), **close)
    assert torch.equal(found, before) == (act is rename)


def first(iterable: Any) -> Any:
    """The array of b that the tests write into, of pairs of names and arrays."""
    return dict(iterable)[f"{LAYER}.lora_A.b.weight"]


WAYS: dict[str, Any] = {
    "attribute": lambda model: model.get_submodule(LAYER).lora_A.b.weight,
    "dictionary": lambda model: model.get_submodule(LAYER).lora_A["b"]["weight"],
    "values": lambda model: model.get_submodule(LAYER).lora_A["b"].values()[0],
    "items": lambda model: dict(model.get_submodule(LAYER).lora_A["b"].items())["weight"],
    "torch's table": lambda model: model.get_submodule(LAYER).lora_A["b"]._parameters["weight"],
    "by its name": lambda model: model.get_parameter(f"{LAYER}.lora_A.b.weight"),
    "all": lambda model: first(model.named_parameters()),
    "adapter of a layer": lambda model: model.get_submodule(LAYER).adapter("b").params["lora_A"],
    "adapter of the model": lambda model: (
        model.get_adapter("b").adapters["model.layers.0.self_attn.q_proj"].params["lora_A"]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_has_an_array_may_change_it_at_any_time(way):
    for times in range(2):  # it was had before the first batch, or after it
        model, x, names = five(), ids(3), ["b", "c", "b"]
        with torch.no_grad():
            for _ in range(times):
                model(x, adapter_names=names)
            had = WAYS[way](model)
            model(x, adapter_names=names)
            for change in (lambda array: array.mul_(1.5), lambda array: setattr(array, "data", array.data * 0.5)):
                change(had)
                found = model(x, adapter_names=names)
                torch.testing.assert_close(found, one_by_one(model, x, names), **close)


def test_a_name_that_is_changed_takes_nothing_from_who_has_an_array():
    model, x, names = five(), ids(2), ["new", "c"]
    had = array(model, "b")
    model.rename_adapter("b", "new")
    with torch.no_grad():
        model(x, adapter_names=names)
        had.mul_(2)
        torch.testing.assert_close(model(x, adapter_names=names), one_by_one(model, x, names), **close)


def test_what_a_state_dict_has_may_be_written_into():
    model, x, names = five(), ids(2), ["b", "c"]
    with torch.no_grad():
        before = model(x, adapter_names=names)
        first(model.state_dict().items()).mul_(3)
        found = model(x, adapter_names=names)
        assert not torch.equal(found, before)
        torch.testing.assert_close(found, one_by_one(model, x, names), **close)


ON = {"target_modules": ["q_proj", "o_proj"]}
VERA = VeraConfig(r=2, **ON)


def two(config: Any) -> Any:
    model = randomise(get_peft_model(Net(), config, adapter_name="a"))
    model.add_adapter("b", config, seed=1)
    return model


@pytest.mark.parametrize("config", [VERA, AdaLoraConfig(init_r=3, total_step=9, **ON)], ids=["shared", "side by side"])
@pytest.mark.parametrize("of", ["parameters", "buffers"])
def test_arrays_that_layers_share_or_that_lie_side_by_side(config, of):
    model, x, names = two(config), ids(3), ["a", "b", "a"]
    with torch.no_grad():
        for key, each in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(".b") and each.is_floating_point():
                each.add_(0.25)  # away from 0
        for module in model.modules():
            if isinstance(module, AdaptedLayer):
                module._lent.names.clear()  # as if nobody had had them
        before = model(x, adapter_names=names)
        for key, each in model.named_parameters() if of == "parameters" else model.named_buffers():
            if key.endswith(".b") and each.is_floating_point():
                each.add_(0.25)
                found = model(x, adapter_names=names)
                assert not torch.equal(found, before), key
                torch.testing.assert_close(found, one_by_one(model, x, names), **close)
                before = found


def test_a_buffer_that_is_replaced():
    model, x, names = two(VERA), ids(2), ["b", "a"]
    with torch.no_grad():
        for holder in (model.get_submodule(LAYER).vera_lambda_b, model.get_submodule(LAYER).vera_lambda_d):
            holder.bfloat16().double()
        model(x, adapter_names=names)
        model.base_model.vera_A.b = torch.ones_like(model.base_model.vera_A.read("b"))
        torch.testing.assert_close(model(x, adapter_names=names), one_by_one(model, x, names), **close)


QUIET: dict[str, Any] = {
    "modes": lambda model, folder: model.train().eval(),
    "words": lambda model, folder: repr(model),
    "counts": lambda model, folder: model.print_trainable_parameters(),
    "status": lambda model, folder: model.status(),
    "files": lambda model, folder: model.save_pretrained(folder),
    "switch": lambda model, folder: model.set_adapter(["b", "c"]),
    "batch": lambda model, folder: model(ids(2)),
    "merge": lambda model, folder: (model.merge_adapter(["b"]), model.unmerge_adapter()),
    "another": lambda model, folder: (model.add_adapter("new", config("b")), model.delete_adapter("new")),
    "combined": lambda model, folder: model.add_weighted_adapter(["b", "c"], [1, 1], "new", "cat"),
    "copy": lambda model, folder: copy.deepcopy(model),
    "move": lambda model, folder: model.to("cpu", torch.float64),
}


@pytest.mark.parametrize("act", QUIET)
def test_what_nobody_has_is_not_looked_at(act, tmp_path, monkeypatch):
    looks, look = [], torch_kept._Source.is_as_it_was

    def counted(source: Any) -> bool:
        looks.append(source)
        return look(source)

    monkeypatch.setattr(torch_kept._Source, "is_as_it_was", counted)
    model, x, names = five(), ids(3), ["b", "c", None]
    with torch.no_grad():
        model(x, adapter_names=names)
        QUIET[act](model, tmp_path)
        found = model(x, adapter_names=names)
        model(x, adapter_names=["d", "b", "c"])
        assert not looks
        torch.testing.assert_close(found, one_by_one(model, x, names), **close)
        array(model, "b")
        model(x, adapter_names=names)
        assert len(looks) == 2  # lora_A and lora_B of one layer


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


def test_what_was_added_in_inference_mode_is_kept_until_somebody_has_it(filled):
    model, x, names = five(), ids(2), ["new", "c"]
    with torch.inference_mode():
        model.add_adapter("new", config("b"), seed=9)
        had = []
        for change in (lambda: None, lambda: had.append(array(model, "new")), lambda: had[0].mul_(2)):
            change()
            filled.clear()
            found = model(x, adapter_names=names)
            assert ("new" in filled) == (not had)
            torch.testing.assert_close(found, one_by_one(model, x, names), **close)
