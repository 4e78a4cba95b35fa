"""Soft prompts beside other adapters: together, and in batches whose samples have a prompt, another adapter or none."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import ConfigError, LoraConfig, PrefixTuningConfig, PromptTuningConfig, UnsupportedError, models
from peftarray.model import PeftModel
from peftarray.prompted import PromptModel

from .libraries import on_libraries

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 24},
    "llama": {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "bert": {
        "model_type": "bert",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
    },
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"], "bert": ["query", "dense"]}
ADAPTERS = {
    "two": PromptTuningConfig(num_virtual_tokens=2),
    "five": PromptTuningConfig(num_virtual_tokens=5),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "short": PrefixTuningConfig(num_virtual_tokens=1),
}
IDS = np.asarray([[1, 7, 3], [0, 1, 10], [2, 2, 5], [9, 0, 4], [3, 3, 8], [6, 1, 1]])
MASK = np.asarray([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
ROWS = ["five", None, "lora", "two", "five", "lora"]


def of(kind: str, asarray: Any, to_numpy: Any) -> PeftModel:
    made: Any = models.create(MODELS[kind], seed=1)
    draw = np.random.default_rng(0)
    weights = {name: to_numpy(array) + 0.3 * draw.standard_normal(array.shape) for name, array in made.weights.items()}
    if kind == "bert":
        weights |= {name: np.asarray(array, np.float64) for name, array in made.new_classifier(3).items()}
    model = PeftModel(replace(made, weights={name: asarray(array) for name, array in weights.items()}))
    model.add_adapter("lora", LoraConfig(r=2, init_lora_weights=False, target_modules=TARGETS[kind]))
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model.add_adapter(name, config, seed=seed)
    return model


def each_alone(model: PeftModel, rows: list[Any], ids: Any, mask: Any, to_numpy: Any) -> list[np.ndarray]:
    found = []
    for i, name in enumerate(rows):
        given = mask if mask is None else mask[i : i + 1]
        if name is None:
            with model.disable_adapter():
                found.append(to_numpy(model(ids[i : i + 1], given)))
        else:
            model.set_adapter(name)
            found.append(to_numpy(model(ids[i : i + 1], given)))
    return found


BATCHES = {
    "tokens": ROWS,
    "prefixes": ["prefix", "short", None, "lora", "prefix", None],
    "both": ["prefix", "five", None, "two", "short", "lora"],
    "one": ["two"] * 6,
}


@on_libraries(
    "kind,batch,masked",
    itertools.product(MODELS, BATCHES, [False, True]),
    also=lambda kind, batch, masked: (kind, batch, masked) in {("llama", "both", True), ("bert", "both", False)},
)
def test_each_sample_is_what_it_is_alone(kind, batch, masked, asarray, to_numpy):
    model = of(kind, asarray, to_numpy)
    mask, rows = MASK if masked else None, BATCHES[batch]
    wanted = np.concatenate(each_alone(model, rows, IDS, mask, to_numpy))
    found = to_numpy(model(IDS, mask, adapter_names=rows))
    keep = np.ones(IDS.shape, bool) if mask is None or kind == "bert" else mask == 1
    if kind == "bert":
        np.testing.assert_allclose(found, wanted, atol=1e-9)
    else:
        np.testing.assert_allclose(found[keep], wanted[keep], atol=1e-9)


@on_libraries(
    "kind,prompt", itertools.product(MODELS, ["two", "prefix"]), also=lambda *case: case == ("gpt2", "prefix")
)
def test_a_prompt_acts_beside_a_method(kind, prompt, asarray, to_numpy):
    model = of(kind, asarray, to_numpy)
    model.set_adapter(["lora", prompt])
    found = to_numpy(model(IDS))
    model.set_adapter("lora")
    merged = model.merge_and_unload()
    alone = PromptModel(merged, model.registry.found(prompt).config, model.registry.found(prompt).values)
    np.testing.assert_allclose(found, to_numpy(alone(IDS)), atol=1e-9)
    model.set_adapter(["lora", prompt])
    assert {name.rpartition(".")[2] for name in model.params} == {"lora", prompt}
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_and_unload()
    with model.merged("lora"):  # the prompt still acts
        np.testing.assert_allclose(to_numpy(model(IDS)), found, atol=1e-9)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"], indirect=True)
def test_gradients_reach_each_prompt(asarray, to_numpy, xp):
    model = of("llama", asarray, to_numpy)
    backend = pa.backend.load_backend(next(n for n in ("torch", "jax", "numpy") if n in xp.__name__.split(".")))
    rows = ["five", None, "lora", "five", None, "lora"]
    model.set_adapter(["lora", "five"])

    def batch(params: Any) -> Any:
        y = model.with_params(params)(IDS, adapter_names=rows)
        return (y * y).sum()

    _, gradients = backend.value_and_grad(batch)(model.params)
    for name in ("lora", "five"):
        apart = PeftModel(model.base, model.registry)
        apart.set_adapter(name)
        mine = IDS[[i for i, row in enumerate(rows) if row == name]]

        def own(params: Any, apart: PeftModel = apart, mine: Any = mine) -> Any:
            y = apart.with_params(params)(mine)
            return (y * y).sum()

        _, wanted = backend.value_and_grad(own)(apart.params)
        for key, array in wanted.items():
            np.testing.assert_allclose(to_numpy(gradients[f"{key}.{name}"]), to_numpy(array), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("library", ["numpy"], indirect=True)
def test_each_writes_on_as_it_does_alone(kind, asarray, to_numpy):
    model = of(kind, asarray, to_numpy)
    rows = ["five", None, "lora", "two", "prefix", "short"]
    alone = []
    for i, name in enumerate(rows):
        options = {"max_new_tokens": 5, "eos_token_id": ()}
        if name is None:
            with model.disable_adapter():
                alone.append(model.generate(IDS[i : i + 1], MASK[i : i + 1], **options))
        else:
            model.set_adapter(name)
            alone.append(model.generate(IDS[i : i + 1], MASK[i : i + 1], **options))
    together = model.generate(IDS, MASK, adapter_names=rows, max_new_tokens=5, eos_token_id=())
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("library", ["numpy"], indirect=True)
def test_a_prompt_for_each_task(asarray, to_numpy):
    model = of("gpt2", asarray, to_numpy)
    tasks = pa.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3)
    model.add_adapter("tasks", tasks)
    model.set_adapter("tasks")
    told = [2, 0, 1, 2, 2, 1]
    together = model.for_tasks(told)(IDS)
    rows = ["tasks", "two", None, "tasks", "lora", "tasks"]
    found = model.for_tasks(told)(IDS, adapter_names=rows)
    np.testing.assert_allclose(found[[0, 3, 5]], together[[0, 3, 5]], atol=1e-10)
    model.set_adapter("two")
    np.testing.assert_allclose(found[1:2], model(IDS[1:2]), atol=1e-10)


def test_what_goes_with_no_prompt_is_refused():
    model = of("llama", np.asarray, np.asarray)
    with pytest.raises(UnsupportedError, match="both prompts"):
        model.set_adapter(["two", "five"])
    with pytest.raises(UnsupportedError, match="no scale"):
        model.set_scale("two", 0.5)
    model.add_adapter("within", pa.AdaptionPromptConfig(adapter_len=2, adapter_layers=1))
    model.set_adapter(["lora", "within"])
    assert model(IDS).shape == (6, 3, 11)
    with pytest.raises(UnsupportedError, match="lies within the layers"):
        model(IDS, adapter_names=["within", None, None, None, None, None])
    windowed = models.create({**MODELS["llama"], "model_type": "mistral", "sliding_window": 4})
    other = PeftModel(windowed)
    for name in ("five", "prefix"):
        other.add_adapter(name, ADAPTERS[name])
    with pytest.raises(UnsupportedError, match="virtual tokens of one kind"):
        other(IDS, adapter_names=["five", "prefix", None, None, None, None])
    with pytest.raises(ConfigError, match="weights and no model"):
        PeftModel(dict(windowed.weights))(IDS)


@pytest.mark.parametrize("library", ["numpy"], indirect=True)
def test_a_window_sees_past_the_padding_of_other_prompts(asarray, to_numpy):
    made = models.create({**MODELS["llama"], "model_type": "mistral", "sliding_window": 4})
    model = PeftModel(made)
    for name in ("two", "five"):
        model.add_adapter(name, ADAPTERS[name])
    rows = ["two", "five", None, "two", "five", None]
    wanted = np.concatenate(each_alone(model, rows, IDS, None, to_numpy))
    np.testing.assert_allclose(model(IDS, adapter_names=rows), wanted, atol=1e-5)


def test_they_are_saved_side_by_side(tmp_path):
    model = of("llama", np.asarray, np.asarray)
    model.save_pretrained(tmp_path)
    again = PeftModel(model.base)
    for name in model.peft_config:
        again.load_adapter(tmp_path / name, name, lazy=True)
    assert again.peft_config.keys() == model.peft_config.keys()
    rows = ["five", None, "lora", "two", "prefix", "lora"]
    found, wanted = again(IDS, adapter_names=rows), model(IDS, adapter_names=rows)
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # a file keeps float32 prompts
    again.save_pretrained(tmp_path / "again")
    for name in model.peft_config:
        for file in (tmp_path / name).iterdir():
            if file.is_file():
                assert (tmp_path / "again" / name / file.name).read_bytes() == file.read_bytes()
