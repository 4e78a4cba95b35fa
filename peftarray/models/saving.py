"""A model as a checkpoint folder that transformers and `load` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.arrays import to_host
from peftarray.dtypes import StorageDType, encode, parse_dtype
from peftarray.errors import OutputError, UnsupportedError
from peftarray.models.model import HEAD, Model
from peftarray.quant.layouts import LAYOUTS, WritableLayout
from peftarray.quantised_weight import QuantisedWeight
from peftarray.stand_in import StandIn
from peftarray.stores.safetensors import save_file

__all__ = ["save"]


# What `config.json` says of the checkpoint that the model came from.
_SAYS_HOW = ("quantization_config", "quantization", "compression_config")


def save(model: Model, folder: str | Path, *, dtype: str = "float32") -> None:
    """Write the weights and the configuration of a model; quantised weights as checkpoints of their kind have them.

    Args:
        model: as `load`, `create` or a `PeftModel`'s `merge_and_unload` gave it.
        folder: made where it is missing; it must hold no weights yet.
        dtype: of the weights on disk, such as `"bfloat16"`.

    Raises:
        OutputError: there are weights in the folder, or it cannot be written to.
        UnsupportedError: a weight stands for others (merge adapters first), or quantised ones differ in their codec, or
            have one that no layout of checkpoints writes.
    """
    place, stored = Path(folder), parse_dtype(dtype)
    if any(place.glob("*.safetensors")):
        message = f"{place} holds weights already; choose another folder, or remove them"
        raise OutputError(message)
    packed = {name: weight for name, weight in model.weights.items() if isinstance(weight, QuantisedWeight)}
    arrays = {name: _rounded(name, values, stored) for name, values in model.weights.items() if name not in packed}
    facts = {key: value for key, value in model.facts.items() if not packed or key not in _SAYS_HOW}
    facts["dtype"] = np.dtype(stored.numpy).name
    if packed:
        how = _layout(packed)
        for name, weight in packed.items():
            parts = {key: to_host(part) for key, part in weight.parts.items()}
            arrays |= how.write(name, weight.stored, weight.codec, parts, dtype=stored.code)
        codec = next(iter(packed.values())).codec
        others = {
            HEAD,
            *(name for name, array in arrays.items() if _is_matrix(name, array)),
        }  # a tied head is in no file
        skipped = sorted(name.removesuffix(".weight") for name in others - packed.keys())
        facts["quantization_config"] = how.config(codec, skipped=skipped, dtype=stored.code)
    if HEAD in (*arrays, *packed):
        facts["tie_word_embeddings"] = False
    try:
        place.mkdir(parents=True, exist_ok=True)
        save_file(arrays, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"{place} cannot be written to ({error.strerror}); check the path, its permissions and the disk"
        raise OutputError(message) from None


def _layout(packed: Mapping[str, QuantisedWeight]) -> WritableLayout:
    """The first layout that writes weights of the one codec that all have."""
    codecs = list(dict.fromkeys(weight.codec for weight in packed.values()))
    if len(codecs) > 1:
        message = f"weights are quantised by {' and by '.join(map(str, codecs))}; one file holds those of one codec"
        raise UnsupportedError(message)
    for known in LAYOUTS.values():
        if isinstance(known, WritableLayout):
            try:
                known.config(codecs[0], skipped=(), dtype="F32")
            except UnsupportedError:
                continue
            return known
    message = f"no layout of checkpoints holds weights of {codecs[0]}; save the formed weights, or choose another codec"
    raise UnsupportedError(message)


def _is_matrix(name: str, array: np.ndarray) -> bool:
    return name.endswith(".weight") and array.ndim == 2 and array.dtype.kind not in "iu"


def _rounded(name: str, values: Any, stored: StorageDType) -> np.ndarray:
    if isinstance(values, StandIn):
        message = f"{name} stands for others; save what merge_and_unload gives, or the adapter by save_pretrained"
        raise UnsupportedError(message)
    host = to_host(values)
    wide = host if host.dtype.itemsize >= 4 else host.astype(np.float32)
    return host if host.dtype == stored.numpy else encode(wide, stored)
