"""A training by `fit` against PEFT's model under torch's optimiser and transformers' schedule: the same losses."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from peftarray import LoraConfig
from peftarray.model import PeftModel
from peftarray.training import AdamW, cosine, fit

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

STEPS = 8


def language_model():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def loss(model, batch):
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "lora_only"}], ids=str)
def test_losses_are_those_of_peft(fields, tmp_path):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields}
    base = language_model()
    live = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    live.save_pretrained(tmp_path / "start")
    mine = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    assert mine.peft_config["default"].r == LoraConfig(**settings).r
    draw = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 64, (4, 16), generator=draw)} for _ in range(STEPS)]

    params = [p for p in live.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-2)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    expected = []
    for batch in batches:
        value = loss(live, batch)
        expected.append(float(value.detach()))
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    history = fit(mine, loss, batches, optimizer=AdamW(2e-2), schedule=cosine(warmup=2), clip_norm=1.0, progress=False)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    np.testing.assert_allclose(history.losses, expected, rtol=1e-4)

    mine.save_pretrained(tmp_path / "trained")
    back = peft.PeftModel.from_pretrained(language_model(), tmp_path / "trained").eval()
    with torch.no_grad():
        assert float(loss(back, batches[0])) == pytest.approx(float(loss(live.eval(), batches[0])), rel=1e-4)
