"""Checkpoints of a training: everything that its next step depends on, in one file that is either whole or not there.

A file `step-00000120.safetensors` holds the arrays; its metadata hold the form of the tree around them as JSON. The two
newest files are kept.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.arrays import to_host
from peftarray.errors import ConfigError, FormatError, OutputError
from peftarray.stores.json_file import parse_json
from peftarray.stores.safetensors import SafetensorsFile, save_file

__all__ = ["Checkpoints"]

_KEPT = 2
_ARRAY = "__array__"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: is made if it is not there.
        setup: what has to be the same for a training to go on, by name.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, setup: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._setup = json.loads(json.dumps(setup))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"checkpoint_dir is {folder}, which cannot be a folder ({error.strerror}); give another"
            raise OutputError(message) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out.

        Raises:
            OutputError: one is in.
        """
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            message = f"another process trains with checkpoint_dir {self.folder}; wait for it, or give another folder"
            raise OutputError(message) from None
        finally:
            os.close(descriptor)

    def files(self) -> list[tuple[int, Path]]:
        """(steps done, file) of every checkpoint, the oldest first."""
        found = [(_NAME.fullmatch(file.name), file) for file in self.folder.iterdir()]
        return sorted((int(match[1]), file) for match, file in found if match)

    def save(self, step: int, content: Any) -> None:
        """Write a tree of arrays, lists, numbers and strings, and remove what is older than the one before.

        Raises:
            OutputError: it cannot be written.
        """
        arrays: dict[str, np.ndarray] = {}
        metadata = {"form": json.dumps(_packed(content, arrays)), "setup": json.dumps(self._setup)}
        try:
            save_file(arrays, self.folder / f"step-{step:08}.safetensors", metadata)
            _sync(self.folder)
            for _, file in self.files()[:-_KEPT]:
                file.unlink()
        except OSError as error:
            message = f"a checkpoint cannot be written to {self.folder} ({error.strerror}); make room and go on"
            raise OutputError(message) from None

    def load(self) -> Any:
        """The tree of the newest checkpoint, with NumPy's arrays; None where there is none.

        Raises:
            ConfigError: it is from a training with another set-up.
            FormatError: the file is damaged.
        """
        if not self.files():
            return None
        path = self.files()[-1][1]
        file = SafetensorsFile(path)
        try:
            setup, form = (parse_json(file.metadata[key].encode(), str(path)) for key in ("setup", "form"))
            self._check(setup, path)
            return _unpacked(form, lambda name: file.read(file.tensors[name]))
        except KeyError as error:
            message = f"{path} is no whole checkpoint ({error} is missing); remove it to go on from the one before"
            raise FormatError(message) from None
        finally:
            file.close()

    def _check(self, setup: Mapping[str, Any], path: Path) -> None:
        for name in sorted(setup.keys() | self._setup.keys()):
            then, now = setup.get(name), self._setup.get(name)
            if then != now:
                message = (
                    f"{path} is of a training with {name} {_short(then)}, and this one has {_short(now)}; give it the "
                    "same, or another checkpoint_dir"
                )
                raise ConfigError(message)


def _packed(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """JSON for a tree, whose arrays are put into `arrays`."""
    if isinstance(value, Mapping):
        return {key: _packed(inner, arrays) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(inner, arrays) for inner in value]
    if not hasattr(value, "dtype"):
        return value
    host = to_host(value)
    if not host.shape and host.dtype.kind in "iu":  # a step that was counted in a compiled function
        return int(host)
    name = str(len(arrays))
    arrays[name] = host
    return {_ARRAY: name}


def _unpacked(form: Any, read: Callable[[str], np.ndarray]) -> Any:
    if isinstance(form, list):
        return [_unpacked(inner, read) for inner in form]
    if not isinstance(form, dict):
        return form
    if form.keys() == {_ARRAY}:
        return read(form[_ARRAY])
    return {key: _unpacked(inner, read) for key, inner in form.items()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 200 else f"{words[:200]} ..."
