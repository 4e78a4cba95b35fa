"""What a model may be: a tree of arrays, an object that has one, or a module of a library's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftarray.arrays import Array
from peftarray.backend import backend_names, load_backend
from peftarray.errors import ConfigError

__all__ = ["backend_of_module", "model_type_of", "untied_heads", "weights_of"]


def weights_of(model: Any) -> Any:
    """The tree of arrays that a model is or has; None where it is a module of a library's own."""
    if isinstance(model, (Mapping, list, tuple)):
        return model
    weights = getattr(model, "weights", None)
    return weights if isinstance(weights, (Mapping, list, tuple)) else None


def model_type_of(model: Any) -> str | None:
    """The architecture, where the model says it."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def untied_heads(model: Any, weights: Any) -> dict[str, Array]:
    """name -> array of heads that are tied to an embedding, as a model knows, and part from it under these weights."""
    untied = getattr(model, "untied", None)
    return {} if untied is None else untied(weights)


def backend_of_module(model: Any) -> Any:
    """The backend that adapts modules of this type.

    Raises:
        ConfigError: there is none.
    """
    libraries = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    for name in backend_names():
        if name in libraries:
            backend = load_backend(name)
            if hasattr(backend, "adapt_module"):
                return backend
    message = (
        f"the model is a {type(model).__name__}; give a mapping of names to arrays, an object with such weights, or a "
        "torch.nn.Module"
    )
    raise ConfigError(message)
