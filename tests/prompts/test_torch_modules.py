"""Soft prompts on torch's models of transformers against PEFT's: outputs, gradients, names, files, what is written."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from drawn import CONFIGS
from oracles import built
from safetensors.torch import load_file

import peftarray as pa
from peftarray.prompts import PROMPTS

# PEFT warns of its own ways, and generation of what it is not given.
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "LlamaForCausalLM": LLAMA | {"num_key_value_heads": 2},
    "GPT2LMHeadModel": {"n_embd": 12, "n_head": 3, "n_layer": 2},
    "BertForSequenceClassification": LLAMA | {"num_labels": 3},
}
EXAMPLES = {
    "cpt_token_ids": [1, 2, 3, 4, 7, 8, 9, 9],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.7,
}
SETTINGS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 5},
    "P_TUNING LSTM": {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING projected": {"num_virtual_tokens": 3, "prefix_projection": True},
    "CPT": EXAMPLES,
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
}
PAIRS = [
    (kind, family)
    for family in MODELS
    for kind in SETTINGS
    if not (family.startswith("Bert") and kind in ("CPT", "ADAPTION_PROMPT"))
]
IDS = torch.tensor([[3, 4, 5, 6, 7, 2], [8, 9, 5, 4, 2, 3]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[4, 5, 6, 1], [7, 8, 1, -100]])
WRITTEN = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def own_config(kind, task, **more):
    return PROMPTS[kind.split()[0]](task_type=task, **SETTINGS[kind], **more)


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += (0.03 if "delta" in name else 0.3) * torch.randn_like(parameter)
    return model.eval()


def state_of(oracle):
    """PEFT's, without the embedding's second name."""
    return {name: array for name, array in oracle.state_dict().items() if name != "word_embeddings.weight"}


def both(kind, make, task):
    """PEFT's model with numbers of its own, and ours with the same."""
    oracle = peft.get_peft_model(make(), CONFIGS[kind.split()[0]](task_type=task, **SETTINGS[kind]))
    ours = pa.get_peft_model(make(), own_config(kind, task))
    assert state_of(oracle).keys() == ours.state_dict().keys()
    assert oracle.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    ours.load_state_dict(state_of(randomised(oracle)))
    return oracle, ours.eval()


def tasks(kind):
    return {"task_ids": torch.tensor([2, 0])} if kind.startswith("MULTITASK") else {}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_alike(oracle, ours, given, length):
    """The same loss, logits of the text and gradients."""
    theirs, mine = oracle(**given), ours(**given)
    wanted = theirs.logits if theirs.logits.ndim == 2 else theirs.logits[:, -length:]
    torch.testing.assert_close(mine.logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    for loss in (theirs.loss, mine.loss):
        loss.backward()
    wanted, found = gradients(oracle), gradients(ours)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_it_is_what_peft_makes(kind, family, tmp_path):
    is_bert = family.startswith("Bert")

    def make():
        return built(family, MODELS[family])

    oracle, ours = both(kind, make, "SEQ_CLS" if is_bert else "CAUSAL_LM")
    given = {"input_ids": IDS, "attention_mask": RIGHT, "labels": torch.tensor([0, 2]) if is_bert else IDS}
    assert_alike(oracle, ours, given | tasks(kind), IDS.shape[1])

    # Files, in both directions.
    ours.save_pretrained(tmp_path / "ours")
    oracle.save_pretrained(tmp_path / "theirs")
    there, here = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert there.keys() == here.keys()
    said, wanted = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    usual = ("auto_mapping", "base_model_name_or_path", "modules_to_save", "peft_version", "revision")
    assert {n: said.get(n) for n in wanted if n not in usual} == {n: wanted[n] for n in wanted if n not in usual}
    again = pa.PeftModel.from_pretrained(make(), tmp_path / "theirs").eval()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    del given["labels"]
    logits = ours(**given, **tasks(kind)).logits
    torch.testing.assert_close(again(**given, **tasks(kind)).logits, logits, atol=1e-5, rtol=1e-5)
    others = theirs(**given, **tasks(kind)).logits
    torch.testing.assert_close(others if is_bert else others[:, -6:], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "family"), [pair for pair in PAIRS if not pair[1].startswith("Bert")])
def test_it_writes_what_peft_writes(kind, family):
    oracle, ours = both(kind, lambda: built(family, MODELS[family]), "CAUSAL_LM")
    given = {"attention_mask": torch.ones_like(IDS)} | tasks(kind) | WRITTEN
    wanted = oracle.generate(input_ids=IDS, **given)
    assert torch.equal(ours.generate(IDS, **given), wanted)
    assert torch.equal(ours.generate(input_ids=IDS, use_cache=False, **given), wanted)
    if family.startswith("Llama"):
        assert torch.equal(
            ours.generate(IDS, num_beams=2, **given), oracle.generate(input_ids=IDS, num_beams=2, **given)
        )


