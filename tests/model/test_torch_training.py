"""transformers' models with an adapter: its Trainer, checkpointing, generation, and GPT-2's transposed layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

import peftarray as pa
from peftarray import LoraConfig
from peftarray.model import PeftModel, get_peft_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from .torch_net import randomise  # noqa: E402

IDS = torch.arange(1, 15).reshape(2, 7)
CONFIG = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def loss_of(model: Any) -> Any:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["new", "reentrant"])
def test_gradients_with_checkpointing_are_those_without(kwargs):
    plain = randomise(get_peft_model(llama(), CONFIG)).train()
    loss_of(plain).backward()
    checked = copy.deepcopy(plain)
    checked.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if kwargs["use_reentrant"]:
            checked.enable_input_require_grads()
        loss_of(checked).backward()
    for (name, one), other in zip(plain.named_parameters(), checked.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_generation_is_that_of_the_merged_model():
    model = randomise(get_peft_model(llama(), LoraConfig(r=2, lora_alpha=64, target_modules="all-linear"))).eval()
    before = llama().eval().generate(IDS, max_new_tokens=8, do_sample=False)
    found = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert not torch.equal(found, before)
    assert torch.equal(found, model.merge_and_unload().generate(IDS, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("target", [["c_attn"], ["c_fc", "wte"]], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_transposed_layers_are_those_of_peft(target, dora, tmp_path):
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).eval()
    model = randomise(get_peft_model(copy.deepcopy(base), LoraConfig(r=2, use_dora=dora, target_modules=target))).eval()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, atol=1e-5, rtol=1e-4)
    wanted = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted, atol=1e-5, rtol=1e-4)


def test_a_classifier_is_trained_and_saved_whole(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    base = transformers.BertForSequenceClassification(config).eval()
    chosen = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = randomise(get_peft_model(copy.deepcopy(base), chosen)).eval()
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, atol=1e-6, rtol=1e-5)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert again.classifier.weight.requires_grad


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_trainer_trains_it(precision, tmp_path):
    """From a list of samples with a column that the model does not take, to a checkpoint and back."""
    pytest.importorskip("accelerate")
    model = get_peft_model(llama(), CONFIG)
    untouched = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    samples = [{"input_ids": row, "labels": row, "name": i} for i, row in enumerate(IDS.repeat(4, 1))]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        bf16=precision == "bfloat16",
        report_to=[],
        use_cpu=True,
        save_steps=3,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=options, train_dataset=samples)
    before = float(loss_of(model))
    trainer.train()
    assert float(loss_of(model)) < before - 0.01
    for name, parameter in model.named_parameters():
        assert name not in untouched or torch.equal(untouched[name], parameter)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    other = get_peft_model(llama(), CONFIG)
    resumed = transformers.Trainer(model=other, args=options, train_dataset=samples)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, again[name], msg=name)


def test_a_loss_of_the_library_trains_it():
    """The mapping of a torch module's weights, by peftarray's own loop."""
    net = llama()
    base = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)

    def loss(model: Any, batch: Any) -> Any:
        weights = model.weights
        x = weights["model.embed_tokens.weight"][batch]
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn"
            q, v = (x @ weights[f"{name}.{kind}_proj.weight"].T for kind in "qv")
            x = x + torch.tanh(torch.cat([v, v], -1) * q)
        return ((x @ weights["lm_head.weight"].T - 1) ** 2).mean()

    before = float(loss(model, IDS))
    pa.fit(model, loss, [IDS], steps=20, optimizer=pa.AdamW(0.05), progress=False)
    assert float(loss(model, IDS)) < 0.5 * before
