"""Adapters on the reference models: PEFT's files give PEFT's outputs, by the cheap path; training and saving."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from oracles import answer, assert_close, built, saved

import peftarray as pa
from peftarray import models
from peftarray.adapted_weight import AdaptedWeight

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12}
LLAMA = ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 1})
TIED = ("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True})
GPT2 = ("GPT2LMHeadModel", {"n_embd": 8, "n_head": 2, "n_layer": 2})
BERT = ("BertForSequenceClassification", SIZES | {"num_labels": 3})
IDS = np.asarray([[3, 4, 5, 6, 7], [8, 9, 10, 11, 0]])
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])

CASES = {
    "llama-linear": (LLAMA, peft.LoraConfig(r=3, target_modules="all-linear")),
    "llama-dora-head": (LLAMA, peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "lm_head"])),
    "llama-oft": (LLAMA, peft.OFTConfig(oft_block_size=4, r=0, target_modules=["v_proj", "down_proj"])),
    "llama-ia3": (LLAMA, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "tied-embedding": (TIED, peft.LoraConfig(r=2, target_modules=["embed_tokens", "up_proj"])),
    "tied-both": (TIED, peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)),
    "tied-tokens": (TIED, peft.TrainableTokensConfig(token_indices=[3, 8, 9], target_modules=["embed_tokens"])),
    "tied-tokens-too": (TIED, peft.LoraConfig(r=2, target_modules=["o_proj"], trainable_token_indices=[4, 7])),
    "gpt2": (GPT2, peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"])),
    "gpt2-flagged": (GPT2, peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)),
    "bert": (BERT, peft.LoraConfig(r=3, target_modules=["query", "dense"], modules_to_save=["classifier"])),
    "bert-embeddings": (BERT, peft.LoraConfig(r=3, target_modules=["word_embeddings", "value"])),
}


def live(oracle, config, folder: Path):
    """The model with PEFT's adapter on it, each of whose arrays holds random numbers; saved to a folder."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(oracle, config).eval()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft(case, loaded, run, to_numpy, tmp_path):
    built_of, config = CASES[case]
    oracle = built(*built_of)
    with saved(oracle) as folder:
        base = loaded(folder)
    before = answer(oracle, IDS, MASK).logits
    wanted = answer(live(oracle, config, tmp_path), IDS, MASK).logits
    model = pa.PeftModel.from_pretrained(base, tmp_path)
    weights = model.weights
    found = to_numpy(run(lambda w: base(w, IDS, MASK), weights))
    where = MASK if found.ndim == 3 else None
    assert_close(found, wanted, 2e-5, where)
    assert np.abs(found - before.numpy()).max() > 1e-2 * np.abs(found).max()
    merged = model.merge_and_unload()
    assert_close(to_numpy(run(lambda w: base(w, IDS, MASK), merged.weights)), wanted, 2e-5, where)


@pytest.mark.parametrize("case", ["llama-linear", "gpt2", "bert"])
def test_models_take_the_cheap_way(case, tmp_path):
    built_of, config = CASES[case]
    oracle = built(*built_of)
    with saved(oracle) as folder:
        base = models.load(folder)
    live(oracle, config, tmp_path)
    weights = pa.PeftModel.from_pretrained(base, tmp_path).weights
    base(weights, IDS, MASK)
    adapted = [weight for weight in weights.values() if isinstance(weight, AdaptedWeight)]
    assert len(adapted) >= 8
    assert [weight.materialised for weight in adapted] == [0] * len(adapted)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training(kind, loaded, to_numpy, tmp_path):
    wide = {"hidden_size": 32} if kind == "llama" else {"n_embd": 32}
    name, sizes = {"llama": LLAMA, "gpt2": GPT2}[kind]
    with saved(built(name, sizes | wide)) as folder:
        base = loaded(folder)
    names = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc", "c_proj", "wte"]}
    model = pa.get_peft_model(base, pa.LoraConfig(r=4, lora_alpha=16, target_modules=names[kind]))
    loss = models.causal_loss(base)
    batches = [{"input_ids": np.arange(1, 13).reshape(2, 6)}]
    history = pa.fit(
        model, lambda m, batch: loss(m.weights, batch), batches, steps=120, optimizer=pa.AdamW(0.01), progress=False
    )
    assert history.losses[-1] < history.losses[0] - 2.0
    assert base.generate(model.weights, [[1, 2]], max_new_tokens=3).tolist() == [[1, 2, 3, 4, 5]]
    model.save_pretrained(tmp_path)
    again = pa.PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_array_equal(to_numpy(base(again.weights, IDS)), to_numpy(base(model.weights, IDS)))
