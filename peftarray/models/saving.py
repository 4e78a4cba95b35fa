"""A model as a checkpoint folder that transformers and `load` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.arrays import to_host
from peftarray.dtypes import StorageDType, encode, parse_dtype
from peftarray.errors import OutputError, UnsupportedError
from peftarray.models.model import HEAD, Model
from peftarray.stand_in import StandIn
from peftarray.stores.safetensors import save_file

__all__ = ["save"]


def save(model: Model, folder: str | Path, *, dtype: str = "float32") -> None:
    """Write the weights and the configuration of a model.

    Args:
        model: as `load`, `create` or a `PeftModel`'s `merge_and_unload` gave it.
        folder: made where it is missing; it must hold no weights yet.
        dtype: of the weights on disk, such as `"bfloat16"`.

    Raises:
        OutputError: there are weights in the folder, or it cannot be written to.
        UnsupportedError: a weight stands for others; merge adapters first.
    """
    place, stored = Path(folder), parse_dtype(dtype)
    if any(place.glob("*.safetensors")):
        message = f"{place} holds weights already; choose another folder, or remove them"
        raise OutputError(message)
    arrays = {name: _rounded(name, values, stored) for name, values in model.weights.items()}
    facts = {**model.facts, "dtype": np.dtype(stored.numpy).name}
    if HEAD in arrays:
        facts["tie_word_embeddings"] = False
    try:
        place.mkdir(parents=True, exist_ok=True)
        save_file(arrays, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        message = f"{place} cannot be written to ({error.strerror}); check the path, its permissions and the disk"
        raise OutputError(message) from None


def _rounded(name: str, values: Any, stored: StorageDType) -> np.ndarray:
    if isinstance(values, StandIn):
        message = f"{name} stands for others; save what merge_and_unload gives, or the adapter by save_pretrained"
        raise UnsupportedError(message)
    host = to_host(values)
    wide = host if host.dtype.itemsize >= 4 else host.astype(np.float32)
    return host if host.dtype == stored.numpy else encode(wide, stored)
