"""An adapter and a base from different classes of one architecture: their names differ by a prefix, or a head."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    tensors_of,
)
from tiny_models import TINY, load_model

import peftarray as pa

# base on disk, class of the adapter's model, what that puts before a name, what it has that the base lacks
HEADS = [
    ("llama-bare", "llama", "model.", "lm_head."),
    ("gpt2-bare", "gpt2", "transformer.", "lm_head."),
    ("bert-bare", "bert", "bert.", "classifier."),
]
BARE = [("llama", "llama-bare", "model."), ("gpt2", "gpt2-bare", "transformer."), ("bert", "bert-bare", "bert.")]
LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}


def options(kind: str) -> list[dict[str, Any]]:
    layers = LAYERS[kind.partition("-")[0]]
    return [
        {"target_modules": layers, "use_dora": True},
        {"target_modules": layers, "bias": "lora_only", "rank_pattern": {rf".*1\..*{layers[0]}": 5}},
        {"target_modules": rf".*\.1\..*({'|'.join(layers)})"},
    ]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(("name", "kind", "prefix", "head"), HEADS)
def test_the_adapter_of_a_head_on_a_bare_base(bases, tmp_path, name, kind, prefix, head, which):
    base = bases(name)
    with quiet():
        model = load_model(TINY[kind].model_class, base.folder)
    live = adapt(base, peft.LoraConfig(r=3, **options(kind)[which]), tmp_path / "adapter", model)
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    reference = merged_by_peft(live, tmp_path / "reference")
    kept = {key: tensor for key, tensor in reference.items() if not key.startswith(head)}
    assert_same_weights(report, base.folder, tmp_path / "out", kept, rename=lambda key: key.removeprefix(prefix))
    assert_config(base.folder, tmp_path / "out")


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(("name", "kind", "prefix"), BARE)
def test_the_adapter_of_a_bare_model_on_a_base_with_a_head(bases, tmp_path, name, kind, prefix, which):
    """The merged file keeps the base's names and its head, so either class loads it."""
    base = bases(name)
    with quiet():
        model = load_model(TINY[kind].model_class, base.folder)
    live = adapt(base, peft.LoraConfig(r=3, **options(kind)[which]), tmp_path / "adapter", model)
    wanted = live_outputs(live, base)
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    before = tensors_of(base.folder)
    reference = {prefix + key: tensor for key, tensor in merged_by_peft(live, tmp_path / "reference").items()}
    reference |= {key: tensor for key, tensor in before.items() if key not in reference}
    assert_same_weights(report, base.folder, tmp_path / "out", reference)
    assert_same_outputs(loaded_outputs(base, tmp_path / "out", TINY[kind].model_class), wanted)


CLASSIFIERS = [
    ("llama", "LlamaForSequenceClassification", "SEQ_CLS", "score"),
    ("llama-tied", "LlamaForSequenceClassification", "SEQ_CLS", "score"),
    ("llama-bare", "LlamaForSequenceClassification", "SEQ_CLS", "score"),
    ("llama", "LlamaForTokenClassification", "TOKEN_CLS", "score"),
    ("llama-labels", "LlamaForSequenceClassification", "SEQ_CLS", "score"),
    ("bert-bare", "BertForSequenceClassification", "SEQ_CLS", "classifier"),
    ("bert-masked", "BertForTokenClassification", "TOKEN_CLS", "classifier"),
    ("vit", "ViTForImageClassification", None, "classifier"),
]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("labels", [3, 4])
@pytest.mark.parametrize(("name", "head", "task", "module"), CLASSIFIERS)
def test_a_new_classifier_comes_with_the_adapter(bases, tmp_path, name, head, task, module, labels, bias):
    base = bases(name)
    model_class = getattr(transformers, head)
    with quiet():
        torch.manual_seed(5)
        model = load_model(model_class, base.folder, num_labels=labels, ignore_mismatched_sizes=True)
    config = peft.LoraConfig(
        r=2,
        task_type=task,
        target_modules=["q_proj", "query"],
        bias=bias,
        modules_to_save=None if task else [module],
    )
    live = adapt(base, config, tmp_path / "adapter", copy.deepcopy(model))
    wanted = live_outputs(live, base)

    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")

    merged = tensors_of(tmp_path / "out")
    assert len(merged[f"{module}.weight"]) == labels
    loaded = loaded_outputs(base, tmp_path / "out", model_class, num_labels=labels)
    assert_same_outputs(loaded, wanted)
    before = tensors_of(base.folder)
    assert merged.keys() - before.keys() <= {f"{module}.weight", f"{module}.bias"}


def test_a_head_that_was_never_saved_is_refused(bases, tmp_path):
    """LoRA on a head that the base lacks, and that was random: its weight is nowhere."""
    base = bases("bert-bare")
    with quiet():
        model = load_model(TINY["bert"].model_class, base.folder)
    adapt(base, peft.LoraConfig(r=2, target_modules=["query", "classifier"]), tmp_path / "adapter", model)
    with pytest.raises(pa.MatchError, match=r"2 of 6 adapter tensors have no place.*classifier"):
        pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
