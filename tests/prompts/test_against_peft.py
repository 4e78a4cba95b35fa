"""Prompts are PEFT's: tables, formulas, files and the logits of models, for every method, on drawn configurations."""

from __future__ import annotations

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from drawn import CONFIGS, FAMILIES, SETTINGS, Case, case, fields_of, logits, saved_by_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, batches, built
from safetensors.numpy import load_file

from peftarray import models
from peftarray.formats.prompts import load_prompt, save_prompt
from peftarray.model.prompted import PromptModel
from peftarray.prompts import PROMPTS, Host, PromptTuningConfig

SHARE = 1e-5
KINDS = pytest.mark.parametrize("kind", SETTINGS)
FEW = settings(max_examples=8)
PAIRS = [
    (kind, family)
    for kind in SETTINGS
    for family in FAMILIES
    if not (family.startswith("Bert") and kind in ("CPT", "ADAPTION_PROMPT"))
]
# PEFT warns of its own ways, such as the order of what a mask of padding and a prefix means.
pytestmark = pytest.mark.filterwarnings("ignore")


def drawn_case(data: st.DataObject, kind: str, family: str):
    model = data.draw(FAMILIES[family])
    if kind == "ADAPTION_PROMPT" and "head_dim" in model:
        model["head_dim"] = 4  # PEFT fails where the heads together are not as wide as the model
    return case(kind, family, model, data.draw(SETTINGS[kind]))


def task_of(found: Case, count: int) -> list[int] | None:
    tasks = getattr(found.config, "num_tasks", None)
    return None if tasks is None else [(tasks - 1 + i) % tasks for i in range(count)]


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_logits(kind, family):
    @FEW
    @given(data=st.data(), batch=batches(8))
    def agree(data, batch):
        with drawn_case(data, kind, family) as found:
            tasks = task_of(found, len(batch.ids))
            wanted = logits(found.oracle, batch.ids, batch.mask, tasks)
            base = models.load(found.folder)
            own = PromptModel(base, found.config, found.params, task_ids=tasks)
            where = batch.mask if wanted.ndim == 3 else None
            assert_close(own(batch.ids, batch.mask), wanted, SHARE, where)
            with saved_by_peft(found.oracle) as folder:
                loaded = PromptModel.from_pretrained(base, folder)
            if family.startswith("Bert"):
                assert {"classifier.weight", "classifier.bias"} == set(loaded.whole)
            assert_close(loaded.for_tasks(tasks)(batch.ids, batch.mask), wanted, SHARE, where)

    agree()


@KINDS
def test_what_is_saved_is_what_peft_saves(kind, tmp_path):
    @FEW
    @given(data=st.data())
    def agree(data):
        family = data.draw(st.sampled_from(["LlamaForCausalLM", "GPT2LMHeadModel"]))
        with drawn_case(data, kind, family) as found, saved_by_peft(found.oracle) as folder:
            save_prompt(tmp_path, found.config, found.params)
            theirs, ours = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path))
            assert theirs.keys() == ours.keys()
            for name, values in theirs.items():
                assert ours[name].dtype == values.dtype
                np.testing.assert_allclose(ours[name], values, rtol=1e-5, atol=1e-6)
            said = json.loads((tmp_path / "adapter_config.json").read_text())
            wanted = json.loads((folder / "adapter_config.json").read_text())
            assert {name: said.get(name) for name in wanted} == wanted
            # Without an encoder the numbers pass unchanged, there and back.
            again = load_prompt(folder, host=host_of(found))
            for name, array in again.params.items():
                assert array.tobytes() == theirs[disk_name(found, name)].tobytes()

    agree()


def host_of(found: Case):
    base = models.load(found.folder)
    return Host.read(vars(base.config), base.weights)


def disk_name(found: Case, name: str) -> str:
    return found.config.stored()[name].disk or name


@KINDS
def test_peft_reads_what_is_written(kind, tmp_path):
    @settings(max_examples=4)
    @given(data=st.data(), batch=batches(6))
    def agree(data, batch):
        model = data.draw(FAMILIES["GPT2LMHeadModel"])
        with case(kind, "GPT2LMHeadModel", model, data.draw(SETTINGS[kind])) as found:
            save_prompt(tmp_path, found.config, found.params)
            again = peft.PeftModel.from_pretrained(built("GPT2LMHeadModel", model), tmp_path).eval()
            tasks = task_of(found, len(batch.ids))
            wanted = logits(found.oracle, batch.ids, batch.mask, tasks)
            assert_close(logits(again, batch.ids, batch.mask, tasks), wanted, SHARE, batch.mask)

    agree()


