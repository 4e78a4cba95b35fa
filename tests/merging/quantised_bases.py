"""Tiny quantised checkpoints, made weight by weight by the codecs, and what an independent formula makes of merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from checkpoints import PREFIX, base_shapes, lora_config, lora_tensors, random_tensors, write_adapter, write_base

from peftarray.quant import Codec
from peftarray.quant.layouts import StoredWeight, find_quantised, writable_layout
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import save_file

HIDDEN, INNER = 64, 128  # whole blocks a row: bitsandbytes' kernel for the CPU decodes others wrongly
TARGETS = ("q_proj", "down_proj")
TOUCHED = [
    f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")
]


class Inputs(NamedTuple):
    """The folders of a merge."""

    original: Path
    base: Path
    adapter: Path


def original_tensors(hidden: int = HIDDEN, inner: int = INNER, seed: int = 0) -> dict[str, np.ndarray]:
    """A Llama in bfloat16."""
    return random_tensors(base_shapes(2, hidden, inner), ml_dtypes.bfloat16, seed)


def is_linear(name: str) -> bool:
    """Whether quantisers take a tensor of these checkpoints."""
    return "_proj" in name


def write_quantised(
    folder: Path, tensors: Mapping[str, np.ndarray], codec: Codec, layout: str, *, shards: int = 0, **config: Any
) -> dict[str, np.ndarray]:
    """A checkpoint whose linear weights are quantised. Returns what its files hold."""
    known = writable_layout(layout)
    held: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if is_linear(name):
            parts = codec.quantize(array.astype(np.float32))
            held |= known.write(name, array.shape, codec, parts, dtype="BF16")
        else:
            held[name] = array
    stated = known.config(codec, skipped=["lm_head"], dtype="BF16")
    write_folder(folder, held, {known.stated_in: stated} | config, shards=shards)
    return held


def write_folder(folder: Path, held: Mapping[str, np.ndarray], config: Mapping[str, Any], *, shards: int = 0) -> None:
    """A checkpoint of these tensors, which may have any dtype."""
    folder.mkdir(parents=True)
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(facts | {"dtype": "bfloat16"} | dict(config)))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if not shards:
        save_file(held, folder / "model.safetensors")
        return
    names, weight_map = list(held), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: held[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_inputs(
    place: Path, codec: Codec, layout: str, *, size: float = 0.3, shards: int = 0, seed: int = 0
) -> Inputs:
    """An original, what a codec makes of it, and a LoRA whose factors have this deviation."""
    tensors = original_tensors(seed=seed)
    write_base(place / "original", tensors, config={"dtype": "bfloat16"})
    write_quantised(place / "base", tensors, codec, layout, shards=shards)
    write_lora(place / "adapter", size=size)
    return Inputs(place / "original", place / "base", place / "adapter")


def write_lora(folder: Path, *, size: float = 0.3, hidden: int = HIDDEN, inner: int = INNER) -> None:
    shapes = {name.removesuffix(".weight"): shape for name, shape in base_shapes(2, hidden, inner).items()}
    modules = {module: shape for module, shape in shapes.items() if module.endswith(TARGETS)}
    factors = {name: (array * (size / 0.3)).astype(np.float32) for name, array in lora_tensors(modules).items()}
    write_adapter(folder, factors, lora_config(target_modules=list(TARGETS)))


def update(adapter: Path, name: str) -> np.ndarray:
    """2 B A in float64."""
    module = f"{PREFIX}{name.removesuffix('.weight')}"
    with Checkpoint.open(adapter / "adapter_model.safetensors") as tensors:
        down, up = (tensors.read(f"{module}.lora_{factor}.weight").astype(np.float64) for factor in "AB")
    return 2 * up @ down


def quantised_weights(folder: Path) -> dict[str, tuple[StoredWeight, np.ndarray]]:
    """Every quantised weight of a checkpoint, and its numbers."""
    with Checkpoint.open(folder) as files:
        found = find_quantised(files, files.config, files.read_stored)
        return {name: (weight, weight.dequantize(files.read_stored)) for name, weight in found.items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def held_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor, by its name."""
    with Checkpoint.open(folder) as files:
        found = {}
        for name, info in files.items():
            buffer = np.empty(info.nbytes, np.uint8)
            files.shard_of(name).read_into(buffer, info.begin)
            found[name] = buffer.tobytes()
        return found
