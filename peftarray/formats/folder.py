"""The folder that PEFT keeps an adapter in: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.errors import OutputError
from peftarray.stores.safetensors import save_file

__all__ = ["check_new", "usable_name", "write_folder"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_new(target: Path, *, written: bool = True) -> None:
    """Refuse an OUT that exists, or that cannot be made; nothing is `written` in a dry run.

    Raises:
        OutputError: with what to do.
    """
    with usable_name(target):
        if target.exists() or target.is_symlink():
            message = f"OUT {target} exists; give a new folder, or remove it first"
            raise OutputError(message)
        if not target.parent.is_dir():
            message = f"OUT {target}: the folder {target.parent} does not exist; make it first"
            raise OutputError(message)
        if written and not os.access(target.parent, os.W_OK | os.X_OK):
            message = f"OUT {target}: no permission to write in {target.parent}; choose another place"
            raise OutputError(message)


@contextmanager
def usable_name(target: Path) -> Iterator[None]:
    """For questions about OUT: a name that no folder can have is an OutputError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null character
        why = getattr(error, "strerror", None) or error
        message = f"OUT {str(target)[:200]} cannot be a folder ({why}); give another name"
        raise OutputError(message) from None


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write an adapter's configuration and arrays: at no time are there those of two adapters.

    Both files are complete on the disk before either gets its name; without a configuration there is no adapter.

    Raises:
        OutputError: the folder cannot be written.
    """
    staged = {name: folder / f"{name}.new" for name in (_WEIGHTS, _CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, staged[_WEIGHTS])
        with staged[_CONFIG].open("w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (folder / _CONFIG).unlink(missing_ok=True)
        for name, path in staged.items():
            path.replace(folder / name)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        message = f"{folder} cannot be written ({error.strerror}); check the place, its permissions and the room there"
        raise OutputError(message) from None
