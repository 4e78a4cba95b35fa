"""Every method and every prompt trains to the same losses on every library, over handwritten digits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import peftarray as pa
from peftarray import models
from peftarray.arrays import namespace
from peftarray.backend import backend_of, load_backend

sys.path.insert(0, str(Path(__file__).parent))
import digits

TARGETS = ["embed", "head"]
METHODS = {
    "LORA": pa.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "DORA": pa.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "ADALORA": pa.AdaLoraConfig(init_r=4, target_modules=TARGETS),
    "IA3": pa.IA3Config(target_modules=TARGETS, feedforward_modules=["head"]),
    "LOHA": pa.LoHaConfig(r=2, alpha=4, target_modules=TARGETS),
    "LOKR": pa.LoKrConfig(r=2, alpha=4, target_modules=TARGETS),
    "OFT": pa.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "BOFT": pa.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=TARGETS),
    "VERA": pa.VeraConfig(r=8, d_initial=1.0, target_modules=TARGETS),
    "TRAINABLE_TOKENS": pa.TrainableTokensConfig(token_indices=[0, 4, 8, 15], target_modules=["embed_tokens"]),
}
PROMPTS = {
    "PROMPT_TUNING": pa.PromptTuningConfig(num_virtual_tokens=3),
    "MULTITASK_PROMPT_TUNING": pa.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, num_ranks=2),
    "P_TUNING": pa.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": pa.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    "CPT": pa.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[1, 2, 5],
        cpt_tokens_type_mask=[1, 2, 4],
        opt_projection_epsilon=3.0,
        opt_projection_format_epsilon=3.0,
    ),
    "ADAPTION_PROMPT": pa.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
}
TINY = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
STEPS = 50
EXACT = {"float32": 1e-5, "float64": 1e-10}


def reader(config, convert, dtype):
    """A reader of digits under a method, its loss, and batches."""
    weights = {f"{name}.weight": convert(array.astype(dtype)) for name, array in digits.base().items()}
    model = pa.get_peft_model(weights, config, seed=1)

    def loss(model, batch):
        weights = model.weights
        xp = namespace(batch["x"], *model.params.values())
        scores = xp.tanh(batch["x"] @ weights["embed.weight"].mT) @ weights["head.weight"].mT
        shifted = scores - xp.max(scores, axis=-1, keepdims=True)
        logs = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
        return -xp.sum(logs * batch["y"]) / batch["y"].shape[0]

    batches = [{name: convert(array.astype(dtype)) for name, array in batch.items()} for batch in digits.batches()]
    return model, loss, batches


def writer(config, convert, dtype):
    """A tiny language model of pixels, under a prompt or with trained tokens, its loss, and batches."""
    tiny = models.create(TINY, seed=0)
    base = models.Llama(
        tiny.config,
        {name: convert(array.astype(dtype)) for name, array in tiny.weights.items()},
        tiny.prefix,
        facts=tiny.facts,
    )
    model = pa.get_peft_model(base, config, seed=1)
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        model = model.for_tasks([0, 1] * 4)
    over = models.causal_loss(base)
    rows = np.round(digits.images()[0][:, 24:34] * 16).astype(np.int64)
    batches = [{"input_ids": convert(rows[at : at + 8])} for at in range(0, 400, 8)]
    return model, lambda model, batch: over(model.weights, batch), batches


def made(name, convert, dtype):
    config = (METHODS | PROMPTS)[name]
    return (reader if name in METHODS and name != "TRAINABLE_TOKENS" else writer)(config, convert, dtype)


def gradients(name, convert, dtype):
    """Loss and gradients, a little away from where training starts."""
    model, loss, batches = made(name, convert, dtype)
    draw = np.random.default_rng(5)
    params = {
        key: array + convert((0.05 * draw.standard_normal(tuple(array.shape))).astype(dtype))
        for key, array in model.params.items()
    }
    backend = load_backend(backend_of(next(iter(params.values()))))
    return backend.value_and_grad(lambda p, batch: loss(model.with_params(p), batch))(params, batches[0])


def test_all_of_them_are_here():
    assert set(METHODS) - {"DORA"} == set(pa.METHODS)
    assert set(PROMPTS) == set(pa.PROMPTS)


@pytest.mark.parametrize("name", [*METHODS, *PROMPTS])
def test_fifty_steps_are_the_same_on_every_library(name, asarray):
    recipe = {"optimizer": pa.AdamW(1e-2), "steps": STEPS, "clip_norm": 1.0, "progress": False}
    model, loss, batches = made(name, np.asarray, np.float32)
    wanted = pa.fit(model, loss, batches, **recipe)
    assert np.mean(wanted.losses[-7:]) < np.mean(wanted.losses[:7])
    model, loss, batches = made(name, asarray, np.float32)
    found = pa.fit(model, loss, batches, **recipe)
    assert len(found.losses) == STEPS
    np.testing.assert_allclose(found.losses, wanted.losses, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=EXACT)
@pytest.mark.parametrize("name", [*METHODS, *PROMPTS])
def test_gradients_are_the_same_on_every_library(name, dtype, asarray, to_numpy):
    value, wanted = gradients(name, np.asarray, dtype)
    found, others = gradients(name, asarray, dtype)
    exact = EXACT[np.dtype(dtype).name]
    np.testing.assert_allclose(to_numpy(found), value, rtol=exact)
    assert wanted.keys() == others.keys()
    for key, array in wanted.items():
        assert to_numpy(others[key]).dtype == dtype
        np.testing.assert_allclose(to_numpy(others[key]), array, rtol=0, atol=exact * np.abs(array).max(), err_msg=key)
