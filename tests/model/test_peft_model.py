"""Whole models as mappings of weights, every method on every library."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import LoraConfig, MatchError, PeftError, UnsupportedError, VeraConfig
from peftarray.draws import step_key
from peftarray.model import PeftModel, get_peft_model

from .cases import CONFIGS, WIDTH, base_weights, moved, run

IDS = np.asarray([[1, 7, 3], [0, 1, 10]])
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def base(asarray) -> dict[str, Any]:
    return {name: asarray(array) for name, array in base_weights().items()}


@pytest.fixture
def trained(base, asarray, to_numpy) -> Callable[[pa.AdapterConfig], PeftModel]:
    """A model whose adapter is away from its first state."""

    def make(config: pa.AdapterConfig) -> PeftModel:
        model = get_peft_model(base, config)
        return model.with_params(moved(model.params, asarray, to_numpy))

    return make


def formed(weights: dict[str, Any]) -> list[str]:
    return [name for name, weight in weights.items() if getattr(weight, "materialised", 0)]


@every_config
def test_a_new_adapter_changes_nothing(config, base, asarray, to_numpy):
    model = get_peft_model(base, config)
    found, wanted = run(model.weights, asarray(IDS)), run(base, asarray(IDS))
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), atol=1e-12)


@every_config
def test_the_cheap_way_is_the_merged_one(config, trained, base, asarray, to_numpy):
    model = trained(config)
    weights = model.weights
    found, wanted = run(weights, asarray(IDS)), run(model.effective_weights(), asarray(IDS))
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), atol=1e-10)
    assert formed(weights) == []
    assert np.abs(to_numpy(found) - to_numpy(run(base, asarray(IDS)))).max() > 1e-3
    merged = model.merge_and_unload(safe_merge=True)
    np.testing.assert_array_equal(to_numpy(run(merged, asarray(IDS))), to_numpy(wanted))
    assert model.unload() is base


@every_config
def test_it_is_saved_and_loaded(config, trained, base, asarray, to_numpy, tmp_path):
    model = trained(config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert list(again.params) == list(model.params)
    found, wanted = run(again.weights, asarray(IDS)), run(model.weights, asarray(IDS))
    np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))
    frozen = PeftModel.from_pretrained(base, tmp_path)
    assert frozen.params == {}
    assert list(frozen.unfreeze().params) == list(model.params)
    assert again.freeze().params == {}


@every_config
def test_a_seed_gives_the_same_bits_everywhere(config, base, to_numpy):
    here = get_peft_model(base_weights(), config, seed=3).params
    there = get_peft_model(base, config, seed=3).params
    for name, array in here.items():
        if "magnitude" not in name:  # norms of the weights
            np.testing.assert_array_equal(to_numpy(there[name]), array)


def gradients_of(backend: str, model: PeftModel, ids: Any) -> tuple[Any, dict[str, Any]]:
    """By the library's own differentiation, of a loss that is a pure function of the parameters."""

    def loss(params: dict[str, Any]) -> Any:
        y = run(model.with_params(params).weights, ids)
        return (y * y).sum()

    return pa.backend.load_backend(backend).value_and_grad(loss)(model.params)


@every_config
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"], indirect=True)
def test_libraries_agree_on_gradients(config, trained, asarray, to_numpy, xp):
    model = trained(config)
    name = next(name for name in ("torch", "jax", "numpy") if name in xp.__name__.split("."))
    _, gradients = gradients_of(name, model, asarray(IDS))
    assert list(gradients) == list(model.params)
    small = 1e-6
    for key, array in model.params.items():
        direction = np.random.default_rng(5).standard_normal(array.shape)
        ends = []
        for sign in (1, -1):
            moved_there = asarray(to_numpy(array) + sign * small * direction)
            y = run(model.with_params({key: moved_there}).weights, asarray(IDS))
            ends.append(float((to_numpy(y) ** 2).sum()))
        if "use_dora" in vars(config) and config.use_dora and "magnitude" not in key:
            continue  # the norm is a constant of the gradient, and not of the loss
        slope = (ends[0] - ends[1]) / (2 * small)
        assert math.isclose(float((to_numpy(gradients[key]) * direction).sum()), slope, rel_tol=1e-4, abs_tol=1e-3)


