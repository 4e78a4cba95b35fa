"""Random damage to checkpoints and adapters: bytes, JSON values, names and shapes. A seed repeats a case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import (
    PREFIX,
    VOCABULARY,
    base_shapes,
    data_of,
    header_of,
    lora_config,
    lora_tensors,
    random_tensors,
    targets_of,
    write_adapter,
    write_base,
    write_raw,
)

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 1 << 63, 10**400, -(10**30)),
    *(0.0, -0.0, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf")),
    *(
        "",
        "a",
        "q_proj",
        "all-linear",
        "all",
        "none",
        ".*",
        "(",
        "[",
        "*",
        "lora_only",
        "pissa",
        "\0",
        "\u202e",
        "é" * 300,
    ),
    *([], [None], [0], [1, 1], [-1], ["q_proj"], ["", "."], [[]], [{}], [10**30], [0.5], ["q_proj", 5]),
    *(
        {},
        {"": 1},
        {"q_proj": 1},
        {"q_proj": None},
        {"q_proj": [0]},
        {"a": {"b": {}}},
        {"(": 2},
        {".*": 0.5},
        {"1": "2"},
    ),
)
_WORDS = (
    *("base_model", "model", "layers", "0", "1", "2", "7" * 5000, "-1", "٣", "self_attn", "q_proj", "mlp", "experts"),
    *("lm_head", "embed_tokens", "norm", "weight", "bias", "lora_A", "lora_B", "lora_A.default", "lora_embedding_A"),
    *(
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_diag",
        "lora_B.bias",
        "base_layer",
        "modules_to_save",
        "default",
    ),
    *("original_module", "token_adapter", "trainable_tokens_delta", "in_proj_weight", "out_proj", "", "\n", "x" * 2000),
)


def damage_bytes(path: Path, rng: np.random.Generator) -> None:
    """Overwrite, insert or remove a few bytes, mostly near the beginning, where headers are."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, min(len(data), 4000 if rng.random() < 0.9 else len(data)))))
        noise = bytes(rng.integers(0, 256, rng.integers(1, 9), dtype=np.uint8))
        kind = rng.integers(0, 4)
        if kind == 0:
            data[at : at + 1] = noise[:1]
        elif kind == 1:
            data[at:at] = noise
        elif kind == 2:
            del data[at : at + len(noise)]
        else:
            data[at : at + 1] = bytes([rng.choice(list(b'0123456789"{}[],:-eE.'))])
    path.write_bytes(bytes(data))


