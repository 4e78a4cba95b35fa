"""Adapters in slots of a torch module: a compiled module goes on as it is, whichever acts, comes or is swapped in."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from peftarray import ConfigError, LoraConfig, PeftError, UnsupportedError, VeraConfig

torch = pytest.importorskip("torch")

from .cases import CONFIGS  # noqa: E402
from .torch_net import Net, several  # noqa: E402

IDS = torch.tensor([[1, 7, 3], [0, 1, 10], [7, 7, 2], [4, 9, 5]])
TARGETS = {"target_modules": ["q_proj", "o_proj", "embed_tokens"]}
ADAPTERS = {
    "low": LoraConfig(r=2, **TARGETS),
    "high": LoraConfig(r=7, lora_alpha=3, rank_pattern={"1.self_attn.*": 5}, alpha_pattern={"q_proj": 9}, **TARGETS),
    "few": LoraConfig(r=1, use_rslora=True, target_modules=["q_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
}
close: dict[str, float] = {"atol": 1e-10, "rtol": 1e-8}


def with_adapters(*names: str, **options: Any) -> Any:
    """A model with these adapters; the last is active."""
    return several(ADAPTERS, *names, **options)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled(model: Any) -> tuple[Any, Any]:
    """A model as one compiled graph, and a function that counts the graphs."""
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    run = torch.compile(model, fullgraph=True, backend=backend)
    return run, lambda: len(made)


def test_slots_are_the_adapters():
    model = with_adapters(*ADAPTERS)
    model.set_scale("high", -2)
    other = copy.deepcopy(model)
    model.prepare_slots(max_rank=8, count=5)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == other.state_dict().keys()
    for name in ADAPTERS:
        model.set_adapter(name)
        other.set_adapter(name)
        torch.testing.assert_close(model(IDS), other(IDS), **close)
    names = ["vera", None, "low", "high"]
    torch.testing.assert_close(model(IDS, adapter_names=names), other(IDS, adapter_names=names), **close)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), Net()(IDS), **close)
    with model.merged("high"):
        other.set_adapter("high")
        torch.testing.assert_close(model(IDS), other(IDS), **close)
    model.release_slots()
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in other.named_buffers()]
    model.set_adapter(["low", "high"])
    other.set_adapter(["low", "high"])
    torch.testing.assert_close(model(IDS), other(IDS), **close)


def test_no_change_of_adapters_compiles_again(tmp_path):
    source = with_adapters(*ADAPTERS)
    source.save_pretrained(tmp_path)
    model = with_adapters("low", "few")
    model.prepare_slots(max_rank=8, count=12)
    run, count = compiled(model)

    def check(name: str, mine: str) -> None:
        model.set_adapter(mine)
        source.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(run(IDS), source(IDS), **close)

    with torch.no_grad():
        run(IDS)
    assert count() == 1
    for place in range(10):
        name = [*ADAPTERS][place % 4]
        model.load_adapter(tmp_path / name, f"new{place}")
        check(name, f"new{place}")
    for name in ADAPTERS:
        model.hotswap("new0", tmp_path / name)
        check(name, "new0")
    model.rename_adapter("new0", "other")
    check("vera", "other")
    model.set_scale("other", 0.5)
    source.set_scale("vera", 0.5)
    check("vera", "other")
    model.delete_adapter("new5")
    check("vera", "other")
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(run(IDS), Net()(IDS), **close)
    assert count() == 1


def test_rows_of_a_compiled_batch_are_chosen_by_an_index():
    model = with_adapters("low", "high", "vera")
    plain = copy.deepcopy(model)
    model.prepare_slots(max_rank=7, count=3)
    run, count = compiled(model.get_base_model())
    for names in (["low", "high", None, "vera"], [None, None, "low", "low"], ["vera", "high", "high", "high"]):
        with torch.no_grad(), model._by_rows(names, repeats=False):
            torch.testing.assert_close(run(IDS), plain(IDS, adapter_names=names), **close)
    assert count() == 1


def test_adapters_by_name_switch_within_one_graph_each():
    """Without slots a name is a constant of the graph: each is compiled once, and found again."""
    model = with_adapters("low", "few", "vera")
    run, count = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            for name in ("low", "few", "vera"):
                model.set_adapter(name)
                torch.testing.assert_close(run(IDS), model(IDS), **close)
    assert count() == 3


def filled() -> Any:
    model = with_adapters("low", "few")
    model.prepare_slots(max_rank=4, count=2)
    return model


WRONG: dict[str, tuple[Any, type[PeftError], str]] = {
    "several act": (lambda m: m.set_adapter(["low", "few"]), UnsupportedError, "in slots one adapter acts"),
    "full": (lambda m: m.add_adapter("x", ADAPTERS["few"]), ConfigError, "all 2 slots are taken"),
    "rank": (lambda m: m.hotswap("few", with_adapters("high").get_adapter("high")), ConfigError, "max_rank=7"),
    "no slots there": (
        lambda m: m.add_adapter("x", LoraConfig(target_modules=["lm_head"])), UnsupportedError, "which has none"
    ),
    "saved": (lambda m: m.add_adapter("x", CONFIGS["lora-saved"]), UnsupportedError, "trains tensors of the model"),
    "rotation": (lambda m: m.add_adapter("x", CONFIGS["oft"]), UnsupportedError, "no update of two thin factors"),
    "training": (lambda m: m.unfreeze(), UnsupportedError, "release_slots"),
    "too few": (lambda m: m.prepare_slots(max_rank=4, count=1), ConfigError, "at least as many slots"),
    "no rank": (lambda m: m.prepare_slots(max_rank=0, count=3), ConfigError, "a rank of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_in_changes_nothing(case):
    model, (act, kind, words) = filled(), WRONG[case]
    wanted, keys = model(IDS), model.state_dict().keys()
    with pytest.raises(kind, match=words):
        act(model)
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(model(IDS), wanted, atol=0, rtol=0)
    model.set_adapter("low")
    other = with_adapters("low", "few")
    other.set_adapter("low")
    torch.testing.assert_close(model(IDS), other(IDS), **close)
