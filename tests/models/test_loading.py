"""Checkpoints become models: every dtype, layout and naming that files have, and clear words where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import VOCABULARY, answer, assert_close, built, saved
from safetensors.torch import load_file, save_file

import peftarray as pa
from peftarray import models
from peftarray.errors import PeftError

LLAMA = (
    "LlamaForCausalLM",
    {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12},
)
GPT2 = ("GPT2LMHeadModel", {"n_embd": 8, "n_head": 2, "n_layer": 2})
BERT = (
    "BertForSequenceClassification",
    {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12},
)
IDS = np.asarray([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.fixture(params=[LLAMA, GPT2, BERT], ids=["llama", "gpt2", "bert"])
def oracle(request):
    return built(*request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stored_dtypes_become_numbers_to_compute_with(oracle, dtype):
    oracle = oracle.to(dtype)
    with saved(oracle) as folder:
        weights = models.load(folder).weights
        wide = models.load(folder, dtype="float64").weights
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in oracle.state_dict().items():
        if name in weights:
            np.testing.assert_array_equal(weights[name], tensor.to(wanted).numpy(), strict=True)
            np.testing.assert_array_equal(wide[name], tensor.double().numpy(), strict=True)


def test_weights_may_stay_short_where_the_library_computes_so(oracle):
    with saved(oracle) as folder:
        model = models.load(folder, backend="torch", dtype="bfloat16")
    for name, tensor in oracle.state_dict().items():
        if name in model.weights:
            assert torch.equal(model.weights[name], tensor.bfloat16())
    assert model(model.weights, IDS).dtype == torch.bfloat16


def test_shards(oracle):
    with saved(oracle, max_shard_size="2KB") as folder:
        assert len(list(folder.glob("*.safetensors"))) > 2
        model = models.load(folder)
    assert_close(model(model.weights, IDS), answer(oracle, IDS, None).logits, 1e-5)


def test_a_model_that_was_saved_without_its_head():
    """Its names have no prefix; it gives hidden states, and logits where the head is tied."""
    for tied in (True, False):
        oracle = built(LLAMA[0], LLAMA[1] | {"tie_word_embeddings": tied})
        with saved(oracle.model) as folder:
            model = models.load(folder)
        assert "embed_tokens.weight" in model.weights
        hidden = model.hidden_states(model.weights, IDS)
        assert_close(hidden, answer(oracle.model, IDS, None).last_hidden_state, 1e-5)
        if tied:
            assert_close(model(model.weights, IDS), answer(oracle, IDS, None).logits, 1e-5)
        else:
            with pytest.raises(PeftError, match=r"no lm_head\.weight"):
                model(model.weights, IDS)


@pytest.mark.parametrize("same", [True, False])
def test_a_file_with_a_head_and_a_configuration_that_ties_it(same):
    """A head that differs from the embedding is what was trained; one that is equal takes no memory."""
    oracle = built(LLAMA[0], LLAMA[1] | {"tie_word_embeddings": True})
    with saved(oracle) as folder:
        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"] * (1 if same else 2)
        save_file(tensors | {"lm_head.weight": head.clone()}, folder / "model.safetensors")
        model = models.load(folder)
    assert ("lm_head.weight" in model.weights) is not same
    assert model.left_out == (("lm_head.weight",) if same else ())
    assert_close(model(model.weights, IDS), answer(oracle, IDS, None).logits * (1 if same else 2), 1e-5)


def test_the_first_names_of_norms():
    oracle = built(*BERT)
    with saved(oracle) as folder:
        tensors = load_file(folder / "model.safetensors")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for name in list(tensors):
            for new, first in old.items():
                if name.endswith(new):
                    tensors[name.replace(new, first)] = tensors.pop(name)
        save_file(tensors, folder / "model.safetensors")
        model = models.load(folder)
    assert_close(model(model.weights, IDS), answer(oracle, IDS, None).logits, 1e-5)


def test_what_a_model_does_not_use_is_named():
    with saved(built(*GPT2)) as folder:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, folder / "model.safetensors")
        model = models.load(folder)
    assert model.left_out == ("transformer.h.0.attn.masked_bias",)


def test_the_spelling_of_earlier_configurations():
    settings = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    oracle = built(LLAMA[0], LLAMA[1] | {"rope_parameters": settings})
    with saved(oracle) as folder:
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        (folder / "config.json").write_text(json.dumps(config))
        model = models.load(folder)
    assert_close(model(model.weights, IDS), answer(oracle, IDS, None).logits, 1e-5)


def test_a_new_model_is_the_same_everywhere(backend, to_numpy):
    for kind in ("llama", "gpt2", "bert"):
        config = {"model_type": kind, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
        config |= {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": VOCABULARY, "intermediate_size": 12}
        here = models.create(config, seed=3)
        there = models.create(config, seed=3, backend=backend)
        assert here.weights.keys() == there.weights.keys()
        for name, values in here.weights.items():
            np.testing.assert_array_equal(to_numpy(there.weights[name]), values, strict=True)
        name, values = next(iter(here.weights.items()))
        assert (models.create(config, seed=4).weights[name] != values).any()


@pytest.fixture
def llama(tmp_path):
    built(*LLAMA).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; the models known here are bert, gpt2, llama, mistral, qwen2"),
        ({"hidden_size": 9}, "model.embed_tokens.weight is (37, 8); config.json wants (37, 9)"),
        ({"hidden_size": "8"}, "LlamaConfig.hidden_size is '8'; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 10**12}, "has no tensor model.layers.2.self_attn.q_proj.weight; nearest: model.layers."),
        ({"num_key_value_heads": 3}, "2 attention heads cannot share 3 key-value heads"),
        ({"head_dim": 3}, "heads have 3 channels, which do not make pairs"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; models of type llama are known with 'silu' alone"),
        ({"rms_norm_eps": -1.0}, "LlamaConfig.rms_norm_eps is -1.0; it must be a finite number of at least 0"),
        ({"quantization_config": {"quant_method": "hqq"}}, "the quantisation method 'hqq' is not known"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope_type is 'spiral', which is not supported; there are default",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "need a positive number factor, got None"),
        ({"rope_parameters": {"rope_theta": 0}}, "need a positive number rope_theta, got 0"),
        ({"rope_parameters": [1]}, "described by [1]; they need an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only whole heads"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "short_factor must be a list of 2 numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}},
            "low_freq_factor is 4 and high_freq_factor 1; the first must be less",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 entries; there are 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["half"] * 2}, "it must be None or a list of 'full_attention' and"),
        ({"model_type": "gpt2", "n_embd": 7}, "n_embd is 7, which 12 heads do not divide"),
        (
            {"model_type": "gpt2", "activation_function": "mish"},
            "activation_function is 'mish'; it must be one of 'gelu'",
        ),
        ({"model_type": "gpt2", "add_cross_attention": True}, "which is not supported: this model reads one text"),
        ({"model_type": "bert", "is_decoder": True}, "which is not supported: this model reads in both directions"),
    ],
)
def test_configurations_that_are_refused(llama, changes, words):
    rewrite(llama, **changes)
    with pytest.raises(PeftError) as caught:
        models.load(llama)
    assert words in str(caught.value)


def test_other_things_that_are_refused(llama, tmp_path_factory):
    def refused(words, path=llama, **options):
        with pytest.raises(PeftError) as caught:
            models.load(path, **options)
        assert words in str(caught.value)

    refused("has no config.json beside the weights", llama / "model.safetensors")
    refused("there is no backend 'numpi'", backend="numpi")
    refused("dtype is 'int8'; allowed are", dtype="int8")
    refused("dtype is 'bfloat16', in which numpy does not compute; use float32", dtype="bfloat16")
    refused("NumPy has 'cpu' alone", device="cuda")
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, llama / "model.safetensors")
    refused("has no tensor model.norm.weight; nearest:")
    save_file(tensors | {"model.norm.weight": torch.ones(8, dtype=torch.int32)}, llama / "model.safetensors")
    refused("a tensor of dtype I32 is not a floating weight")


@pytest.mark.parametrize(
    ("ids", "more", "words"),
    [
        ([[3, VOCABULARY]], {}, f"input_ids hold {VOCABULARY}; the model has rows 0 to {VOCABULARY - 1}"),
        ([[-1, 2]], {}, "input_ids hold -1;"),
        ([[1.5, 2.0]], {}, "input_ids are float64; they must be whole numbers"),
        ([1, 2], {}, "input_ids have the shape (2,); they must be (batch, length)"),
        ([[]], {}, "input_ids have the shape (1, 0)"),
        ([[1, 2], [3]], {}, "the lists of input_ids differ in length; pad them to one length"),
        ([[1] * 25], {}, "the sequence has 25 tokens; this model takes 24"),
        ([[1, 2]], {"attention_mask": [[1]]}, "attention_mask is (1, 1); it must be (1, 2)"),
        ([[1, 2]], {"attention_mask": [[1, 2]]}, "attention_mask holds other numbers than 0 and 1"),
    ],
)
def test_inputs_that_are_refused(oracle, ids, more, words):
    with saved(oracle) as folder:
        model = models.load(folder)
    with pytest.raises(PeftError) as caught:
        model(model.weights, ids, **more)
    assert words in str(caught.value)


def test_other_inputs_that_are_refused():
    bert = models.create(
        {"model_type": "bert", "vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    )
    llama = models.create(
        {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    )
    head, norm = "lm_head.weight", "model.norm.weight"

    def refused(words, call):
        with pytest.raises(PeftError) as caught:
            call()
        assert words in str(caught.value)

    refused("no classifier.weight; add what model.new_classifier", lambda: bert(bert.weights, [[1]]))
    refused(
        "token_type_ids hold 2; the model has rows 0 to 1",
        lambda: bert.embed(bert.weights, [[1]], token_type_ids=[[2]]),
    )
    refused("token_type_ids are (1, 2)", lambda: bert.embed(bert.weights, [[1]], token_type_ids=[[1, 1]]))
    without = {name: w for name, w in bert.weights.items() if "pooler" not in name} | bert.new_classifier(2)
    refused("no bert.pooler.dense.weight", lambda: bert(without, [[1]]))
    refused("positions reach from 5 to 2048", lambda: llama(llama.weights, [[1, 2]], positions=[[5, 2048]]))
    refused(
        "positions are int64 (1, 3); give whole numbers (1, 2)",
        lambda: llama(llama.weights, [[1, 2]], positions=[[1, 2, 3]]),
    )
    for name in (head, norm, "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        rest = {other: w for other, w in llama.weights.items() if other != name}
        refused(f"the weights have no {name}", lambda rest=rest: llama(rest, [[1, 2]]))


def test_one_copy_of_the_weights():
    """Decoded arrays own their memory, and share none with one another or the file."""
    with saved(built(*LLAMA).to(torch.bfloat16)) as folder:
        model = models.load(folder)
    for values in model.weights.values():
        assert values.base is None
        assert values.dtype != ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_read_by_transformers(oracle, backend, dtype, tmp_path):
    with saved(oracle) as folder:
        model = models.load(folder, backend=backend)
    models.save(model, tmp_path / "out", dtype=dtype)
    theirs = type(oracle).from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor.to(getattr(torch, dtype))), name
    again = models.load(tmp_path / "out")
    assert again.config == model.config
    with pytest.raises(PeftError, match="holds weights already"):
        models.save(model, tmp_path / "out")


def test_a_head_of_its_own_is_saved_as_such(tmp_path):
    oracle = built(LLAMA[0], LLAMA[1] | {"tie_word_embeddings": True})
    with saved(oracle) as folder:
        model = models.load(folder)
    adapted = pa.get_peft_model(model, pa.LoraConfig(r=2, target_modules=["embed_tokens"]), seed=1)
    adapted.params = {name: values + 0.5 for name, values in adapted.params.items()}
    with pytest.raises(PeftError, match="save what merge_and_unload gives"):
        models.save(replace(model, weights=adapted.weights), tmp_path)
    models.save(adapted.merge_and_unload(), tmp_path)
    theirs = type(oracle).from_pretrained(tmp_path).eval()
    assert_close(adapted(IDS), answer(theirs, IDS, None).logits, 1e-5)
