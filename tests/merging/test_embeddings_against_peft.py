"""Embeddings and heads, tied and untied, resized and not: the merged checkpoint computes what the live PEFT model does.

PEFT's own merge is no oracle here: it adds what is meant for one of two tied matrices to both. So transformers loads
the merged folder, and its outputs are compared with those of the model that was never merged.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import peft
import pytest
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    live_outputs,
    loaded_outputs,
    quiet,
    same_bits,
    store_in_half,
    tensors_of,
    train,
)
from tiny_models import VOCABULARY, outputs

import peftarray as pa

# base: its input embedding, its head, and a layer in between
NAMES = {
    "llama": ("embed_tokens", "lm_head", "q_proj"),
    "llama-tied": ("embed_tokens", "lm_head", "q_proj"),
    "gpt2": ("wte", "lm_head", "c_attn"),
    "bert-masked": ("word_embeddings", "decoder", "query"),
    "t5": ("shared", "lm_head", "q"),
}
TIED = [name for name in NAMES if name != "llama"]


@dataclass(frozen=True)
class Case:
    """What happens to the embedding and to the head of a base.

    Attributes:
        base: its name.
        embedding: `"none"`, `"lora"`, `"dora"`, `"saved"` whole, or `"tokens"`: some of its rows.
        head: `"none"`, `"lora"` or `"saved"`.
        ensure: `ensure_weight_tying`.
    """

    base: str
    embedding: str
    head: str
    ensure: bool

    def __str__(self) -> str:
        return f"{self.base}-{self.embedding}-{self.head}{'-ensure' if self.ensure else ''}"

    def settings(self) -> dict[str, Any]:
        embedding, head, layer = NAMES[self.base]
        targets, saved = [layer], []
        if self.embedding in ("lora", "dora"):
            targets.append(embedding)
        if self.head == "lora":
            targets.append(head)
        if self.embedding == "saved":
            saved.append(embedding)
        if self.head == "saved":
            saved.append(head)
        return {
            "r": 3,
            "target_modules": targets,
            "modules_to_save": saved or None,
            "use_dora": self.embedding == "dora",
            "ensure_weight_tying": self.ensure,
            "trainable_token_indices": [3, 41] if self.embedding == "tokens" else None,
        }

    def possible(self) -> bool:
        """Whether PEFT can make it, and its live model computes what it says."""
        tied = self.base in TIED
        if self.embedding == "tokens" and self.head != "none" and tied:
            # It refuses a whole head, or the promise to tie it; and the masked head loses its bias.
            return self.head == "lora" and not self.ensure and self.base != "bert-masked"
        if self.embedding == "saved" and self.head == "lora" and self.ensure:
            return self.base in ("llama", "bert-masked")
        if self.base == "t5":
            # The layers of T5 read `shared` through modules of their own, which an adapter on it does not reach.
            return self.embedding in ("none", "tokens") and not self.ensure
        return True


CASES = [
    case
    for case in itertools.starmap(
        Case,
        itertools.product(NAMES, ["none", "lora", "dora", "saved", "tokens"], ["none", "lora", "saved"], [False, True]),
    )
    if (case.embedding, case.head) != ("none", "none") and case.possible()
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_and_heads_do_what_the_live_model_does(bases, tmp_path, case):
    base = bases(case.base)
    live = adapt(base, peft.LoraConfig(**case.settings()), tmp_path / "adapter")
    if case.base == "bert-masked" and case.embedding == "tokens":
        # The live wrapper of rows drops the bias of the head that is tied to them; merging puts it back.
        with quiet():
            live = live.merge_and_unload().double()
            wanted = outputs(live, base.batch())
    else:
        wanted = live_outputs(live, base)

    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")

    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), wanted)
    assert report.applied == report.given
    before, after = tensors_of(base.folder), tensors_of(tmp_path / "out")
    new = after.keys() - before.keys()
    assert_config(base.folder, tmp_path / "out", **({"tie_word_embeddings": False} if new else {}))
    changed = {tensor.name for tensor in report.tensors}
    for name in before.keys() - changed:
        assert same_bits(before[name], after[name]), name


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [Case("llama", "lora", "lora", False), Case("llama-tied", "none", "saved", False)])
def test_an_adapter_in_half_precision_replaces_what_it_holds(bases, tmp_path, half, case):
    """PEFT writes the embedding beside its factors, and in a file of halves that is a rounded one: it counts."""
    base = bases(case.base)
    adapt(base, peft.LoraConfig(**case.settings()), tmp_path / "adapter")
    wanted = live_outputs(store_in_half(base, tmp_path / "adapter", half), base)
    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), wanted)


RESIZED: dict[str, dict[str, Any]] = {
    "beside": {},
    "saved": {"saved": "both"},
    "tokens": {"tokens": True},
    "lora-embedding": {"lora": "embedding"},
    "lora-head": {"lora": "head"},
    "lora-both": {"lora": "both"},
    "dora-both": {"lora": "both", "use_dora": True},
    "tokens-lora-head": {"tokens": True, "lora": "head"},
}


# If a module called `embed_tokens` or `lm_head` is a target of LoRA, PEFT saves no other embedding, resized or not: the
# file is not enough.
LOST = {
    *itertools.product(["llama", "llama-tied", "gpt2", "t5"], ["lora-head", "tokens-lora-head"]),
    ("llama", "lora-embedding"),
}


@pytest.mark.parametrize("rows", [VOCABULARY + 7, VOCABULARY - 5])
@pytest.mark.parametrize("how", RESIZED)
@pytest.mark.parametrize("name", NAMES)
def test_a_resized_vocabulary_comes_from_the_adapter(bases, tmp_path, name, how, rows):
    options = dict(RESIZED[how])
    if (name == "t5" and how not in ("beside", "tokens", "lora-head")) or (name == "bert-masked" and "tokens" in how):
        return  # not what the live model computes, as above
    embedding, head, layer = NAMES[name]
    chosen = {"embedding": [embedding], "head": [head], "both": [embedding, head]}
    config = peft.LoraConfig(
        r=2,
        target_modules=[layer, *chosen.get(options.pop("lora", ""), [])],
        modules_to_save=chosen.get(options.pop("saved", "")),
        trainable_token_indices=[3, rows - 1] if options.pop("tokens", False) else None,
        **options,
    )
    base = bases(name)
    model = base.fresh()
    with quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
    live = adapt(base, config, tmp_path / "adapter", model)
    batch = {key: ids % rows for key, ids in base.batch().items()}
    wanted = outputs(live, batch)
    if (name, how) in LOST:
        with pytest.raises(pa.MatchError, match=r"resize|check r"):
            pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return

    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")

    assert_same_outputs(outputs(base.load(tmp_path / "out"), batch), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_name", [False, True])
def test_trainable_tokens_by_themselves(bases, tmp_path, name, by_name):
    base = bases(name)
    config = peft.TrainableTokensConfig(
        token_indices=[1, 40, 7], target_modules=[NAMES[name][0]] if by_name or name == "bert-masked" else None
    )
    with quiet():
        live = peft.get_peft_model(base.fresh(), config)
        train(live)
        live.save_pretrained(tmp_path / "adapter")
    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    with quiet():
        wanted = outputs(live.merge_and_unload().double(), base.batch())
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), wanted)
    assert_config(base.folder, tmp_path / "out")


def test_tokens_of_several_embeddings_by_name(bases, tmp_path):
    base = bases("bert")
    rows = {"word_embeddings": [2, 49, 5], "position_embeddings": [0, 31]}
    config = peft.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=rows)
    live = adapt(base, config, tmp_path / "adapter")
    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), live_outputs(live, base))


@pytest.mark.parametrize("target", ["embed_tokens", "encoder.embed_tokens"])
def test_an_embedding_that_only_a_tie_puts_into_the_file_is_refused(bases, tmp_path, target):
    """T5 has three modules for one tensor; a change of one of them alone has no place in its checkpoint."""
    base = bases("t5")
    adapt(base, peft.LoraConfig(r=2, target_modules=["q", target]), tmp_path / "adapter")
    with pytest.raises(pa.MatchError, match=r"embed_tokens\.lora_embedding_A"):
        pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_resized_head_that_the_adapter_does_not_bring_is_refused(bases, tmp_path):
    base = bases("llama-tied")
    model = base.fresh()
    with quiet():
        model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
        live = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        )
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(pa.MatchError, match="save_embedding_layers=True"):
        pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