@pytest.mark.parametrize("kind", SETTINGS)
def test_padding_before_a_text_changes_nothing_that_is_written(kind):
    ours = randomised(
        pa.get_peft_model(built("LlamaForCausalLM", MODELS["LlamaForCausalLM"]), own_config(kind, "CAUSAL_LM"))
    )
    task = {"task_ids": torch.tensor([1, 1])} if kind.startswith("MULTITASK") else {}
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    written = ours.generate(IDS, attention_mask=mask, **task, **WRITTEN)
    alone = ours.generate(IDS[1:, 2:], **{name: t[:1] for name, t in task.items()}, **WRITTEN)
    assert torch.equal(written[1, 2:], alone[0])


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"])
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_text_goes_on_from_the_cache(kind, family):
    ours = randomised(pa.get_peft_model(built(family, MODELS[family]), own_config(kind, "CAUSAL_LM")))
    first = ours(IDS[:, :4], attention_mask=RIGHT[:, :4], use_cache=True)
    rest = ours(IDS[:, 4:], attention_mask=RIGHT, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, ours(IDS, attention_mask=RIGHT).logits[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_positions_are_those_in_the_text(kind):
    ours = randomised(
        pa.get_peft_model(built("GPT2LMHeadModel", MODELS["GPT2LMHeadModel"]), own_config(kind, "CAUSAL_LM"))
    )
    places = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(ours(IDS, position_ids=places).logits, ours(IDS).logits)
    rows = ours.get_input_embeddings()(IDS)
    torch.testing.assert_close(ours(inputs_embeds=rows).logits, ours(IDS).logits)


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=37, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    )
    return wide_spread(model)


def bart():
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    config = transformers.BartConfig(
        vocab_size=37,
        d_model=16,
        max_position_embeddings=32,
        decoder_start_token_id=2,
        pad_token_id=0,
        forced_eos_token_id=None,
        **sizes,
    )
    return wide_spread(transformers.BartForConditionalGeneration(config))


_BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 20}


def wide_spread(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind not in ("CPT", "ADAPTION_PROMPT", "P_TUNING LSTM")])
def test_an_encoder_with_a_decoder(kind, make):
    oracle, ours = both(kind, make, "SEQ_2_SEQ_LM")
    assert_alike(oracle, ours, {"input_ids": IDS, "attention_mask": RIGHT, "labels": LABELS} | tasks(kind), 4)
    given = {"attention_mask": RIGHT, "max_new_tokens": 5, "do_sample": False} | tasks(kind)
    written = ours.generate(IDS, **given)
    assert torch.equal(ours.generate(input_ids=IDS, use_cache=False, **given), written)
    if not kind.startswith("MULTITASK"):  # there PEFT leaves out the decoder's rows, which it trained
        assert torch.equal(oracle.generate(input_ids=IDS, **given), written)
    again = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": written[:, :-1]} | tasks(kind)
    assert torch.equal(ours(**again).logits.argmax(-1), written[:, 1:])


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_features_and_tokens(kind):
    """What PEFT has right of them: features, and classes of tokens without labels."""
    for name, task, of in (
        ("BertModel", "FEATURE_EXTRACTION", "last_hidden_state"),
        ("BertForTokenClassification", "TOKEN_CLS", "logits"),
    ):
        if kind.startswith("MULTITASK") and task == "FEATURE_EXTRACTION":
            continue  # PEFT passes no tasks on
        oracle, ours = both(kind, lambda name=name: built(name, LLAMA), task)
        given = {"input_ids": IDS, "attention_mask": RIGHT} | tasks(kind)
        wanted = getattr(oracle(**given), of)[:, -6:]
        torch.testing.assert_close(getattr(ours(**given), of), wanted, atol=1e-5, rtol=1e-5)
    ours(**given, labels=IDS % 2).loss.backward()
    assert all(gradient is not None for gradient in gradients(ours).values())


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_answers_to_questions_lie_in_the_text(kind):
    oracle, ours = both(kind, lambda: built("BertForQuestionAnswering", LLAMA), "QUESTION_ANS")
    given = {"input_ids": IDS, "attention_mask": RIGHT}
    start, end = torch.tensor([1, 2]), torch.tensor([3, 2])
    theirs, mine = oracle(**given), ours(**given, start_positions=start, end_positions=end)
    ends = (theirs.start_logits, theirs.end_logits)
    behind = 3 if kind == "PROMPT_TUNING" else 0  # PEFT counts them from the first virtual token on
    wanted = sum(torch.nn.functional.cross_entropy(s, p + behind) for s, p in zip(ends, (start, end), strict=True)) / 2
    torch.testing.assert_close(mine.loss, wanted)
    torch.testing.assert_close(mine.end_logits, ends[1][:, -6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("family", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_a_decoder_classifies_at_the_end_of_each_text(kind, family):
    settings = MODELS["LlamaForCausalLM" if family.startswith("Llama") else "GPT2LMHeadModel"] | {"num_labels": 3}
    oracle, ours = both(kind, lambda: built(family, settings), "SEQ_CLS")
    padded = torch.where(RIGHT > 0, IDS, 0)
    whole = ours(padded, attention_mask=RIGHT, labels=torch.tensor([0, 2]))
    for text, length in enumerate((6, 4)):
        alone = oracle(input_ids=IDS[text : text + 1, :length], attention_mask=torch.ones(1, length)).logits[0]
        torch.testing.assert_close(whole.logits[text], alone, atol=1e-5, rtol=1e-5)
    wanted = torch.nn.functional.cross_entropy(whole.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(whole.loss, wanted)


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_the_attention_is_that_of_the_reference_models(family, tmp_path):
    """With biases, and heads that together are wider than the model, where PEFT's LLaMA-Adapter is wrong or fails."""
    settings = MODELS["LlamaForCausalLM"] | ({"attention_bias": True} if family.startswith("Llama") else {})
    module = built(family, settings | ({} if family.startswith("Qwen2") else {"head_dim": 6}))
    module.save_pretrained(tmp_path / "base")
    ours = randomised(pa.get_peft_model(module, own_config("ADAPTION_PROMPT", None, target_modules="self_attn")))
    ours.save_pretrained(tmp_path / "prompt")
    reference = pa.PeftModel.from_pretrained(pa.models.load(tmp_path / "base"), tmp_path / "prompt")
    found = ours(IDS, attention_mask=RIGHT).logits.detach().numpy()
    wanted = reference(IDS.numpy(), RIGHT.numpy())
    where = RIGHT.numpy().astype(bool)
    np.testing.assert_allclose(found[where], wanted[where], atol=2e-5)
