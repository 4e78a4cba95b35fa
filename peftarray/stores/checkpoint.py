"""A checkpoint: one safetensors file, or a folder of shards with an index, a `config.json` and files beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.dtypes import decode
from peftarray.errors import FormatError, MatchError, UnsupportedError, nearest
from peftarray.stores.json_file import read_json
from peftarray.stores.safetensors import SafetensorsFile, TensorInfo

__all__ = ["Checkpoint"]

_PICKLE = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint(Mapping[str, TensorInfo]):
    """Named tensors over one or many files: a mapping from name to `TensorInfo`, with reads by name.

    Opening reads headers only. Use it as a context manager, or let it go out of scope, to close the files.

    Attributes:
        path: what was opened.
        folder: the folder that the files lie in.
        shards: file name -> `SafetensorsFile`, in the order of the names.
        index_name: the name of the index file, None where there is none.
    """

    def __init__(self, path: Path, shards: dict[str, SafetensorsFile], index_name: str | None) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.shards = shards
        self.index_name = index_name
        self._where: dict[str, tuple[str, TensorInfo]] = {}
        for file_name, shard in shards.items():
            for name, info in shard.tensors.items():
                if name in self._where:
                    message = (
                        f"{path}: the tensor {name} stands in {self._where[name][0]} and in {file_name}; one of "
                        "them is a leftover: remove it"
                    )
                    raise FormatError(message)
                self._where[name] = (file_name, info)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """The checkpoint at a folder or a `.safetensors` file.

        Raises:
            FormatError: nothing there, a shard is missing, a file is damaged, or may not be read.
            UnsupportedError: the weights are pickles, which are never loaded.
        """
        try:
            return cls._open(Path(path))
        except OSError as error:
            message = f"{path} cannot be read ({error.strerror}); check the path and its permissions"
            raise FormatError(message) from None

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        if path.is_file():
            if path.suffix != ".safetensors":
                raise UnsupportedError(_not_safetensors(path))
            return cls(path, {path.name: SafetensorsFile(path)}, None)
        if not path.is_dir():
            message = f"{path} does not exist; give a checkpoint folder or a .safetensors file"
            raise FormatError(message)
        indexes = _files(path, "*.safetensors.index.json")
        if indexes:
            index = _preferred(indexes, "model.safetensors.index.json", path)
            return cls(path, _open_shards(path, index), index.name)
        files = _files(path, "*.safetensors")
        if not files:
            pickles = sorted(p for p in path.iterdir() if p.suffix in _PICKLE)
            if pickles:
                raise UnsupportedError(_not_safetensors(pickles[0]))
            message = f"{path} has no .safetensors file and no index; give the folder that holds the weights"
            raise FormatError(message)
        chosen = _preferred(files, "model.safetensors", path)
        return cls(path, {chosen.name: SafetensorsFile(chosen)}, None)

    @classmethod
    def described(cls, tensors: Iterable[TensorInfo], what: str, config: Mapping[str, Any] | None = None) -> Checkpoint:
        """A checkpoint that no file holds: names, dtypes and shapes, which messages call `what`, and no values.

        Args:
            tensors: the headers.
            what: its name.
            config: what its `config.json` would say; None for what is found at `what`.
        """
        known = cls(Path(what), {}, None)
        known._where = {info.name: ("", info) for info in tensors}
        if config is not None:
            known.config = dict(config)
        return known

    @cached_property
    def config(self) -> dict[str, Any]:
        """What `config.json` says; empty where there is none, or where a single file was opened."""
        file = self.folder / "config.json"
        return read_json(file) if self.path.is_dir() and file.is_file() else {}

    @cached_property
    def index_metadata(self) -> dict[str, Any]:
        """What the index says beside the places of the tensors; empty where there is no index."""
        if self.index_name is None:
            return {}
        found = read_json(self.folder / self.index_name).get("metadata")
        return found if isinstance(found, dict) else {}

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._where[name][1]
        except KeyError:
            message = f"{self.path} has no tensor {name}{nearest(name, self._where)}"
            raise MatchError(message) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def shard_of(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        self[name]
        return self.shards[self._where[name][0]]

    def read_stored(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, in its storage dtype."""
        return self.shard_of(name).read(self[name], rows)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows, as float32 (float64 where that is stored)."""
        return decode(self.read_stored(name, rows), self[name].dtype)

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _files(folder: Path, pattern: str) -> list[Path]:
    """Regular files alone: opening a pipe would wait for somebody to write into it."""
    return sorted(file for file in folder.glob(pattern) if file.is_file())


def _open_shards(folder: Path, index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        message = f"{index}: weight_map must map tensor names to file names; save the index again"
        raise FormatError(message)
    shards: dict[str, SafetensorsFile] = {}
    for name in sorted(set(weight_map.values())):
        # One component only: a name with a separator or '..' could leave the folder.
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            message = (
                f"{index} names the shard {name!r}; a shard must be a .safetensors file in the same folder; the "
                "index is damaged or forged"
            )
            raise FormatError(message)
        if not (folder / name).is_file():
            message = f"{index} names the shard {name}, which is not in {folder}; download the missing file"
            raise FormatError(message)
        shards[name] = SafetensorsFile(folder / name)
    for tensor, name in weight_map.items():
        if tensor not in shards[name].tensors:
            message = (
                f"{index} says that {tensor} is in {name}, which does not hold it; the index belongs to other files"
            )
            raise FormatError(message)
    return shards


def _preferred(files: list[Path], name: str, folder: Path) -> Path:
    if len(files) == 1:
        return files[0]
    for file in files:
        if file.name == name:
            return file
    message = (
        f"{folder} has {len(files)} candidates ({', '.join(file.name for file in files[:4])}) and none is {name}; "
        "give the file itself"
    )
    raise FormatError(message)


def _not_safetensors(path: Path) -> str:
    return (
        f"{path} is not a safetensors file (pickles can run code and are never loaded); convert it where you trust it, "
        'with torch: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "model.safetensors"), or load '
        "the model and call save_pretrained(..., safe_serialization=True)"
    )