@pytest.mark.parametrize("library", ["jax"], indirect=True)
@pytest.mark.parametrize("name", ["lora", "oft", "vera"])
def test_a_compiled_function_leaves_nothing_behind(name, trained, asarray):
    import jax

    model = trained(CONFIGS[name])
    weights = model.weights
    compiled = jax.jit(lambda ids: run(weights, ids))
    first = compiled(asarray(IDS))
    np.testing.assert_allclose(run(weights, asarray(IDS)), first, atol=1e-12)
    passed = jax.jit(run)(weights, asarray(IDS))
    np.testing.assert_allclose(passed, first, atol=1e-12)


def test_parameters_are_set_in_place_of_others(base, asarray, to_numpy):
    model = get_peft_model(base, CONFIGS["lora"])
    new = moved(model.params, asarray, to_numpy)
    changed = model.with_params(new)
    assert all(model.params[name] is not array for name, array in new.items())
    model.params = new
    assert all(model.params[name] is array for name, array in new.items())
    found, wanted = run(model.weights, asarray(IDS)), run(changed.weights, asarray(IDS))
    np.testing.assert_array_equal(to_numpy(found), to_numpy(wanted))
    with pytest.raises(MatchError, match=r"lora_C.*nearest.*lora_"):
        model.with_params({"model.layers.0.self_attn.q_proj.lora_C": new["model.layers.0.self_attn.q_proj.lora_A"]})


def test_counts_are_those_of_peft(base, capsys):
    model = get_peft_model(base, CONFIGS["lora-saved"])
    total = sum(array.size for array in base_weights().values())
    lora, biases, head = 6 * 2 * 2 * WIDTH, 3 * WIDTH, 11 * WIDTH
    model.print_trainable_parameters()
    trained = lora + biases + head
    share = 100 * trained / (total + trained)
    assert capsys.readouterr().out == (
        f"trainable params: {trained:,d} || all params: {total + trained:,d} || trainable%: {share:.4f}\n"
    )


def test_what_layers_share_is_trained_and_kept_once(base):
    model = get_peft_model(base, VeraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    kept = {id(adapter.params["vera_A"]) for adapter in model.adapters.values()}
    assert len(model.adapters) == 6
    assert len(kept) == 1


def test_trees_and_kernels_of_flax(asarray, to_numpy):
    draw = np.random.default_rng(0)
    layers = [{"attention": {"kernel": asarray(draw.standard_normal((4, 6))), "bias": asarray(np.ones(6))}}]
    tree = {"embed": {"embedding": asarray(draw.standard_normal((9, 4)))}, "layers": layers}
    model = get_peft_model(tree, LoraConfig(r=2, target_modules=["attention", "embed"]))
    model = model.with_params(moved(model.params, asarray, to_numpy))

    def forward(weights: Any) -> Any:
        part = weights["layers"][0]["attention"]
        rows = pa.arrays.namespace(weights["embed"]["embedding"]).take(
            weights["embed"]["embedding"], asarray(np.asarray([8, 0])), axis=0
        )
        return rows @ part["kernel"] + part["bias"]

    weights = model.weights
    found, wanted = forward(weights), forward(model.effective_weights())
    np.testing.assert_allclose(to_numpy(found), to_numpy(wanted), atol=1e-12)
    assert weights["layers"][0]["attention"]["kernel"].materialised == 0
    assert weights["embed"]["embedding"].materialised == 0


def test_bare_names_and_the_other_orientation(asarray, to_numpy):
    draw = np.random.default_rng(0)
    weights = {"w1": asarray(draw.standard_normal((4, 6))), "w2": asarray(draw.standard_normal((6, 3)))}
    model = get_peft_model(weights, LoraConfig(r=2, target_modules=["w1", "w2"], fan_in_fan_out=True))
    assert model.params["w1.lora_A"].shape == (2, 4)
    assert model.params["w2.lora_B"].shape == (3, 2)
    x, now = asarray(draw.standard_normal((2, 4))), model.weights
    assert (x @ now["w1"] @ now["w2"]).shape == (2, 3)
    assert now["w1"].materialised == now["w2"].materialised == 0


@dataclass(frozen=True)
class Gpt2:
    """A model as an object: what it is, its weights, and a function of them."""

    weights: dict[str, Any]
    config: Any = field(default_factory=lambda: SimpleNamespace(model_type="gpt2"))

    def __call__(self, weights: dict[str, Any], x: Any) -> Any:
        return x @ weights["h.0.attn.c_attn.weight"]


def test_a_model_tells_its_architecture(asarray, to_numpy, tmp_path):
    """GPT-2 stores its layers `(in, out)`."""
    draw = np.random.default_rng(0)
    base = Gpt2({"h.0.attn.c_attn.weight": asarray(draw.standard_normal((4, 12)))})
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))
    model.params = moved(model.params, asarray, to_numpy)
    assert model.params["h.0.attn.c_attn.lora_A"].shape == (2, 4)
    x = asarray(draw.standard_normal((3, 4)))
    merged = model.merge_and_unload()
    assert isinstance(merged, Gpt2)
    np.testing.assert_allclose(to_numpy(model(x)), to_numpy(merged(merged.weights, x)), atol=1e-12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))


