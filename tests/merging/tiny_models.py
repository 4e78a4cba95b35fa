"""Tiny random models of many architectures, saved as checkpoints: bases for adapters that PEFT makes.

No weight is square where the architecture leaves a choice, so that a transposed factor cannot go unnoticed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

VOCABULARY = 50
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ENCODER = {name: DECODER[name] for name in DECODER if name not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 40}
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
VIT = ENCODER | {"image_size": 16, "patch_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1], "layer_type": "bottleneck"}
EXPERTS = {"moe_intermediate_size": 20, "num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2}
GPT_OSS = {**EXPERTS, "layer_types": ["full_attention"] * 2}


@dataclass(frozen=True)
class Tiny:
    """An architecture of transformers with the settings that make it small.

    Attributes:
        head: the model's class.
        config: the class of its configuration.
        settings: of the configuration.
        inputs: what it takes: `"text"`, `"pairs"` (encoder and decoder) or `"images"`.
        layers: the word before a layer's number.
        save: modules that an adapter may bring whole.
    """

    head: str
    config: str
    settings: dict[str, Any] = field(hash=False)
    inputs: str = "text"
    layers: str = "layers"
    save: tuple[str, ...] = ()

    def build(self) -> torch.nn.Module:
        config = getattr(transformers, self.config)(**copy.deepcopy(self.settings))
        return getattr(transformers, self.head)(config)

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.head)


LLAMA = Tiny("LlamaForCausalLM", "LlamaConfig", DECODER, save=("lm_head", "norm", "mlp", "embed_tokens"))
TINY: dict[str, Tiny] = {
    "llama": LLAMA,
    "llama-tied": Tiny("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "llama-bare": Tiny("LlamaModel", "LlamaConfig", DECODER),
    "llama-labels": Tiny("LlamaForSequenceClassification", "LlamaConfig", DECODER | {"num_labels": 3}),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", GPT2, layers="h", save=("ln_f", "mlp", "wpe")),
    "gpt2-bare": Tiny("GPT2Model", "GPT2Config", GPT2, layers="h"),
    "bert": Tiny(
        *("BertForSequenceClassification", "BertConfig", ENCODER | {"num_labels": 3}),
        layers="layer",
        save=("classifier", "pooler", "LayerNorm", "position_embeddings"),
    ),
    "bert-bare": Tiny("BertModel", "BertConfig", ENCODER, layers="layer"),
    "bert-masked": Tiny("BertForMaskedLM", "BertConfig", ENCODER | {"tie_word_embeddings": True}, layers="layer"),
    "t5": Tiny(
        *("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": 0, "tie_word_embeddings": True}),
        inputs="pairs",
        layers="block",
        save=("final_layer_norm", "DenseReluDense", "SelfAttention.k"),
    ),
    "vit": Tiny(
        *("ViTForImageClassification", "ViTConfig", VIT | {"num_labels": 3}),
        inputs="images",
        save=("classifier", "layernorm", "layernorm_before"),
    ),
    "resnet": Tiny(
        *("ResNetForImageClassification", "ResNetConfig", RESNET | {"num_labels": 3}),
        inputs="images",
        layers="layers",
        save=("classifier", "normalization"),
    ),
    "qwen3-moe": Tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", DECODER | EXPERTS, save=("norm", "lm_head")),
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", DECODER | EXPERTS, save=("norm", "lm_head")),
    "gpt-oss": Tiny("GptOssForCausalLM", "GptOssConfig", DECODER | GPT_OSS, save=("norm", "lm_head")),
}


class Convolutions(torch.nn.Module):
    """One layer of every kind that LoRA knows, as people write them: no `config.json`, no `model_type`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 12)
        self.line = torch.nn.Conv1d(12, 10, 3, padding=1)
        self.plane = torch.nn.Conv2d(1, 6, (3, 2), stride=2)
        self.point = torch.nn.Conv2d(6, 8, 1, bias=False)
        self.space = torch.nn.Conv3d(1, 4, (2, 3, 1))
        self.stack = torch.nn.ModuleDict({"down": torch.nn.Linear(10, 14), "up": torch.nn.Linear(14, 9)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        line = self.line(self.tokens(ids).mT)
        plane = self.point(self.plane(line[:, None]).relu())
        space = self.space(line[:, None, :, :, None])
        dense = self.stack["up"](self.stack["down"](line.mT).relu())
        return torch.cat([dense.flatten(1), plane.flatten(1), space.flatten(1)], dim=1)


class Projections(torch.nn.Module):
    """transformers' Conv1D in a model of one's own: only the adapter's configuration says how it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 12)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"c_fc": Conv1D(20, 12), "square": Conv1D(20, 20), "c_proj": Conv1D(12, 20)})
            for _ in range(2)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block["c_proj"](block["square"](block["c_fc"](x)).relu())
        return x


class Attention(torch.nn.Module):
    """torch's own attention: three projections in one tensor, and a fourth below."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 12)
        self.attn = torch.nn.MultiheadAttention(12, 3, batch_first=True)
        self.final = torch.nn.Linear(12, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        return self.final(self.attn(x, x, x, need_weights=False)[0])


class Grouped(torch.nn.Module):
    """Convolutions whose channels are split into groups."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 12)
        self.plane = torch.nn.Conv2d(12, 8, (3, 1), groups=2)
        self.each = torch.nn.Conv2d(8, 16, (1, 2), groups=8)
        self.space = torch.nn.Conv3d(16, 9, (2, 1, 1), padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        plane = self.each(self.plane(self.tokens(ids).mT[..., None].expand(-1, -1, -1, 4)).relu())
        return self.space(plane[:, :, None]).flatten(1)


MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "grouped": Grouped,
    "convolutions": Convolutions,
    "projections": Projections,
    "attention": Attention,
}


@dataclass(frozen=True, repr=False)
class Base:
    """A checkpoint folder, and the model that was loaded from it."""

    name: str
    folder: Path
    model: torch.nn.Module

    def __repr__(self) -> str:
        return f"Base({self.name!r})"

    def fresh(self) -> torch.nn.Module:
        """A copy of the model, to be wrapped."""
        return copy.deepcopy(self.model)

    def batch(self) -> dict[str, torch.Tensor]:
        """Inputs for the model."""
        draw = torch.Generator().manual_seed(7)
        ids = torch.randint(1, VOCABULARY, (3, 9), generator=draw)
        kind = TINY[self.name].inputs if self.name in TINY else "module"
        if kind == "images":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
        if kind == "pairs":
            return {"input_ids": ids, "decoder_input_ids": ids.flip(0)[:, :5]}
        return {"ids" if kind == "module" else "input_ids": ids}

    def load(self, folder: Path, model_class: Any = None, **settings: Any) -> torch.nn.Module:
        """What transformers (or torch) makes of another folder with this architecture."""
        if self.name in MODULES:
            return load_module(self.name, folder)
        return load_model(model_class or TINY[self.name].model_class, folder, **settings)


class Bases:
    """Builds each base once.

    Args:
        root: where their folders go.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.built: dict[tuple[str, bool, torch.dtype | None], Base] = {}

    def __call__(self, name: str, *, sharded: bool = False, dtype: torch.dtype | None = None) -> Base:
        key = (name, sharded, dtype)
        if key not in self.built:
            folder = self.root / f"{name}-{'sharded' if sharded else 'whole'}-{str(dtype).removeprefix('torch.')}"
            self.built[key] = _build(name, folder, sharded, dtype)
        return self.built[key]


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A model's numbers for a batch: its logits where it has a head."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        found = model.eval()(**{key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()})
    if isinstance(found, torch.Tensor):
        return found
    return found.logits if "logits" in found else found.last_hidden_state


def _build(name: str, folder: Path, sharded: bool, dtype: torch.dtype | None) -> Base:
    torch.manual_seed(0)
    model = MODULES[name]() if name in MODULES else TINY[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.ndim < 2 else parameter.normal_(0, 0.2)
    model = model.to(dtype or torch.float32).eval()
    if name in MODULES:
        folder.mkdir()
        _save_module(model, folder, sharded)
        return Base(name, folder, model)
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
    # From the folder, so that PEFT finds the model's configuration where it says that the model comes from.
    return Base(name, folder, load_model(TINY[name].model_class, folder))


def _save_module(model: torch.nn.Module, folder: Path, sharded: bool) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if not sharded:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_model(model_class: Any, folder: Path, **settings: Any) -> torch.nn.Module:
    """A model of transformers from a folder, in the dtype of its file."""
    model = model_class.from_pretrained(folder, dtype="auto", **settings).eval()
    # The fast product over experts knows no float64.
    model.set_experts_implementation("eager")
    return model


def load_module(name: str, folder: Path) -> torch.nn.Module:
    """One of `MODULES` with the weights in a folder."""
    from safetensors.torch import load_file

    model = MODULES[name]()
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    model.load_state_dict(tensors)
    return model.eval()
