"""The files beside the weights: the base's come along, the adapter's tokenizer wins, `config.json` is mended."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftarray.dtypes import StorageDType
from peftarray.formats.adapters import Adapters
from peftarray.merging.journal import write_durably
from peftarray.merging.plan import Plan
from peftarray.stores.json_file import read_json

__all__ = ["side_bytes", "write_side_files"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json", ".ot")
_SKIPPED = {".git", ".cache", "original", ".gitattributes"}
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_side_files(plan: Plan, folder: Path) -> list[str]:
    """Put them into `folder`, durably; returns facts for the report."""
    notes = []
    adapters = [adapter for adapter, _ in plan.adapters]
    files = _files(plan.base.files.path)
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, folder / name)
    for name in _TOKENIZER:
        found = [Path(adapter.name) / name for adapter in adapters if (Path(adapter.name) / name).is_file()]
        if not found:
            continue
        contents = {file.read_bytes() for file in found}
        if len(contents) > 1:
            notes.append(f"{name} differs between the adapters; the first one's is used")
        if name not in files or files[name].read_bytes() != found[0].read_bytes():
            _copy(found[0], folder / name)
            notes.append(f"{name} comes from the adapter")
    if "config.json" in files:
        changed = _mended(plan.config, adapters, plan.form.dtype)
        if changed != read_json(files["config.json"]):
            write_durably(folder / "config.json", (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode())
    if plan.index is not None:
        write_durably(folder / plan.index_name, (json.dumps(plan.index, indent=2) + "\n").encode())
    return notes


def side_bytes(base: Path) -> int:
    """How many bytes the files beside a base's weights have."""
    return sum(file.stat().st_size for file in _files(base).values())


def _files(base: Path) -> dict[str, Path]:
    if not base.is_dir():
        return {}
    found = {}
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            path = Path(folder) / name
            if not name.endswith(_WEIGHTS) and name not in _SKIPPED and path.is_file():
                found[str(path.relative_to(base))] = path
    return dict(sorted(found.items()))


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as data, target.open("wb") as file:
        shutil.copyfileobj(data, file)
        file.flush()
        os.fsync(file.fileno())


def _mended(config: Mapping[str, Any], adapters: Sequence[Adapters], dtype: StorageDType | None) -> dict[str, Any]:
    """The configuration with what the merge changed."""
    changes = {name: value for adapter in adapters for name, value in adapter.config_changes.items()}
    if dtype is not None and dtype.code in _NAMES:
        for name in ("torch_dtype", "dtype"):
            if name in config:
                changes[name] = _NAMES[dtype.code]
    mended = dict(config) | changes
    for name, inner in config.items():
        if isinstance(inner, dict) and name in ("text_config", "llm_config"):
            mended[name] = inner | {key: value for key, value in changes.items() if key in inner}
    return mended
