"""Tiny checkpoints and LoRA adapters written byte by byte, so that a test can also write what no library would."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

PREFIX = "base_model.model."
HIDDEN, INNER, VOCABULARY = 8, 12, 16
_CODES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int64): "I64",
}


def layer_shapes(layer: int, hidden: int = HIDDEN, inner: int = INNER) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its weight, in one layer of a Llama."""
    head = f"model.layers.{layer}."
    return {
        f"{head}self_attn.q_proj": (hidden, hidden),
        f"{head}self_attn.v_proj": (hidden, hidden),
        f"{head}mlp.up_proj": (inner, hidden),
        f"{head}mlp.down_proj": (hidden, inner),
        f"{head}input_layernorm": (hidden,),
    }


def base_shapes(layers: int = 2, hidden: int = HIDDEN, inner: int = INNER) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape of a whole model, in the order of its layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        shapes |= {f"{module}.weight": shape for module, shape in layer_shapes(layer, hidden, inner).items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: Any, seed: int) -> dict[str, np.ndarray]:
    """Normal numbers of a weight's usual size."""
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def header_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The header that a file with these tensors has, in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        entries[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    return entries


def data_of(tensors: Mapping[str, np.ndarray]) -> bytes:
    """What follows the header."""
    return b"".join(array.tobytes() for array in tensors.values())


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> Path:
    """A safetensors file with this header and these data, right or wrong; `length` is what it claims the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + text + data)
    return path


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A sound safetensors file."""
    return write_raw(path, header_of(tensors), data_of(tensors))


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], code: str = "BF16", itemsize: int = 2) -> int:
    """A sound file whose data are a hole: it takes no space. Returns the bytes that it seems to have."""
    entries: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        end = at + int(np.prod(shape)) * itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)
    return at


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return path


def write_base(
    folder: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    shards: int = 0,
    dtype: Any = np.float32,
    layers: int = 2,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """A checkpoint folder; with `shards`, that many files and an index. Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(tensors if tensors is not None else random_tensors(base_shapes(layers), dtype, seed))
    facts = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(facts | dict(config or {})))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if not shards:
        write_tensors(folder / "model.safetensors", tensors)
        return tensors
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_tensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return tensors


def lora_tensors(
    modules: Mapping[str, tuple[int, ...]], *, rank: int = 2, dtype: Any = np.float32, seed: int = 1
) -> dict[str, np.ndarray]:
    """The factors of each module (name -> shape of its weight), under the keys that PEFT gives them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (out, fan_in) in modules.items():
        for name, shape in (("lora_A", (rank, fan_in)), ("lora_B", (out, rank))):
            tensors[f"{PREFIX}{module}.{name}.weight"] = (0.3 * rng.standard_normal(shape)).astype(dtype)
    return tensors


def targets_of(layers: int = 2, names: Sequence[str] = ("q_proj", "down_proj")) -> dict[str, tuple[int, ...]]:
    """Module -> shape, of the modules with these last names."""
    found = {}
    for layer in range(layers):
        found |= {module: shape for module, shape in layer_shapes(layer).items() if module.endswith(tuple(names))}
    return found


def lora_config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes into `adapter_config.json`, as far as it matters here."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    } | changes


def write_adapter(
    folder: Path, tensors: Mapping[str, np.ndarray] | None = None, config: Mapping[str, Any] | bytes | None = None
) -> dict[str, np.ndarray]:
    """An adapter folder as PEFT's `save_pretrained` makes it. Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(lora_tensors(targets_of()) if tensors is None else tensors)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    text = config if isinstance(config, bytes) else json.dumps(lora_config() if config is None else config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return tensors


def merged_tensors(
    base: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], scale: float = 2.0
) -> dict[str, np.ndarray]:
    """W + scale B A, computed in float64 and rounded once to the dtype of W; the other tensors as they are."""
    merged = dict(base)
    for key, down in adapter.items():
        module, found, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        if found:
            up = adapter[f"{PREFIX}{module}.lora_B.weight"]
            weight = base[f"{module}.weight"]
            exact = weight.astype(np.float64) + scale * (up.astype(np.float64) @ down.astype(np.float64))
            # Through float32, as every conversion to a short dtype goes in NumPy; far from a tie that is one rounding.
            merged[f"{module}.weight"] = exact.astype(np.float32).astype(weight.dtype)
    return merged


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by a parser of its own."""
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            stored = np.frombuffer(data[start + begin : start + end], dtypes.get(entry["dtype"], np.uint8))
            tensors[name] = stored.reshape(entry["shape"]) if entry["dtype"] in dtypes else stored
    return tensors


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind, permissions, size, and the bytes of files that are not huge."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and facts.st_size < 1 << 22:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        size = 0 if path.is_dir() else facts.st_size
        found[str(path.relative_to(folder))] = (oct(facts.st_mode), size, content)
    return found
