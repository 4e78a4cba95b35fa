"""The verbs of many adapters on one model: what they do, and that one which fails does nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import ConfigError, LoraConfig, MatchError, NumberError, PeftError, PromptTuningConfig, UnsupportedError
from peftarray.draws import step_key
from peftarray.model import PeftModel

from ..model.cases import CONFIGS, base_weights, moved, run

IDS = np.asarray([[1, 7, 3], [0, 1, 10]])


def asarray(values: Any, dtype: Any = None) -> np.ndarray:
    return np.asarray(values, dtype)


def of(**names: pa.AdapterConfig) -> PeftModel:
    """A model on NumPy with adapters that are away from their first state; the first is active."""
    model = PeftModel(base_weights())
    for seed, (name, config) in enumerate(names.items()):
        model.add_adapter(name, config, seed=seed)
        model.set_adapter(name)
        new = moved(model.params, asarray, np.asarray)
        model.params = {key: array + 0.05 * seed for key, array in new.items()}
    model.set_adapter(next(iter(names)))
    return model


def logits(model: PeftModel) -> np.ndarray:
    return run(model.weights, IDS)


PAIRS = [
    pair
    for pair in itertools.combinations(CONFIGS, 2)
    if not {"lora-saved", "lora-tokens"} >= set(pair)  # both train biases
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids="-".join)
def test_two_act_as_they_are_merged(first, second):
    """For every pair of methods and settings; and the update of both is the sum of their own."""
    model = of(a=CONFIGS[first], b=CONFIGS[second])
    merged = {}
    for name in "ab":
        model.set_adapter(name)
        merged[name] = model.effective_weights()
    model.set_scale("b", 0.5)
    model.set_adapter(["a", "b"])
    both = model.effective_weights()
    np.testing.assert_allclose(logits(model), run(both, IDS), atol=1e-9)
    for name, array in model.base.items():
        wanted = array + (merged["a"][name] - array) + 0.5 * (merged["b"][name] - array)
        np.testing.assert_allclose(both[name], wanted, atol=1e-12)
    model.set_adapter(["b", "a"])
    np.testing.assert_allclose(run(model.effective_weights(), IDS), run(both, IDS), atol=1e-9)


def test_names_of_parameters():
    model = of(a=CONFIGS["lora-saved"], b=CONFIGS["vera"], c=CONFIGS["ia3"])
    alone = {}
    for name in "abc":
        model.set_adapter(name)
        alone[name] = model.params
    model.set_adapter(["a", "b", "c"])
    together = model.params
    assert len(together) == sum(map(len, alone.values()))
    q = "model.layers.0.self_attn.q_proj"
    assert {f"{q}.lora_A.a", f"{q}.vera_lambda_b.b", f"{q}.ia3_l.c", "lm_head.weight", f"{q}.bias"} <= set(together)
    changed = model.with_params({f"{q}.lora_B.a": together[f"{q}.lora_B.a"] + 1})
    assert np.abs(logits(changed) - logits(model)).max() > 1e-3
    assert changed.params[f"{q}.vera_lambda_b.b"] is together[f"{q}.vera_lambda_b.b"]
    with pytest.raises(MatchError, match="is not trained"):
        model.with_params({f"{q}.lora_B": together[f"{q}.lora_B.a"]})
    frozen = model.freeze()
    assert frozen.params == {}
    assert list(frozen.unfreeze().params) == list(together)


def test_several_train_together():
    model = of(a=CONFIGS["lora"], b=CONFIGS["oft"])
    model.set_adapter(["a", "b"])

    def loss(model: PeftModel, batch: Any) -> Any:
        return (run(model.weights, batch) ** 2).mean()

    before = model.params
    history = pa.fit(model, loss, [IDS], steps=4, optimizer=pa.AdamW(0.01), progress=False)
    assert history.losses[-1] < history.losses[0]
    assert all(np.abs(model.params[name] - array).max() > 0 for name, array in before.items())


def test_each_draws_its_own_dropout():
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"])
    model = of(a=config, b=config)
    model.set_adapter(["a", "b"])
    model.params = {
        name: model.params[name.removesuffix(".b") + ".a"] if name.endswith(".b") else array
        for name, array in model.params.items()
    }
    model.set_scale("b", -1.0)
    # The same arrays with opposite signs: what is left over is where the draws differ.
    np.testing.assert_allclose(logits(model), run(model.base, IDS), atol=1e-10)
    found = run(model.training_weights(step_key(0, 1)), IDS)
    assert np.abs(found - run(model.base, IDS)).max() > 1e-3


def test_what_acts():
    model = of(a=CONFIGS["lora"], b=CONFIGS["ia3"])
    assert (model.active_adapters, model.active_adapter) == (["a"], "a")
    first, base = logits(model), run(model.base, IDS)
    model.set_adapter("b")
    assert np.abs(logits(model) - first).max() > 1e-3
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model), base)
        assert model.params == {}
        assert model.active_adapters == ["b"]
    model.disable_adapters()
    with model.disable_adapter():
        pass
    np.testing.assert_array_equal(logits(model), base)
    model.enable_adapters()
    model.set_adapter("a")
    np.testing.assert_array_equal(logits(model), first)
    model.set_scale("a", 0.0)
    np.testing.assert_allclose(logits(model), base, atol=1e-12)
    model.set_scale("a", 1)
    np.testing.assert_array_equal(logits(model), first)

    model.rename_adapter("a", "z")
    assert (list(model.peft_config), model.active_adapters) == (["z", "b"], ["z"])
    np.testing.assert_array_equal(logits(model), first)
    model.delete_adapter("z")
    assert (list(model.peft_config), model.active_adapters) == (["b"], [])
    np.testing.assert_array_equal(logits(model), base)
    assert model.adapters == {}
    assert model.active_adapter is None


def test_hotswap_respects_ranks_and_alphas(tmp_path):
    patterns: dict[str, Any] = {"rank_pattern": {r"0\..*": 5}, "alpha_pattern": {"o_proj": 11.0}}
    other = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"], **patterns)
    source = of(b=other)
    source.save_pretrained(tmp_path)
    model = of(a=CONFIGS["lora"], c=CONFIGS["ia3"])
    model.set_adapter(["a", "c"])
    model.set_scale("a", 0.5)
    wanted = PeftModel(model.base)
    wanted.load_adapter(tmp_path / "b", "b")
    wanted.set_scale("b", 0.5)
    wanted.registry = wanted.registry.with_new("c", model.registry.entry("c"))
    wanted.set_adapter(["b", "c"])
    model.hotswap("a", tmp_path / "b")
    np.testing.assert_array_equal(logits(model), logits(wanted))
    assert model.get_adapter("a").config.rank_pattern == other.rank_pattern
    assert model.active_adapters == ["a", "c"]
    model.hotswap("a", source.get_adapter("b"))
    np.testing.assert_array_equal(logits(model), logits(wanted))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"], indirect=True)
def test_merged_for_a_while(asarray, to_numpy, xp):
    base = {name: asarray(array) for name, array in base_weights().items()}
    before = {name: to_numpy(array).copy() for name, array in base.items()}
    model = PeftModel(base)
    for name, config in (("a", CONFIGS["dora"]), ("b", CONFIGS["oft"])):
        model.add_adapter(name, config)
        model.set_adapter(name)
        model.params = moved(model.params, asarray, to_numpy)
    ids = asarray(IDS)
    model.set_adapter("a")
    acting = to_numpy(run(model.weights, ids))
    with model.merged("a", "b") as same:
        assert same is model
        assert not any(hasattr(array, "materialised") for array in model.weights.values())
        merged = to_numpy(run(model.weights, ids))
        for verb in (lambda: model.set_adapter("b"), lambda: model.merge_and_unload(), lambda: model.set_scale("a", 2)):
            with pytest.raises(ConfigError, match="unmerge_adapter"):
                verb()
        assert [item.merged for item in model.status(norms=False)] == [True] * 12
        with model.disable_adapter():
            np.testing.assert_array_equal(to_numpy(run(model.weights, ids)), to_numpy(run(base, ids)))
    np.testing.assert_array_equal(to_numpy(run(model.weights, ids)), acting)
    for name, array in model.base.items():
        assert to_numpy(array).tobytes() == before[name].tobytes()
    model.set_adapter(["a", "b"])
    np.testing.assert_allclose(to_numpy(run(model.weights, ids)), merged, atol=1e-9)
    unloaded = model.merge_and_unload(adapter_names=["a", "b"])
    np.testing.assert_array_equal(to_numpy(run(unloaded, ids)), merged)
    assert model.unload() is base


def test_a_merged_weight_must_be_finite():
    model = of(a=CONFIGS["lora"])
    name = next(iter(model.params))
    model.params = {name: model.params[name] * np.nan}
    with pytest.raises(NumberError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert model.merged_state is None


def snapshot(model: PeftModel) -> tuple[Any, ...]:
    """Everything that a verb could change."""
    arrays = [
        (name, array.tobytes())
        for name, entry in model.registry.entries.items()
        for array in (entry.found.arrays() if entry.found else ())
    ]
    return model.registry, model.merged_state, model.base, arrays, logits(model).tobytes()


def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("in the middle")


# Each verb, and the step within it that fails.
MIDDLES: dict[str, tuple[Callable[[PeftModel, Path], Any], str]] = {
    "add_adapter": (lambda m, _: m.add_adapter("new", CONFIGS["lora"]), "peftarray.method.AdapterConfig.init_params"),
    "add_adapter, later": (lambda m, _: m.add_adapter("new", CONFIGS["lora"]), "peftarray.registry.Registry.fitted"),
    "load_adapter": (lambda m, f: m.load_adapter(f, "new"), "peftarray.formats.peft_writer._beside"),
    "load_adapter, lazily": (lambda m, f: m.load_adapter(f, "new", lazy=True), "peftarray.saving.open_weights"),
    "set_adapter": (lambda m, _: m.set_adapter(["b", "c"]), "peftarray.registry.check_together"),
    "set_adapter, loading": (lambda m, _: m.set_adapter("lazy"), "peftarray.formats.peft_writer._beside"),
    "weights_for, loading": (lambda m, _: m.weights_for(["a", "lazy"]), "peftarray.formats.peft_writer._beside"),
    "delete_adapter": (lambda m, _: m.delete_adapter("a"), "peftarray.registry.replace"),
    "rename_adapter": (lambda m, _: m.rename_adapter("a", "z"), "peftarray.registry.replace"),
    "hotswap": (lambda m, f: m.hotswap("a", f), "peftarray.registry.Registry.activated"),
    "hotswap, loading": (lambda m, f: m.hotswap("a", f), "peftarray.formats.peft_writer._beside"),
    "set_scale": (lambda m, _: m.set_scale("a", 2.0), "peftarray.registry.Registry.replaced"),
    "set_capacity": (lambda m, f: m.set_capacity(1, f / "spill"), "peftarray.formats.peft_writer.write_folder"),
    "merge_adapter": (lambda m, _: m.merge_adapter(["b"]), "peftarray.adapter.Adapter.merge"),
    "merged": (lambda m, _: m.merged("b").__enter__(), "peftarray.adapter.Adapter.merge"),
    "merge_and_unload": (lambda m, _: m.merge_and_unload(), "peftarray.adapter.Adapter.merge"),
    "slots": (lambda m, _: m.slots(["a", "lazy"], max_rank=4), "peftarray.formats.peft_writer._beside"),
    "params": (
        lambda m, _: setattr(m, "params", dict(m.params)),
        "peftarray.adapter_sets.AdapterSet.with_trained",
    ),
}


@pytest.mark.parametrize("case", MIDDLES)
def test_a_verb_that_fails_in_the_middle_changes_nothing(case, tmp_path, monkeypatch):
    model = of(a=CONFIGS["lora"], b=CONFIGS["dora"], c=CONFIGS["ia3"])
    of(default=CONFIGS["lora"]).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "lazy", lazy=True)
    verb, step = MIDDLES[case]
    before = snapshot(model)
    with monkeypatch.context() as patched:
        patched.setattr(step, _fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            verb(model, tmp_path)
    assert snapshot(model) == before


REFUSED: dict[str, tuple[Callable[[PeftModel], Any], type[PeftError], str]] = {
    "an unknown name": (lambda m: m.set_adapter("aa"), MatchError, "there is no adapter 'aa'.*there are a, b"),
    "a name that is near": (lambda m: m.delete_adapter("defualt"), MatchError, "nearest: default"),
    "one twice": (lambda m: m.set_adapter(["a", "a"]), ConfigError, "each once"),
    "none": (lambda m: m.set_adapter([]), ConfigError, "disable_adapter"),
    "a name that is taken": (lambda m: m.add_adapter("a", CONFIGS["lora"]), ConfigError, "'a' is taken"),
    "a name with a dot": (lambda m: m.rename_adapter("a", "a.b"), ConfigError, "dots"),
    "a path": (lambda m: m.rename_adapter("a", "../b"), ConfigError, "dots and slashes"),
    "PEFT's name for none": (lambda m: m.add_adapter("__base__", CONFIGS["lora"]), ConfigError, "cannot be the name"),
    "a scale that is no number": (lambda m: m.set_scale("a", float("nan")), ConfigError, "finite"),
    "a capacity of none": (lambda m: m.set_capacity(0), ConfigError, "at least 1"),
    "two heads": (lambda m: m.set_adapter(["head", "other"]), UnsupportedError, "both replace .*lm_head"),
    "a head that another reads": (lambda m: m.set_adapter(["head", "reads"]), UnsupportedError, "reads the base's w"),
    "a prompt where no model reads one": (
        lambda m: m.add_adapter("p", PromptTuningConfig(num_virtual_tokens=2)),
        ConfigError,
        "peftarray.models",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case):
    head = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    reads = LoraConfig(r=2, use_dora=True, target_modules=["lm_head"])
    model = of(a=CONFIGS["lora"], b=CONFIGS["ia3"], head=head, other=head, reads=reads, default=CONFIGS["lora"])
    verb, kind, words = REFUSED[case]
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        verb(model)
    assert snapshot(model) == before


def test_a_head_beside_an_adapter_that_only_adds():
    head = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = of(head=head, adds=LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter(["head", "adds"])
    np.testing.assert_allclose(logits(model), run(model.effective_weights(), IDS), atol=1e-10)


def test_status():
    model = of(a=CONFIGS["lora"], b=CONFIGS["dora"], c=CONFIGS["vera"])
    model.set_scale("a", 0.5)
    status = model.status()
    assert len(status) == 18
    item = next(iter(status))
    assert (item.adapter, item.layer, item.method) == ("a", "model.layers.0.self_attn.q_proj", "LORA")
    assert (item.rank, item.scale, item.active, item.merged, item.dtype) == (2, 2.0, True, False, "float64")
    for item in status:
        model.set_adapter(item.adapter)
        weight = f"{item.layer}.weight"
        update = model.effective_weights()[weight] - model.base[weight]
        assert item.norm == pytest.approx(np.linalg.norm(update), rel=1e-6)
    lines = str(status).splitlines()
    assert lines[0].split() == "adapter layer method rank scale active merged device dtype norm".split()
    assert len(lines) == 19
    assert status.to_list()[0]["parameters"] == 48
    assert all(item.norm is None for item in model.status(norms=False))


def test_a_weighted_sum_of_adapters_is_one():
    model = of(a=CONFIGS["lora"], b=CONFIGS["lora-pattern"], c=CONFIGS["ia3"])
    model.set_scale("b", 0.5)
    model.add_weighted_adapter(["a", "b"], [0.75, 2.0], "sum", "cat")
    assert model.active_adapters == ["a"]
    model.set_adapter("sum")
    found = logits(model)
    model.set_scale("a", 0.75)
    model.set_scale("b", 1.0)
    model.set_adapter(["a", "b"])
    np.testing.assert_allclose(found, logits(model), atol=1e-9)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="one for each"):
        model.add_weighted_adapter(["a", "b"], [1.0], "other")
    with pytest.raises(PeftError, match="combination"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "other", "tie")
    assert snapshot(model) == before
