"""What a prompt is not: merged, trained on without its encoder, or passed over by a model that does not read it."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import SETTINGS

from peftarray import models
from peftarray.cli.render import inspection_text
from peftarray.errors import ConfigError, MatchError, PeftError, ShapeError, UnsupportedError
from peftarray.formats.peft_config import read_config
from peftarray.formats.prompts import save_prompt
from peftarray.inspection import inspect
from peftarray.model.prompted import PromptModel
from peftarray.prompts import PROMPTS, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2}
FEW = {
    "CPT": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2]},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_is_inspected_and_not_merged(kind, tmp_path):
    model = PromptModel.create(models.create(GPT2), PROMPTS[kind](**FEW.get(kind, {"num_virtual_tokens": 3})))
    model.save_pretrained(tmp_path)
    words = inspection_text(inspect(tmp_path))
    assert f"{kind} (a soft prompt" in words
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        read_config(tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize("config", [PromptEncoderConfig(num_virtual_tokens=2), PROMPTS["CPT"](**FEW["CPT"])])
def test_what_an_encoder_made_is_not_trained_further(config, tmp_path):
    base = models.create(GPT2)
    PromptModel.create(base, config).save_pretrained(tmp_path)
    assert PromptModel.from_pretrained(base, tmp_path).params == {}
    with pytest.raises(UnsupportedError, match="training cannot go on"):
        PromptModel.from_pretrained(base, tmp_path, is_trainable=True)


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ConfigError, lambda: PromptTuningConfig(num_virtual_tokens=0)),
        (ConfigError, lambda: PromptTuningConfig(prompt_tuning_init="TEXT")),
        (ConfigError, lambda: PromptTuningConfig(tokenizer_kwargs={"use_fast": True})),
        (ConfigError, lambda: PROMPTS["CPT"](cpt_token_ids=[1])),
        (ConfigError, lambda: PROMPTS["CPT"](task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1])),
        (ConfigError, lambda: PromptTuningConfig(num_virtual_tokens=2).params()),
        (ConfigError, lambda: PromptModel.create({"w": np.ones((2, 2))}, PromptTuningConfig(num_virtual_tokens=2))),
        (ConfigError, lambda: on_gpt2(PromptEncoderConfig(num_virtual_tokens=2, encoder_dropout=0.1))),
        (ConfigError, lambda: on_gpt2(PromptTuningConfig(num_virtual_tokens=2), token_ids=[1])),
        (ConfigError, lambda: on_gpt2(PromptTuningConfig(num_virtual_tokens=2)).for_tasks([0])([[1]])),
        (ConfigError, lambda: on_gpt2(PROMPTS["MULTITASK_PROMPT_TUNING"](num_virtual_tokens=2))([[1]])),
        (UnsupportedError, lambda: on_gpt2(PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"))),
        (ShapeError, lambda: on_gpt2(PromptTuningConfig(num_virtual_tokens=2, token_dim=4))([[1]])),
        (ShapeError, lambda: on_gpt2(PrefixTuningConfig(num_virtual_tokens=2, num_layers=1))([[1]])),
        (MatchError, lambda: on_gpt2(PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["nothing"]))),
    ],
)
def test_refused(error, make):
    with pytest.raises(error) as found:
        make()
    assert isinstance(found.value, PeftError)
    assert "\n" not in str(found.value)


def on_gpt2(config, **more):
    return PromptModel.create(models.create(GPT2), config, **more)


def test_a_file_of_another_shape_is_refused(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, token_dim=3)
    with pytest.raises(ShapeError, match="token=2, dim=3"):
        save_prompt(tmp_path, config, {"prompt_embeddings": np.ones((3, 3), np.float32)})