def test_a_file_of_a_model_with_a_head_fits_one_without(base, asarray, to_numpy, tmp_path):
    model = get_peft_model(base, CONFIGS["lora"])
    model.params = moved(model.params, asarray, to_numpy)
    model.save_pretrained(tmp_path)
    inner = {name.removeprefix("model."): array for name, array in base.items() if name.startswith("model.")}
    again = PeftModel.from_pretrained(inner, tmp_path)
    for name, adapter in again.adapters.items():
        wanted = model.adapters[f"model.{name}"]
        np.testing.assert_array_equal(to_numpy(adapter.params["lora_B"]), to_numpy(wanted.params["lora_B"]))
    assert len(again.adapters) == 6


def test_layers_say_what_names_do_not(asarray):
    weights = {"positions": asarray(np.ones((5, 4)))}
    told = {"positions": pa.Layer("positions", "embedding", (4, 5), transposed=True)}
    model = get_peft_model(weights, LoraConfig(r=2, target_modules=["positions"]), layers=told)
    table = model.weights["positions"]
    assert pa.arrays.namespace(table).take(table, asarray(np.asarray([1, 2])), axis=0).shape == (2, 4)
    assert table.materialised == 0
    assert model.adapters["positions"].layer.kind == "embedding"
    with pytest.raises(MatchError, match=r"position_.*nearest.*positions"):
        get_peft_model(weights, LoraConfig(target_modules=["positions"]), layers={"position_": told["positions"]})


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"], indirect=True)
def test_dropout_is_drawn_by_the_key(base, asarray, to_numpy):
    model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    model = model.with_params(moved(model.params, asarray, to_numpy))
    calm = to_numpy(run(model.weights, asarray(IDS)))
    first, again, other = (to_numpy(run(model.training_weights(step_key(0, step)), asarray(IDS))) for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - calm).max() > 1e-3
    with pytest.raises(UnsupportedError, match="dropout"):
        model.training_weights(1)["model.layers.0.self_attn.q_proj.weight"] + 1


REFUSED: dict[str, tuple[Callable[[], pa.AdapterConfig], str]] = {
    "no target": (lambda: LoraConfig(), "target_modules is None"),
    "a target of nothing": (lambda: LoraConfig(target_modules=["q_prj"]), r"q_prj.*nearest: .*q_proj"),
    "one target of nothing": (lambda: LoraConfig(target_modules=["q_proj", "v_proj"]), r"'v_proj', which matches none"),
    "a pattern of nothing": (lambda: LoraConfig(target_modules=r".*\.9\..*"), "matches none of"),
    "a saved module of nothing": (
        lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_heat"]),
        r"lm_heat.*nearest.*lm_head",
    ),
    "a kind that it has no meaning on": (lambda: VeraConfig(target_modules=["embed_tokens"]), "embedding layers"),
    "a bias that is not there": (lambda: LoraConfig(lora_bias=True, target_modules=["o_proj"]), "has none"),
    "rows of an adapted embedding": (
        lambda: LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1]),
        "one way",
    ),
    "an initialiser": (lambda: LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights"),
    "another training": (lambda: LoraConfig(target_modules=["q_proj"], velora_config={"a": 1}), "velora_config"),
    "experts": (lambda: LoraConfig(target_modules=["q_proj"], target_parameters=["w"]), "target_parameters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case):
    config, words = REFUSED[case]
    with pytest.raises(PeftError, match=words):
        get_peft_model(base_weights(), config())


def test_a_model_of_no_known_kind_is_refused():
    with pytest.raises(PeftError, match="give a mapping of names to arrays"):
        get_peft_model(object(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PeftError, match=r"call your function with model\.weights"):
        get_peft_model(base_weights(), CONFIGS["lora"])(IDS)


def test_the_merged_model_must_be_finite():
    model = get_peft_model(base_weights(), CONFIGS["lora"])
    name = next(iter(model.params))
    broken = model.with_params({name: model.params[name] * math.nan})
    broken.merge_and_unload()
    with pytest.raises(pa.NumberError, match="NaN"):
        broken.merge_and_unload(safe_merge=True)
