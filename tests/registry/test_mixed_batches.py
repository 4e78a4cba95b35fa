"""A batch whose samples have adapters of their own: each comes out as it does alone, and trains as it does alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import ConfigError, LoraConfig, MatchError, ShapeError, UnsupportedError
from peftarray.arrays import namespace
from peftarray.draws import step_key
from peftarray.mixed import mixed_bias, mixed_weight
from peftarray.model import PeftModel

from ..model.cases import CONFIGS, WIDTH, base_weights, moved, run
from .libraries import on_libraries

IDS = np.asarray([[1, 7, 3], [0, 1, 10], [2, 2, 5], [9, 0, 4], [3, 3, 8], [6, 1, 1]])
ROWS: list[str | None] = ["b", None, "a", "b", "__base__", "a"]

CORE = ("lora", "dora", "ia3", "loha", "lokr", "vera", "oft")


def of(names: dict[str, pa.AdapterConfig], base: Any, asarray: Any, to_numpy: Any) -> PeftModel:
    """A model with adapters that are away from their first state, all active one by one."""
    model = PeftModel(base)
    for seed, (name, config) in enumerate(names.items()):
        model.add_adapter(name, config, seed=seed)
        model.set_adapter(name)
        model.params = {
            key: asarray(to_numpy(array) + 0.1 * seed) for key, array in moved(model.params, asarray, to_numpy).items()
        }
    return model


def alone(model: PeftModel, rows: list[str | None], ids: Any, forward: Callable[[Any, Any], Any]) -> list[Any]:
    """What each sample gives in a batch of its own."""
    found = []
    for i, name in enumerate(rows):
        if name in (None, "__base__"):
            with model.disable_adapter():
                weights = model.weights
        else:
            model.set_adapter(name)
            weights = model.weights
        found.append(forward(weights, ids[i : i + 1, ...]))
    return found


@pytest.fixture
def base(asarray) -> dict[str, Any]:
    return {name: asarray(array) for name, array in base_weights().items()}


@on_libraries("name", [(name,) for name in CONFIGS], also=lambda name: name in CORE)
def test_each_sample_is_what_it_is_alone(name, base, asarray, to_numpy):
    """Beside a plain LoRA, so that every method meets one that adds apart."""
    first = LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"])
    model = of({"a": first, "b": CONFIGS[name]}, base, asarray, to_numpy)
    ids = asarray(IDS)
    wanted = np.concatenate([to_numpy(y) for y in alone(model, ROWS, ids, run)])
    found = to_numpy(run(model.weights_for(ROWS), ids))
    np.testing.assert_allclose(found, wanted, atol=1e-10)
    assert np.abs(found[0] - to_numpy(run(base, ids))[0]).max() > 1e-3


def flat(weights: Any, ids: Any) -> Any:
    """The same layer on rows, samples after samples, as the models of the package have them."""
    xp = namespace(*weights.values())
    x = namespace(weights["model.embed_tokens.weight"]).take(
        weights["model.embed_tokens.weight"], xp.reshape(ids, (-1,)), axis=0
    )
    name = "model.layers.0.self_attn.q_proj"
    return x @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"]


@on_libraries(
    "rows", [(ROWS,), (["a"] * 6,), ([None] * 6,), ([None, None, "a", "a", "b", "b"],)], also=lambda rows: rows is ROWS
)
def test_rows_of_samples_are_samples(rows, base, asarray, to_numpy):
    names = {"a": CONFIGS["lora"], "b": CONFIGS["ia3"]}
    model = of(names, base, asarray, to_numpy)
    wanted = np.concatenate([to_numpy(y) for y in alone(model, rows, asarray(IDS), flat)])
    np.testing.assert_allclose(to_numpy(flat(model.weights_for(rows), asarray(IDS))), wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("library", "name"),
    [(library, name) for library in ("numpy", "torch", "jax") for name in (CORE[::3] if library == "jax" else CORE)],
    indirect=["library"],
)
def test_gradients_reach_each_adapter(name, base, asarray, to_numpy, xp):
    """And equal those of each sample alone."""
    config = CONFIGS[name]
    model = of({"a": LoraConfig(r=3, target_modules=["q_proj"]), "b": config}, base, asarray, to_numpy)
    model.set_adapter(["a", "b"])
    backend = pa.backend.load_backend(next(n for n in ("torch", "jax", "numpy") if n in xp.__name__.split(".")))
    ids = asarray(IDS)

    def batch(params: Any) -> Any:
        y = run(model.with_params(params).weights_for(ROWS), ids)
        return (y * y).sum()

    _, gradients = backend.value_and_grad(batch)(model.params)
    assert {key.rpartition(".")[2] for key in gradients} == {"a", "b"}
    for adapter in ("a", "b"):
        apart = PeftModel(base, model.registry)
        apart.set_adapter(adapter)
        mine = asarray(IDS[[i for i, row in enumerate(ROWS) if row == adapter]])

        def own(params: Any, apart: PeftModel = apart, mine: Any = mine) -> Any:
            y = run(apart.with_params(params).weights, mine)
            return (y * y).sum()

        _, wanted = backend.value_and_grad(own)(apart.params)
        for key, array in wanted.items():
            np.testing.assert_allclose(to_numpy(gradients[f"{key}.{adapter}"]), to_numpy(array), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("library", ["jax"], indirect=True)
def test_it_is_compiled(base, asarray, to_numpy):
    import jax

    model = of({"a": CONFIGS["lora"], "b": CONFIGS["oft"]}, base, asarray, to_numpy)
    weights = model.weights_for(ROWS)
    wanted = to_numpy(run(weights, asarray(IDS)))
    np.testing.assert_allclose(jax.jit(run)(weights, asarray(IDS)), wanted, atol=1e-10)
    np.testing.assert_allclose(jax.jit(lambda ids: run(weights, ids))(asarray(IDS)), wanted, atol=1e-10)


def test_whole_heads_and_biases_are_each_samples_own(base, asarray, to_numpy):
    names = {"a": CONFIGS["lora-saved"], "b": CONFIGS["lora-tokens"]}
    model = of(names, base, asarray, to_numpy)
    wanted = np.concatenate([to_numpy(y) for y in alone(model, ROWS, asarray(IDS), run)])
    np.testing.assert_allclose(to_numpy(run(model.weights_for(ROWS), asarray(IDS))), wanted, atol=1e-10)


def test_convolutions(asarray, to_numpy, xp):
    draw = np.random.default_rng(0)
    weights = {"conv.weight": asarray(draw.standard_normal((4, 3, 3)))}
    told = {"conv": pa.Layer("conv", "conv", (4, 3, 3))}
    model = PeftModel(weights, layers=told)
    for name, config in (
        ("a", LoraConfig(r=2, target_modules=["conv"])),
        ("b", pa.LoHaConfig(r=2, target_modules=["conv"])),
    ):
        model.add_adapter(name, config)
        model.set_adapter(name)
        model.params = moved(model.params, asarray, to_numpy)
    x = asarray(draw.standard_normal((6, 3, 8)))

    def conv(weights: Any, x: Any) -> Any:
        w = weights["conv.weight"]
        if hasattr(w, "convolved"):
            return w.convolved(x, ((2,), (1,), (1,)), 1)
        layer = pa.Layer("conv", "conv", (4, 3, 3), window=pa.Window(2, 1))
        return pa.layers.contract(x, layer.view(w), layer)

    wanted = np.concatenate([to_numpy(y) for y in alone(model, ROWS, x, conv)])
    np.testing.assert_allclose(to_numpy(conv(model.weights_for(ROWS), x)), wanted, atol=1e-10)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"], indirect=True)
def test_dropout_is_each_adapters_own(base, asarray, to_numpy):
    names = {name: LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]) for name in "ab"}
    model = of(names, base, asarray, to_numpy)
    runs = [
        to_numpy(run(model.training_weights(step_key(0, step), adapter_names=ROWS), asarray(IDS))) for step in (1, 1, 2)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2])[[0, 2, 3, 5]].max() > 1e-3
    np.testing.assert_allclose(runs[0][[1, 4]], to_numpy(run(base, asarray(IDS)))[[1, 4]], atol=1e-12)


def test_what_no_sample_can_have_is_refused(base):
    model = PeftModel(base_weights())
    model.add_adapter("first", CONFIGS["lora"])
    model.add_adapter("second", CONFIGS["lora"], seed=1)
    with pytest.raises(MatchError, match=r"'fist'.*nearest: first"):
        model.weights_for(["first", "fist"])
    with pytest.raises(ConfigError, match="empty"):
        model.weights_for([])
    weights = model.weights_for(["first", "second"])
    with pytest.raises(ShapeError, match=r"2 samples .*got \(3, 12\)"):
        np.ones((3, WIDTH)) @ weights["model.layers.0.self_attn.q_proj.weight"].T
    with pytest.raises(UnsupportedError, match="different weights here"):
        np.linalg.norm(weights["model.layers.0.self_attn.q_proj.weight"])


def test_a_part_that_is_everybodys_is_itself(asarray, to_numpy):
    one, two = asarray(np.eye(2)), asarray(2 * np.eye(2))
    assert mixed_weight([one, two], [1, 1]) is two
    x = asarray(np.ones((4, 2)))
    found = x @ mixed_weight([one, two], [1, 0]).T
    np.testing.assert_array_equal(to_numpy(found), [[2, 2], [2, 2], [1, 1], [1, 1]])
    bias = mixed_bias([asarray(np.zeros(2)), asarray(np.ones(2))], [0, 1])
    np.testing.assert_array_equal(to_numpy(x + bias), [[1, 1], [1, 1], [2, 2], [2, 2]])
    np.testing.assert_array_equal(to_numpy(bias + x), to_numpy(x + bias))


@pytest.mark.parametrize("library", ["jax"], indirect=True)
def test_slots_are_compiled_once(asarray, to_numpy):
    """A switch, another mix, and another adapter in a place: the compiled function goes on as it is."""
    import jax

    base = {name: jax.numpy.asarray(array) for name, array in base_weights().items()}
    model = PeftModel(base)
    ranks = {"a": 2, "b": 3, "c": 4, "d": 1}
    for seed, (name, rank) in enumerate(ranks.items()):
        config = LoraConfig(r=rank, init_lora_weights=False, target_modules=["q_proj", "embed_tokens"][: 1 + seed % 2])
        model.add_adapter(name, config, seed=seed)
    model.set_scale("b", 0.5)
    slots = model.slots(["b", "c"], max_rank=4, count=3)
    traces = []

    @jax.jit
    def logits(arrays: Any, index: Any, ids: Any) -> Any:
        traces.append(1)
        return run(slots.weights(index, arrays), ids)

    def check(now: Any, rows: list[str | None]) -> None:
        ids = jax.numpy.asarray(IDS)
        wanted = to_numpy(run(model.weights_for(rows), ids))
        np.testing.assert_allclose(logits(now.arrays, now.index(rows), ids), wanted, atol=1e-5)

    check(slots, ["b", None, "c", "b", None, "c"])
    check(slots, ["c"] * 6)
    third = slots.put("a", model.get_adapter("a"))
    check(third, ["a", None, "c", "b", "a", "c"])
    swapped = third.put("d", model.get_adapter("d"), place=third.place("c"))
    check(swapped, ["d", None, "d", "b", "a", "__base__"])
    assert len(traces) == 1
    logits(swapped.arrays, swapped.index("b"), jax.numpy.asarray(IDS))
    assert len(traces) == 2  # one for all samples is another shape
    with pytest.raises(ConfigError, match="all 3 slots are taken"):
        swapped.put("c", model.get_adapter("c"))
    with pytest.raises(MatchError, match="has no slot"):
        swapped.index(["c"])
    with pytest.raises(ConfigError, match="max_rank=4"):
        model.slots(["c"], max_rank=3)


@pytest.mark.parametrize("follows", [False, True])
def test_a_head_that_is_tied_to_an_adapted_embedding(follows):
    kind = {"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    base = pa.models.create({**kind, "num_attention_heads": 2, "tie_word_embeddings": True})
    config = LoraConfig(
        r=2, init_lora_weights=False, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=follows
    )
    model = PeftModel(base)
    for seed, name in enumerate("ab"):
        model.add_adapter(name, config, seed=seed)
    wanted = []
    for i, name in enumerate(("a", "b")):
        model.set_adapter(name)
        wanted.append(model(IDS[i : i + 1]))
    found = model(IDS[:2], adapter_names=["a", "b"])
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-5)
    if follows:
        with pytest.raises(UnsupportedError, match="tied head"):
            model.slots(max_rank=2)
    else:
        slots = model.slots(max_rank=2)
        np.testing.assert_allclose(base(slots.weights(slots.index(["a", "b"])), IDS[:2]), found, atol=1e-5)
