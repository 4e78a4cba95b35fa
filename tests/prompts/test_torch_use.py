"""A torch model with a soft prompt is a module like others: trained, copied, moved; and as it was when a call fails."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import built
from test_torch_modules import EXAMPLES, IDS, LLAMA, MODELS, RIGHT, SETTINGS, own_config, randomised, t5, tasks

import peftarray as pa
from peftarray.errors import ConfigError, MatchError, PeftError, ShapeError, UnsupportedError
from peftarray.prompts import PROMPTS

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = pytest.mark.parametrize("kind", SETTINGS)


def llama():
    return built("LlamaForCausalLM", MODELS["LlamaForCausalLM"])


@KINDS
def test_it_trains(kind):
    model = pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM")).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, attention_mask=RIGHT, labels=IDS, **tasks(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name])


@KINDS
def test_it_is_copied_moved_frozen_and_taken_off(kind, capsys):
    base = llama()
    names = base.state_dict().keys()
    wanted = base(IDS).logits
    model = randomised(pa.get_peft_model(base, own_config(kind, "CAUSAL_LM")))
    found = model(IDS, **tasks(kind)).logits
    assert (found - wanted).abs().max() > 1e-3
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(IDS, **tasks(kind)).logits, found)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(IDS, **tasks(kind)).logits, found)
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double(IDS, **tasks(kind)).logits.float(), found, atol=1e-4, rtol=1e-4)
    trained, total = model.get_nb_trainable_parameters()
    assert model.freeze().get_nb_trainable_parameters() == (0, total)
    assert model.unfreeze().get_nb_trainable_parameters() == (trained, total)
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,d} ||" in capsys.readouterr().out
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_and_unload()
    assert model.unload() is base
    assert base.state_dict().keys() == names
    torch.testing.assert_close(base(IDS).logits, wanted)


@KINDS
def test_beside_a_model_in_bfloat16_it_is_float32(kind):
    model = randomised(pa.get_peft_model(llama().bfloat16(), own_config(kind, "CAUSAL_LM")))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model(IDS, labels=IDS, **tasks(kind))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    wanted = copy.deepcopy(model).float()(IDS, **tasks(kind)).logits
    assert (output.logits.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"])
def test_the_trainer_of_transformers_trains_it(kind, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM"))
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS]
    options = {"num_train_epochs": 8, "learning_rate": 0.1, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(
        model, TrainingArguments(tmp_path, save_strategy="no", **options), train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING projected"])
def test_fit_trains_it(kind):
    model = pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM"))
    batches = [{"input_ids": IDS, "labels": IDS}]
    history = pa.fit(model, lambda m, batch: m(**batch).loss, batches, steps=5, optimizer=pa.AdamW(0.1), progress=False)
    assert history.losses[-1] < history.losses[0]


def test_a_trained_head_is_a_copy(tmp_path):
    base = built("BertForSequenceClassification", MODELS["BertForSequenceClassification"])
    head = base.classifier.weight.clone()
    model = randomised(pa.get_peft_model(base, own_config("PROMPT_TUNING", "SEQ_CLS"), adapter_name="poet"))
    assert "base_model.classifier.modules_to_save.poet.weight" in model.state_dict()
    assert not torch.equal(model.classifier.behind.weight, head)
    model.save_pretrained(tmp_path)
    again = pa.PeftModel.from_pretrained(
        built("BertForSequenceClassification", LLAMA | {"num_labels": 3}), tmp_path / "poet"
    )
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits)
    assert torch.equal(model.unload().classifier.weight, head)


def test_going_on_from_a_file(tmp_path):
    model = randomised(pa.get_peft_model(llama(), own_config("PROMPT_TUNING", "CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    again = pa.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    for kind in ("P_TUNING", "CPT", "PREFIX_TUNING projected"):
        pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM")).save_pretrained(tmp_path)
        base = llama()
        with pytest.raises(UnsupportedError, match="training cannot go on"):
            pa.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        assert all(parameter.requires_grad for parameter in base.parameters())


def test_it_starts_from_words():
    config = pa.PromptTuningConfig(
        num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="words", tokenizer_name_or_path="a"
    )
    base = llama()
    model = pa.get_peft_model(base, config, token_ids=[5, 7, 9])
    rows = base.get_input_embeddings().weight[[5, 7, 9, 5]]
    assert torch.equal(model.prompt_encoder.default.embedding.weight, rows)
    text = torch.cat([torch.tensor([[5, 7, 9, 5]]).expand(2, 4), IDS], dim=1)
    torch.testing.assert_close(model(IDS).logits, base(text).logits[:, 4:])
    with pytest.raises(ConfigError, match="leave them out"):
        pa.get_peft_model(llama(), pa.LoraConfig(target_modules=["q_proj"]), token_ids=[1])


def test_forward_tells_its_arguments():
    import inspect

    plain = inspect.signature(llama().forward).parameters
    for kind, more in (
        ("PROMPT_TUNING", set()),
        ("MULTITASK_PROMPT_TUNING", {"task_ids"}),
        ("CPT", {"input_type_mask"}),
    ):
        model = pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM"))
        assert set(inspect.signature(model.forward).parameters) == plain.keys() | more
    assert model(IDS, return_dict=False, labels=IDS)[0].ndim == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018


REFUSED = {
    "no model of transformers": (
        lambda: torch.nn.Linear(3, 3),
        pa.PromptTuningConfig(num_virtual_tokens=2),
        ConfigError,
        "a model of transformers",
    ),
    "rows of another width": (
        llama,
        pa.PromptTuningConfig(num_virtual_tokens=2, token_dim=4),
        ShapeError,
        "are 16 wide",
    ),
    "two submodules": (
        llama,
        pa.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"),
        UnsupportedError,
        "for an encoder with a decoder",
    ),
    "no such module": (
        llama,
        pa.PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["nothing"]),
        MatchError,
        "names 'nothing'",
    ),
    "no words": (llama, PROMPTS["CPT"](task_type="CAUSAL_LM", cpt_token_ids=[99]), ConfigError, "must be 0 to 36"),
    "an attention that is not known": (
        t5,
        PROMPTS["ADAPTION_PROMPT"](adapter_len=2, adapter_layers=1, target_modules="SelfAttention"),
        UnsupportedError,
        "LLaMA-Adapter goes on the attention of",
    ),
    "no keys from before": (
        lambda: built("DistilBertModel", {"dim": 12, "n_heads": 2, "n_layers": 1, "hidden_dim": 10}),
        pa.PrefixTuningConfig(num_virtual_tokens=2, token_dim=12, num_layers=1),
        UnsupportedError,
        "takes no past_key_values",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_failed_call_leaves_the_model_as_it_was(case):
    make, config, error, words = REFUSED[case]
    model = make()
    before = {name: array.clone() for name, array in model.state_dict().items()}
    with pytest.raises(error, match=words) as found:
        pa.get_peft_model(model, config)
    assert isinstance(found.value, PeftError)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], array) for name, array in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_prompt_is_refused():
    for kind in ("PROMPT_TUNING", "ADAPTION_PROMPT"):
        model = pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM"))
        with pytest.raises(ConfigError, match="already"):
            pa.get_peft_model(model, own_config("PROMPT_TUNING", "CAUSAL_LM"))


CALLS = {
    "no tasks": ("MULTITASK_PROMPT_TUNING", {}, ConfigError, "give task_ids"),
    "other tasks": ("MULTITASK_PROMPT_TUNING", {"task_ids": torch.tensor([0, 1, 2])}, ShapeError, "for 3 texts"),
    "tasks of one prompt": ("PREFIX_TUNING", {"task_ids": torch.tensor([0, 1])}, ConfigError, "leave task_ids out"),
    "types of another prompt": ("PROMPT_TUNING", {"input_type_mask": IDS}, ConfigError, "leave it out"),
    "a mask of scores": ("PROMPT_TUNING", {"attention_mask": torch.ones(2, 1, 6, 6)}, ShapeError, "attention_mask"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_mean_nothing_are_refused(case):
    kind, given, error, words = CALLS[case]
    model = pa.get_peft_model(llama(), own_config(kind, "CAUSAL_LM"))
    with pytest.raises(error, match=words):
        model(IDS, **given)


def test_a_prefix_that_would_not_be_read_is_refused():
    model = pa.get_peft_model(llama(), own_config("PREFIX_TUNING", "CAUSAL_LM")).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient checkpointing"):
        model(IDS)
    with pytest.raises(UnsupportedError, match="DynamicCache"):
        model.eval().generate(IDS, max_new_tokens=2, cache_implementation="static")
    model(IDS)  # the model itself is as it was
    rows = pa.get_peft_model(llama(), own_config("PROMPT_TUNING", "CAUSAL_LM")).train()
    wanted = rows(IDS, labels=IDS).loss
    rows.gradient_checkpointing_enable()
    torch.testing.assert_close(rows(IDS, labels=IDS).loss, wanted)


def test_cpt_learns_from_labels_whatever_its_types(tmp_path):
    """Where PEFT numbers the text's words on from no whole example, it has no labels and a loss that is no number."""
    for settings in ({"cpt_token_ids": [1, 2, 3]}, EXAMPLES):
        model = pa.get_peft_model(llama(), PROMPTS["CPT"](task_type="CAUSAL_LM", **settings))
        types = torch.full_like(IDS, 4)
        loss = model(IDS, labels=IDS, input_type_mask=types).loss
        assert torch.isfinite(loss)
        assert (types == 4).all()  # PEFT writes into it
        torch.testing.assert_close(model(IDS, labels=IDS).loss, loss)
