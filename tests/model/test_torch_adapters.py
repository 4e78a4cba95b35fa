"""Several adapters on one torch module: every verb, alone and failing, against PEFT's and against one adapter alone."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import peftarray as pa
from peftarray import ConfigError, LoraConfig, MatchError, PeftError, UnsupportedError
from peftarray.model import PeftModel, get_peft_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from .cases import CONFIGS  # noqa: E402
from .torch_net import Net, randomise, several  # noqa: E402

IDS = torch.tensor([[1, 7, 3], [0, 1, 10], [7, 7, 2], [4, 9, 5]])
PAIRS = list(itertools.combinations(CONFIGS, 2))
exact: dict[str, float] = {"atol": 0.0, "rtol": 0.0}
close: dict[str, float] = {"atol": 1e-10, "rtol": 1e-8}


def with_adapters(*names: str, **options: Any) -> Any:
    """A model with these adapters; the last is active."""
    return several(CONFIGS, *names, **options)


def alone(name: str, folder: Any) -> Any:
    return PeftModel.from_pretrained(Net(), folder / name).eval()


def state(model: Any) -> dict[str, Any]:
    """Everything about a module that a verb may change."""
    parameters = {
        name: (id(p), p.requires_grad, p.detach().clone())
        for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    }
    kinds = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    said = (model.active_adapters, dict(model._switch.now.scales), model._switch.now.enabled, model._switch.now.merged)
    return {"parameters": parameters, "kinds": kinds, "said": said, "configs": model.peft_config, "y": model(IDS)}


def assert_unchanged(before: dict[str, Any], model: Any) -> None:
    after = state(model)
    assert after["parameters"].keys() == before["parameters"].keys()
    for name, (place, wanted, values) in before["parameters"].items():
        assert after["parameters"][name][:2] == (place, wanted), name
        assert torch.equal(after["parameters"][name][2], values), name
    assert [after[key] for key in ("kinds", "said", "configs")] == [before[key] for key in ("kinds", "said", "configs")]
    torch.testing.assert_close(after["y"], before["y"], **exact)


# Several at once.


def refused(*names: str) -> bool:
    """Whether adapters cannot be together: rows of an embedding and the whole of it."""
    return {"lora-embedding", "lora-tokens"} <= set(names)


def refused_together(*names: str) -> bool:
    """Whether they cannot act together: both bring the same biases."""
    return {"lora-saved", "lora-tokens"} <= set(names)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_two_that_act_are_what_they_merge_to(pair):
    if refused(*pair):
        with pytest.raises(ConfigError, match="no place for both"):
            with_adapters(*pair)
        return
    model = with_adapters(*pair)
    if refused_together(*pair):
        with pytest.raises(UnsupportedError, match="cannot act together"):
            model.set_adapter(pair)
        return
    model.set_scale(pair[1], -0.5)
    model.set_adapter(pair)
    wanted = model(IDS)
    model.set_adapter(pair[::-1])
    torch.testing.assert_close(model(IDS), wanted, **close)
    with model.merged():
        torch.testing.assert_close(model(IDS), wanted, **close)
    model.set_adapter(pair[0])
    assert (model(IDS) - wanted).abs().max() > 1e-6
    merged = model.merge_and_unload(adapter_names=pair)
    assert merged.state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(merged(IDS), wanted, **close)


def test_adapters_beside_others_are_as_alone(tmp_path):
    names = [name for name in CONFIGS if name != "lora-embedding"]
    model = with_adapters(*names)
    model.save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        torch.testing.assert_close(model(IDS), alone(name, tmp_path)(IDS), **exact)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), Net()(IDS), **exact)
        with model.disable_adapter():
            pass
        torch.testing.assert_close(model(IDS), Net()(IDS), **exact)
    torch.testing.assert_close(model(IDS), alone(names[-1], tmp_path)(IDS), **exact)
    torch.testing.assert_close(model.unload()(IDS), Net()(IDS), **exact)


def test_only_what_acts_is_trained():
    model = with_adapters("lora", "oft", "lora-saved")
    for names in (["lora"], ["oft", "lora-saved"], ["lora-saved"]):
        model.set_adapter(names)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        (model(IDS) ** 2).sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
        for name in ("lora", "oft", "lora-saved"):
            assert any(f".{name}." in f"{parameter}." for parameter in trained) == (name in names)
        model.zero_grad()
        for parameter in model.parameters():
            parameter.grad = None


def test_a_frozen_adapter_stays_frozen(tmp_path):
    model = with_adapters("lora", "oft")
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "oft", "still")
    model.load_adapter(tmp_path / "oft", "moving", is_trainable=True)
    for name, wanted in (("still", False), ("moving", True), ("lora", True)):
        model.set_adapter(name)
        assert any(p.requires_grad for p in model.parameters()) == wanted
    model.freeze().set_adapter("oft")
    model.set_adapter("lora")
    assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in model.unfreeze().parameters())


def test_scales_are_those_of_the_update():
    model = with_adapters("lora", "oft")
    base = Net()(IDS)
    layer = model.model.layers[0]["self_attn"].q_proj
    hidden = torch.randn(4, 12, dtype=torch.float64)
    for name in ("lora", "oft"):
        model.set_adapter(name)
        update = layer(hidden) - layer.base_layer(hidden)
        model.set_scale(name, 0.25)
        torch.testing.assert_close(layer(hidden) - layer.base_layer(hidden), 0.25 * update, **close)
        model.set_scale(name, 0)
        torch.testing.assert_close(model(IDS), base, **close)
        model.set_scale(name, 1)
        torch.testing.assert_close(layer(hidden) - layer.base_layer(hidden), update, **exact)


def test_biases_are_an_adapters_own(tmp_path):
    """PEFT trains them in their place for good, whichever adapter acts."""
    model = with_adapters("lora-tokens", "lora")
    model.save_pretrained(tmp_path)
    bias = model.model.layers[0]["self_attn"].q_proj.base_layer.bias
    model.set_adapter("lora-tokens")
    assert model.model.layers[0]["self_attn"].q_proj.base_layer.bias is not bias
    copied = copy.deepcopy(model)
    copied.set_adapter("lora")
    model.to(torch.float32).set_adapter("lora")
    assert model(IDS).dtype == torch.float32
    model.delete_adapter("lora-tokens")
    assert model.model.layers[0]["self_attn"].q_proj.base_layer.bias is bias
    torch.testing.assert_close(copied(IDS), alone("lora", tmp_path)(IDS), **exact)


# Coming and going.


def test_names_of_parameters_are_those_of_peft(tmp_path):
    configs = {"one": CONFIGS["lora-saved"], "two": LoraConfig(r=3, target_modules=["q_proj", "lm_head"])}
    ours = get_peft_model(Net(), CONFIGS["lora-layers"], adapter_name="zero")
    ours.add_adapter("one", CONFIGS["lora-all-linear"])
    ours.add_adapter("two", configs["two"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "zero", adapter_name="zero")
        for name in ("one", "two"):
            theirs.load_adapter(tmp_path / name, name)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())


def test_adapters_go_to_peft_and_back(tmp_path):
    saved = LoraConfig(r=2, modules_to_save=["lm_head"], target_modules=["q_proj"])
    ours = randomise(get_peft_model(Net(), CONFIGS["lora-all-linear"], adapter_name="other"))
    for name, config in (("saved", saved), ("pattern", CONFIGS["lora-pattern"])):
        ours.add_adapter(name, config)
        ours.set_adapter(name)
        randomise(ours)
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["saved", "pattern"])
    assert not (tmp_path / "ours" / "other").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours" / "pattern", adapter_name="pattern")
        theirs.load_adapter(tmp_path / "ours" / "saved", "saved")
        theirs.double().eval().save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(Net(), tmp_path / "theirs" / "saved", adapter_name="saved").eval()
    again.load_adapter(tmp_path / "theirs" / "pattern", "pattern")
    for name in ("saved", "pattern"):
        for model in (ours, theirs, again):
            model.set_adapter(name)
        torch.testing.assert_close(ours(IDS), again(IDS), **exact)
        torch.testing.assert_close(ours(IDS), theirs(IDS), **close)


def test_a_default_adapter_is_saved_beside_others(tmp_path):
    model = get_peft_model(Net(), CONFIGS["vera"])
    model.add_adapter("other", CONFIGS["vera"], seed=5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    with pytest.raises(MatchError, match="has no adapter 'none'"):
        model.save_pretrained(tmp_path, selected_adapters=["none"])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "lora"])
def test_one_that_is_deleted_leaves_nothing(name):
    if refused(name):
        return
    model = with_adapters("lora", name)
    model.set_adapter("lora")
    model.delete_adapter(name)
    expected = with_adapters("lora")
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    torch.testing.assert_close(model(IDS), expected(IDS), **exact)
    model.delete_adapter("lora")
    assert model.get_base_model().state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(model(IDS), Net()(IDS), **exact)


def test_memory_of_a_deleted_one_is_free():
    model = with_adapters("lora", "lora-saved", "vera", "lora-tokens")
    model(IDS, adapter_names=["lora", "lora", "vera", None])
    for name in ("lora", "lora-tokens", "vera", "lora-saved"):
        found = [weakref.ref(p) for key, p in model.named_parameters() if f".{name}." in f"{key}."]
        assert found
        model.delete_adapter(name)
        gc.collect()
        assert not any(reference() is not None for reference in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_renamed_one_has_the_same_parameters(name):
    model = with_adapters("oft", name) if name not in ("oft",) else with_adapters("lora", name)
    model.set_scale(name, 2.0)

    def renamed(key: str) -> str:
        return f"{key}.".replace(f".{name}.", ".new.").removesuffix(".")

    before = {renamed(key): id(p) for key, p in model.named_parameters()}
    trained = {renamed(key) for key, p in model.named_parameters() if p.requires_grad}
    wanted = model(IDS)
    model.rename_adapter(name, "new")
    assert {key: id(p) for key, p in model.named_parameters()} == before
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trained
    assert model.active_adapter == "new"
    assert "new" in model.peft_config
    torch.testing.assert_close(model(IDS), wanted, **exact)


@pytest.mark.parametrize(
    "pair", [("lora", "lora-pattern"), ("lora-saved", "oft"), ("vera", "lora-tokens")], ids="+".join
)
def test_one_takes_the_place_of_another(pair, tmp_path):
    model = with_adapters(*pair)
    model.save_pretrained(tmp_path)
    model.hotswap(pair[0], tmp_path / pair[1])
    torch.testing.assert_close(model(IDS), alone(pair[1], tmp_path)(IDS), **exact)
    model.set_adapter(pair[0])
    torch.testing.assert_close(model(IDS), alone(pair[1], tmp_path)(IDS), **exact)
    assert any(p.requires_grad for p in model.parameters())
    model.hotswap(pair[0], alone(pair[0], tmp_path).get_adapter("default"))
    torch.testing.assert_close(model(IDS), alone(pair[0], tmp_path)(IDS), **exact)


def test_a_copy_is_on_its_own():
    model = with_adapters("lora", "oft", "lora-saved")
    other = copy.deepcopy(model)
    other.set_adapter("oft")
    other.delete_adapter("lora")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    assert model.active_adapter == "lora-saved"
    torch.testing.assert_close(model(IDS), with_adapters("lora", "oft", "lora-saved")(IDS), **exact)
    assert model.to(torch.float32)(IDS).dtype == torch.float32


# What fails changes nothing.

TARGETS = LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
NEW = LoraConfig(r=3, modules_to_save=["lm_head"], trainable_token_indices=[2], bias="all", target_modules=["q_proj"])
WRONG: dict[str, tuple[Callable[[Any, Any], Any], type[PeftError], str]] = {
    "unknown": (lambda m, f: m.set_adapter("lra"), MatchError, "has no adapter"),
    "one of two is unknown": (lambda m, f: m.set_adapter(["lora", "lra"]), MatchError, "has no adapter"),
    "twice": (lambda m, f: m.set_adapter(["lora", "lora"]), ConfigError, "several different ones"),
    "none": (lambda m, f: m.set_adapter([]), ConfigError, "give one name"),
    "taken": (lambda m, f: m.add_adapter("lora", TARGETS), ConfigError, "already"),
    "a name of torch's": (lambda m, f: m.add_adapter("train", TARGETS), ConfigError, "none that torch's"),
    "base": (lambda m, f: m.add_adapter("__base__", TARGETS), ConfigError, "must be a name"),
    "no such target": (lambda m, f: m.add_adapter("x", LoraConfig(target_modules=["q_prj"])), MatchError, "q_proj"),
    "no such folder": (lambda m, f: m.load_adapter(f / "nothing", "x"), PeftError, "adapter_config.json"),
    "deleted unknown": (lambda m, f: m.delete_adapter("x"), MatchError, "has no adapter"),
    "renamed to a taken one": (lambda m, f: m.rename_adapter("lora", "oft"), ConfigError, "already"),
    "no number": (lambda m, f: m.set_scale("lora", float("nan")), ConfigError, "finite"),
    "merged unknown": (lambda m, f: m.merge_adapter(["lora", "x"]), MatchError, "has no adapter"),
    "not merged": (lambda m, f: m.unmerge_adapter(), ConfigError, "no adapter is merged"),
    "swapped for nothing": (lambda m, f: m.hotswap("lora", f / "nothing"), PeftError, "adapter_config.json"),
    "a saved module that is adapted": (
        lambda m, f: m.add_adapter("x", LoraConfig(target_modules=["o_proj"], modules_to_save=["q_proj"])),
        ConfigError,
        "another adapter",
    ),
    "no slots for rotations": (lambda m, f: m.prepare_slots(max_rank=4, count=4), UnsupportedError, "no update of two"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_changes_nothing(case, tmp_path):
    model = with_adapters("lora", "oft", "lora-saved")
    before = state(model)
    act, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        act(model, tmp_path)
    assert_unchanged(before, model)


class Broken(Exception):
    """What breaks in the middle."""


def breaking(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, which fails once it has done its work so many times."""
    left = iter(range(after))

    def run(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise Broken
        return function(*arguments, **options)

    return run


def verbs(folder: Any) -> Iterator[tuple[str, Callable[[Any], Any], str]]:
    """(name, verb, what of the package breaks within it)."""
    yield "add", lambda m: m.add_adapter("new", NEW), "torch_layers.AdaptedLayer.put"
    yield "add", lambda m: m.add_adapter("new", NEW), "torch_arrays.Arrays.put"
    yield "add", lambda m: m.add_adapter("new", NEW), "torch_holding._places"
    yield "load", lambda m: m.load_adapter(folder / "vera", "new"), "torch_arrays.Arrays.put"
    yield "rename", lambda m: m.rename_adapter("lora-saved", "new"), "torch_layers.AdaptedLayer.put"
    yield "merge", lambda m: m.merge_adapter(["oft", "lora-saved"]), "torch_layers.AdaptedLayer.effective"
    yield "merge", lambda m: m.merge_adapter(["oft", "lora-saved"]), "torch_merging.Swap.merge"
    yield "merge and unload", lambda m: m.merge_and_unload(adapter_names=["oft"]), "torch_merging.Swap.merge"


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_fails_in_the_middle_changes_nothing(place, after, tmp_path, monkeypatch):
    with_adapters("vera").save_pretrained(tmp_path)
    model = with_adapters("lora", "oft", "lora-saved")
    before = state(model)
    _, verb, broken = list(verbs(tmp_path))[place]
    path = f"peftarray.backends.{broken}"
    owner, _, attribute = path.rpartition(".")
    module, _, kind = owner.rpartition(".")
    holder = __import__(owner, fromlist=["_"]) if kind.islower() else getattr(__import__(module, fromlist=["_"]), kind)
    if attribute == "_places":  # once a bias, of which there are three
        after = min(after, 2)
    monkeypatch.setattr(holder, attribute, breaking(getattr(holder, attribute), after))
    with pytest.raises(Broken):
        verb(model)
    monkeypatch.undo()
    assert_unchanged(before, model)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_swap_that_fails_leaves_the_old_one(after, tmp_path, monkeypatch):
    from peftarray.backends import torch_layers

    model = with_adapters("oft", "lora-saved")
    model.save_pretrained(tmp_path)
    wanted, names = model(IDS), {key: id(p) for key, p in model.named_parameters()}
    put, left = torch_layers.AdaptedLayer.put, iter(range(after))

    def once(self: Any, name: str, adapter: Any, shared: Any, **options: Any) -> None:
        if isinstance(adapter.config, pa.OFTConfig) and next(left, None) is None:
            raise Broken
        put(self, name, adapter, shared, **options)

    monkeypatch.setattr(torch_layers.AdaptedLayer, "put", once)
    with pytest.raises(Broken):
        model.hotswap("lora-saved", tmp_path / "oft")
    assert {key: id(p) for key, p in model.named_parameters()} == names
    torch.testing.assert_close(model(IDS), wanted, **exact)
    model.set_adapter("oft")
    model.set_adapter("lora-saved")
    torch.testing.assert_close(model(IDS), wanted, **exact)


# What else is said and made of them.


def test_status_is_of_every_layer():
    model = with_adapters("lora", "oft")
    model.set_scale("lora", 3)
    items = {(item.adapter, item.layer): item for item in model.status()}
    assert len(items) == 2 * 6
    for name in ("lora", "oft"):
        layer = model.get_submodule("model.layers.1.self_attn.q_proj")
        found = items[name, "model.layers.1.self_attn.q_proj"]
        change = layer.adapter(name).merge(layer.base_layer.weight) - layer.base_layer.weight
        scale = 3 if name == "lora" else 1
        assert found.norm == pytest.approx(scale * float(change.detach().norm()))
        assert (found.active, found.merged, found.trainable) == (name == "oft", False, True)
    with model.merged("oft"):
        again = {(item.adapter, item.layer): item for item in model.status()}
        assert all(again[key].norm == pytest.approx(item.norm) for key, item in items.items())
        assert {item.adapter for item in again.values() if item.merged} == {"oft"}
    assert "q_proj" in str(model.status(norms=False))


def test_a_weighted_one_stands_for_several():
    model = with_adapters("lora", "lora-pattern")
    with pytest.raises(ConfigError, match="one for each"):
        model.add_weighted_adapter(["lora"], [1, 2], "both")
    model.set_scale("lora", 2)
    model.add_weighted_adapter(["lora", "lora-pattern"], [0.5, -1.0], "both", "cat")
    model.set_scale("lora-pattern", -1)
    model.set_scale("lora", 1)
    model.set_adapter(["lora", "lora-pattern"])
    wanted = model(IDS)
    model.set_adapter("both")
    torch.testing.assert_close(model(IDS), wanted, atol=1e-6, rtol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())