@KINDS
def test_fields_and_defaults(kind):
    needed = {"task_type": "CAUSAL_LM"} if kind == "CPT" else {}
    theirs, ours = fields_of(CONFIGS[kind](**needed)), fields_of(PROMPTS[kind](**needed))
    for name in theirs.keys() - {"peft_type", "peft_version"}:
        if name != "num_transformer_submodules":  # CPT sets it; here it follows
            assert ours[name] == theirs[name], name


@KINDS
def test_tables_are_those_of_the_layers(kind):
    """Every array that trains has its row, with its shape."""

    @settings(max_examples=6)
    @given(data=st.data())
    def agree(data):
        with drawn_case(data, kind, "GPT2LMHeadModel") as found:
            table = found.config.params()
            assert {name: row.shape for name, row in table.items()} == {n: a.shape for n, a in found.params.items()}
            assert found.config.num_parameters() == sum(p.numel() for p in found.oracle.parameters() if p.requires_grad)

    agree()


def test_a_prefix_of_two_submodules_is_read_as_peft_reads_it():
    import transformers

    for layers in (2, 3):
        config = transformers.T5Config(
            vocab_size=37, d_model=16, d_kv=8, d_ff=20, num_layers=layers, num_heads=2, decoder_start_token_id=0
        )
        base = transformers.T5ForConditionalGeneration(config)
        oracle = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
        sized = fields_of(oracle.peft_config["default"])
        own = PROMPTS["PREFIX_TUNING"](**{name: n for name, n in sized.items() if name not in ("peft_type",)})
        rows = oracle.prompt_encoder["default"].embedding.weight.detach().numpy()
        cache = oracle.get_prompt(1).self_attention_cache
        for layer, (keys, values) in enumerate(own.key_values({"prompt_embeddings": rows})):
            assert torch.equal(torch.asarray(keys), cache.layers[layer].keys[0])
            assert torch.equal(torch.asarray(values), cache.layers[layer].values[0])


def test_a_text_starts_a_prompt_from_its_words():
    """Repeated or cut to the number of tokens, as PEFT does with what a tokenizer gives."""
    table = np.arange(40, dtype=np.float16).reshape(10, 4)
    for ids, wanted in (([7], [7] * 5), ([1, 2, 3], [1, 2, 3, 1, 2]), (list(range(9)), [0, 1, 2, 3, 4])):
        config = PromptTuningConfig(
            num_virtual_tokens=5,
            token_dim=4,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="words",
            tokenizer_name_or_path="a",
        )
        made = config.init_params(table, embedding=table, token_ids=ids)["prompt_embeddings"]
        assert made.dtype == np.float32
        assert (made == table[wanted]).all()


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_prompt_starts_from_a_trained_one(start, tmp_path):
    with case("MULTITASK_PROMPT_TUNING", "GPT2LMHeadModel", GPT2_MODEL, {"num_virtual_tokens": 3, "num_tasks": 3}) as s:
        save_prompt(tmp_path, s.config, s.params)
        more = {"prompt_tuning_init": start, "prompt_tuning_init_task": 2, "num_virtual_tokens": 3}
        more |= {"prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors")}
        with warnings.catch_warnings():
            oracle = peft.get_peft_model(
                built("GPT2LMHeadModel", GPT2_MODEL), peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", **more)
            )
        base = models.load(s.folder)
        own = PromptModel.create(base, PROMPTS["MULTITASK_PROMPT_TUNING"](**more))
        encoder = oracle.prompt_encoder["default"]
        assert (own.arrays["prompt_embeddings"] == encoder.embedding.weight.detach().numpy()).all()
        if start != "ONLY_SOURCE_SHARED":
            for name in ("prefix_task_cols", "prefix_task_rows"):
                np.testing.assert_allclose(own.arrays[name], getattr(encoder, name).detach().numpy(), rtol=1e-6)


GPT2_MODEL = {"n_embd": 12, "n_head": 2, "n_layer": 2}
