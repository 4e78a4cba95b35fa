"""From a checkpoint folder to a model in memory, tensor by tensor, for any array library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.arrays import Array, namespace
from peftarray.backend import load_backend
from peftarray.dtypes import StorageDType, decode, encode, parse_dtype
from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError, nearest
from peftarray.models.model import Model, Tensor
from peftarray.quant import Codec
from peftarray.quant.layouts import StoredWeight, find_quantised
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.quantising import Choice, quantised
from peftarray.random import normal_of
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.json_file import read_json

__all__ = ["MODEL_TYPES", "create", "load"]

_FAMILIES = {
    ("llama", "Llama"): ("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    ("bert", "Bert"): ("bert",),
    ("gpt2", "GPT2"): ("gpt2",),
}
MODEL_TYPES = {kind: home for home, kinds in _FAMILIES.items() for kind in kinds}
"""`model_type` -> (module, class) of the models that are known here."""

_AT_ONCE = 4 << 20
"""Bytes of a tensor that are decoded at once."""


def load(
    path: str | Path,
    *,
    backend: str = "numpy",
    device: Any = None,
    dtype: str | None = None,
    quantize: str | Codec | None = None,
    skip: Iterable[str] = (),
    embeddings: str | Codec | None = None,
    codecs: Mapping[str, str | Codec] | None = None,
) -> Model:
    """A reference model with the weights of a checkpoint folder.

    Weights are decoded tensor by tensor straight from the mapped file; there is one copy of them in memory. Those that
    the file stores quantised (bitsandbytes, FP8, GPTQ and the others of `peftarray.quant.layouts`) stay so.

    Args:
        path: a folder with `config.json` and safetensors weights, sharded or not.
        backend: the array library, by the name of its backend.
        device: where the weights go, as the library says it; its default if None.
        dtype: of the weights, such as `"float64"`; float32 if None (float64 where that is stored).
        quantize: quantise linear layers on the way, one float tensor at a time; on the host, so that every library gets
            the same bits. It and the next three are as `peftarray.quantize` has them; a codec of other than the usual
            settings is what `peftarray.codec` gives.
        skip: modules that stay as they are.
        embeddings: the codec of the input embedding.
        codecs: linear layers that have another codec, by their names or ends of names.

    Raises:
        FormatError: no checkpoint there, or a damaged one.
        UnsupportedError: a model type that is not known here, or what the backend cannot hold.
        MatchError: a tensor is missing or has another shape than `config.json` says.

    Example:
        >>> load("no-such-folder")
        Traceback (most recent call last):
        peftarray.errors.FormatError: no-such-folder does not exist; give a checkpoint folder or a .safetensors file
    """
    place = _placement(backend, device, dtype)
    with Checkpoint.open(path) as store:
        if not store.config:
            message = f"{path} has no config.json beside the weights; give the folder that holds both"
            raise ConfigError(message)
        family, config = _family(_with_generation_facts(store))
        stored = _stored_quantised(store)
        held = {tensor for weight in stored.values() for tensor in weight.names()}
        names = {_live(name): name for name in (*store, *stored) if name in stored or name not in held}
        prefix = _prefix(family, family.tensors(config), names)
        chosen = _to_quantise(store, names, stored, quantize, skip=skip, embeddings=embeddings, codecs=codecs)
        weights = {}
        for row in family.tensors(config):
            name = row.name if row.bare else prefix + row.name
            if name in names and not (row.stand_in and _same(store, names, name, prefix + row.stand_in)):
                shape = stored[names[name]].shape if names[name] in stored else store[names[name]].shape
                _check_shape(store, names[name], shape, row)
                if names[name] in stored:
                    weights[name] = _still_quantised(stored[names[name]], store, place, dtype)
                elif name in chosen:
                    weights[name] = _quantised(name, _decoded(store, names[name], dtype), chosen[name], place, dtype)
                else:
                    weights[name] = place(_decoded(store, names[name], dtype))
            elif row.needed:
                message = (
                    f"{path} has no tensor {name}{nearest(name, names)}; it is not a whole {store.config['model_type']}"
                )
                raise MatchError(message)
        left_out = tuple(disk for name, disk in names.items() if name not in weights)
    return family(config, weights, prefix, left_out, facts=store.config)


def create(config: Mapping[str, Any], *, seed: int = 0, backend: str = "numpy", device: Any = None) -> Any:
    """A new model with random weights: normal numbers of deviation 0.02, norms of one, biases of zero.

    Args:
        config: as a `config.json` has it.
        seed: of the numbers; the same on every library.
        backend, device: as for `load`.

    Raises:
        ConfigError, UnsupportedError: the configuration is not that of a model known here.
    """
    place = _placement(backend, device, None)
    family, checked = _family(config)
    weights = {}
    for row in family.tensors(checked):
        shape = tuple(size for size in row.shape if size is not None)
        if len(shape) < len(row.shape) or row.stand_in:
            continue
        name = row.name if row.bare else family.usual_prefix + row.name
        if len(shape) > 1:
            values = normal_of(0.02)(seed, name, shape)
        else:
            values = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        weights[name] = place(values)
    return family(checked, weights, family.usual_prefix, facts=dict(config))


def _family(config: Mapping[str, Any]) -> tuple[type[Model], Any]:
    kind = config.get("model_type")
    if type(kind) is not str or kind not in MODEL_TYPES:
        message = f"model_type is {kind!r}; the models known here are {', '.join(sorted(MODEL_TYPES))}"
        raise UnsupportedError(message)
    module, name = MODEL_TYPES[kind]
    family: type[Model] = getattr(importlib.import_module(f"peftarray.models.{module}"), name)
    return family, family.read(config)


def _with_generation_facts(store: Checkpoint) -> dict[str, Any]:
    """The configuration, with the tokens that end a text as `generation_config.json` names them, where there is one."""
    file = store.folder / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    return store.config | {name: said[name] for name in ("eos_token_id", "pad_token_id") if said.get(name) is not None}


def _live(name: str) -> str:
    """The name of a tensor in the model; the first BERTs call the weight of a norm gamma."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _prefix(family: type[Model], rows: Iterable[Tensor], names: Mapping[str, str]) -> str:
    """The usual one, or none for a model that was saved without its head."""
    first = next(row.name for row in rows if not row.bare)
    return family.usual_prefix if family.usual_prefix + first in names or first not in names else ""