def damage_value(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one place in it changed: another value, a key removed, added, renamed or moved."""
    places = list(_containers(value))
    if not places:
        return _odd(rng)
    place = places[rng.integers(len(places))]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    kind = rng.integers(0, 5)
    if not keys or kind == 0:
        new = _odd(rng)
        place.insert(0, new) if isinstance(place, list) else place.update({_name(rng): new})
        return value
    key = keys[rng.integers(len(keys))]
    if kind == 1:
        del place[key]
    elif kind == 2 and isinstance(place, dict):
        place[_name(rng)] = place.pop(key)
    elif kind == 3:
        other = keys[rng.integers(len(keys))]
        place[key], place[other] = place[other], place[key]
    else:
        old = place[key]
        near = type(old) is int and rng.random() < 0.5
        place[key] = old + int(rng.integers(-9, 10)) if near else _odd(rng)
    return value


def damage_json(path: Path, rng: np.random.Generator) -> None:
    """Change places in a JSON file, or in the header of a safetensors file (whose length is then right)."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    value = json.loads(data[8:start] if path.suffix == ".safetensors" else data)
    for _ in range(rng.integers(1, 3)):
        value = damage_value(value, rng)
    text = json.dumps(value).encode()
    if path.suffix == ".safetensors":
        write_raw(path, text, data[start:])
    else:
        path.write_bytes(text)


def damage_tensors(folder: Path, tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Write an adapter some of whose tensors have another name, shape, dtype or value, are gone, or are new."""
    tensors = dict(tensors)
    for _ in range(rng.integers(1, 4)):
        name = list(tensors)[rng.integers(len(tensors))]
        kind = rng.integers(0, 6)
        if kind == 0:
            tensors[_renamed(name, rng)] = tensors.pop(name)
        elif kind == 1:
            tensors[_renamed(name, rng)] = tensors[name]
        elif kind == 2 and len(tensors) > 1:
            del tensors[name]
        elif kind == 3:
            dtypes = (np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint8, np.int64)
            with np.errstate(all="ignore"):
                tensors[name] = tensors[name].astype(dtypes[rng.integers(len(dtypes))])
        elif kind == 4:
            values = tensors[name].astype(np.float32)
            values.reshape(-1)[:1] = (np.nan, np.inf, 1e15, -0.0)[rng.integers(4)]
            tensors[name] = values
        else:
            shape = tuple(rng.choice([0, 1, 2, 3, 4, 8, 12, 16], rng.integers(0, 5)).tolist())
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
    write_raw(folder / "adapter_model.safetensors", header_of(tensors), data_of(tensors))


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for inner in list(value.values() if isinstance(value, dict) else value):
            yield from _containers(inner)


def _odd(rng: np.random.Generator) -> Any:
    # Through JSON, so that no two places share a value.
    return json.loads(json.dumps(ODD[rng.integers(len(ODD))]))


def _name(rng: np.random.Generator) -> str:
    return ".".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), rng.integers(1, 4)))


def _renamed(name: str, rng: np.random.Generator) -> str:
    words = name.split(".")
    at = int(rng.integers(len(words) + 1))
    kind = rng.integers(0, 3)
    if kind == 0:
        words.insert(at, _WORDS[rng.integers(len(_WORDS))])
    elif kind == 1:
        words[at : at + 1] = [_WORDS[rng.integers(len(_WORDS))]]
    else:
        del words[at : at + 1]
    return ".".join(words)


# Sound worlds to damage. Each writes `base` and `adapter` and returns the adapter's tensors.


def plain(place: Path) -> dict[str, np.ndarray]:
    """Two layers in three shards, LoRA on two modules of each."""
    write_base(place / "base", dtype=ml_dtypes.bfloat16, shards=3)
    return write_adapter(place / "adapter")


def rich(place: Path) -> dict[str, np.ndarray]:
    """A tied model in one file; DoRA, a saved norm, trained rows of the embedding, patterns."""
    shapes = base_shapes()
    del shapes["lm_head.weight"]
    write_base(place / "base", random_tensors(shapes, np.float32, 0), config={"tie_word_embeddings": True})
    tensors = lora_tensors(targets_of(), dtype=ml_dtypes.bfloat16)
    for module, shape in targets_of().items():
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = np.ones(shape[0], np.float32)
    tensors[f"{PREFIX}model.norm.weight"] = np.ones(8, np.float32)
    tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = np.ones((2, 8), np.float32)
    more = {"modules_to_save": ["norm"], "trainable_token_indices": {"embed_tokens": [1, VOCABULARY - 1]}}
    patterns = {"rank_pattern": {r"layers\.[01]\.mlp": 2, "q_proj": 2}, "alpha_pattern": {"q_proj": 1.5}}
    config = lora_config(use_dora=True, use_rslora=True, target_modules=r".*\.(q_proj|down_proj)", **more, **patterns)
    return write_adapter(place / "adapter", tensors, config)


def experts(place: Path) -> dict[str, np.ndarray]:
    """A mixture whose file holds a tensor an expert, and whose adapter has stacks; and one with a transposed layer."""
    head = "model.layers.0.mlp"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, 8), f"{head}.gate.weight": (3, 8)}
    for i in range(3):
        shapes |= {f"{head}.experts.{i}.{name}_proj.weight": (12, 8) for name in ("gate", "up")}
        shapes[f"{head}.experts.{i}.down_proj.weight"] = (8, 12)
    write_base(place / "base", random_tensors(shapes, np.float16, 0), shards=2, config={"model_type": "qwen3_moe"})
    rng = np.random.default_rng(2)
    tensors = lora_tensors({f"{head}.gate": (3, 8)})
    for wrapper, rows, columns in ((".base_layer", 24, 8), ("", 8, 12)):
        stem = f"{PREFIX}{head}.experts{wrapper}"
        tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((6, columns)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((rows, 6)).astype(np.float32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return write_adapter(place / "adapter", tensors, lora_config(target_modules=["gate"], target_parameters=names))


def transposed(place: Path) -> dict[str, np.ndarray]:
    """GPT-2: layers stored `(in, out)`, with biases; a convolution; an embedding with factors."""
    head = "transformer.h.0"
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCABULARY, 8),
        f"{head}.attn.c_attn.weight": (8, 24),
    }
    shapes |= {f"{head}.attn.c_attn.bias": (24,), "transformer.conv.weight": (4, 3, 2, 2)}
    write_base(place / "base", random_tensors(shapes, np.float16, 0), config={"model_type": "gpt2"})
    tensors = lora_tensors({f"{head}.attn.c_attn": (24, 8)})
    rng = np.random.default_rng(2)
    more = {f"{head}.attn.c_attn.bias": (24,), "transformer.conv.lora_A.weight": (2, 3, 2, 2)}
    more |= {"transformer.conv.lora_B.weight": (4, 2, 1, 1), "transformer.wte.lora_embedding_A": (2, VOCABULARY)}
    more |= {"transformer.wte.lora_embedding_B": (8, 2)}
    tensors |= {PREFIX + name: rng.standard_normal(shape).astype(np.float32) for name, shape in more.items()}
    return write_adapter(place / "adapter", tensors, lora_config(target_modules=["c_attn", "conv", "wte"], bias="all"))


WORLDS = {world.__name__: world for world in (plain, rich, experts, transposed)}