def _check_shape(store: Checkpoint, name: str, found: tuple[int, ...], row: Tensor) -> None:
    if len(found) != len(row.shape) or any(size not in (None, n) for size, n in zip(row.shape, found, strict=True)):
        wanted = tuple("any" if size is None else size for size in row.shape)
        message = f"{store.path}: {name} is {found}; config.json wants {wanted}: the two do not belong together"
        raise ShapeError(message)


def _same(store: Checkpoint, names: Mapping[str, str], head: str, embedding: str) -> bool:
    name, other = names[head], names.get(embedding)
    if other is None or name not in store or other not in store:  # one that is stored quantised is its own
        return False
    return store[name].shape == store[other].shape and np.array_equal(store.read(name), store.read(other))


def _stored_quantised(store: Checkpoint) -> dict[str, StoredWeight]:
    """The weights that the file holds quantised; found by the names of tensors alone where `config.json` is silent."""
    found = find_quantised(store, store.config, store.read_stored)
    for weight in found.values():
        if weight.transposed:
            message = f"{store.path}: {weight.name} is stored the other way round, as fused experts are; not known here"
            raise UnsupportedError(message)
    return found


def _to_quantise(
    store: Checkpoint,
    names: Mapping[str, str],
    stored: Mapping[str, StoredWeight],
    quantize: str | Codec | None,
    *,
    skip: Iterable[str],
    **others: Any,
) -> dict[str, Codec]:
    """name of a weight -> its codec, for those that are quantised on the way."""
    if quantize is None:
        if tuple(skip) or any(value is not None for value in others.values()):
            message = "skip, embeddings or codecs is given, and quantize is None; say how other weights are quantised"
            raise ConfigError(message)
        return {}
    shapes = {name: tuple(store[disk].shape) for name, disk in names.items() if disk not in stored}
    return Choice(quantize, skip=skip, **others).among(shapes, store.config["model_type"])


def _quantised(
    name: str, values: np.ndarray, codec: Codec, place: Callable[[np.ndarray], Array], dtype: str | None
) -> QuantisedWeight:
    made = quantised(name, values, codec)
    return _placed(codec, made.parts, made.stored, place, dtype)


def _still_quantised(
    weight: StoredWeight, store: Checkpoint, place: Callable[[np.ndarray], Array], dtype: str | None
) -> QuantisedWeight:
    """A weight as the file has it; its parts are copied, since the file will be closed."""
    parts = {name: np.array(part) for name, part in weight.parts(store.read_stored).items()}
    return _placed(weight.codec, parts, weight.shape, place, dtype)


def _placed(
    codec: Codec,
    parts: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    place: Callable[[np.ndarray], Array],
    dtype: str | None,
) -> QuantisedWeight:
    # Scales of dtypes that only files have are decoded: they are few.
    wide = {name: part.astype(np.float32) if _is_rare(part.dtype) else part for name, part in parts.items()}
    placed = {name: place(part) for name, part in wide.items()}
    xp = namespace(*placed.values())
    return quantised_weight(codec, placed, shape, getattr(xp, "float32" if dtype is None else _name(dtype)))


def _is_rare(dtype: np.dtype) -> bool:
    return dtype.name.startswith("float8") or dtype.kind == "V"


def _decoded(store: Checkpoint, name: str, dtype: str | None) -> np.ndarray:
    """A tensor in the dtype that is asked for, decoded a few megabytes at a time."""
    info, file = store[name], store.shard_of(name)
    stored, source = info.dtype, _numpy(info.dtype)
    target = stored if dtype is None else parse_dtype(dtype)
    values = np.empty(info.shape, stored.compute if dtype is None else _numpy(target))
    flat = values.reshape(-1)
    count = max(1, _AT_ONCE // source.itemsize)
    for start in range(0, flat.size, count):
        part = flat[start : start + count]
        with file.window(info.begin + start * source.itemsize, part.shape, source) as window:
            if part.dtype.itemsize >= stored.compute.itemsize:
                decode(window, stored, out=part)
            else:
                encode(decode(window, stored), target, out=part)
    return values


def _numpy(dtype: StorageDType) -> np.dtype:
    assert dtype.numpy is not None  # a packed one is refused where it is read
    return dtype.numpy


def _name(dtype: str) -> str:
    """A dtype's name in the namespaces of libraries."""
    return _numpy(parse_dtype(dtype)).name


def _placement(backend: str, device: Any, dtype: str | None) -> Callable[[np.ndarray], Array]:
    """What brings a host array to a library and a device."""
    library = load_backend(backend)

    def place(array: np.ndarray) -> Array:
        return library.from_host(array, device=device)

    if dtype is not None:
        name = _name(dtype)
        if not hasattr(namespace(place(np.zeros(1, np.float32))), name):
            message = f"dtype is {dtype!r}, in which {backend} does not compute; use float32"
            raise UnsupportedError(message)
    return place
