"""What a law is tried on: a method on a layer, with the arrays of one library."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from peftarray import arrays
from peftarray.adapter import Adapter
from peftarray.arrays import Array
from peftarray.errors import ConfigError, PeftError, UnsupportedError
from peftarray.layers import Kind, Layer, Window
from peftarray.method import AdapterConfig

__all__ = ["Case", "LawError", "Library", "Trial", "find_libraries"]

_NAME = "block.0.proj"
# Rounding errors are allowed to be so many times the last bit of the largest number.
_ROUNDINGS = 4096


class LawError(AssertionError):
    """A law that does not hold."""


@dataclass(frozen=True)
class Case:
    """A configuration on a layer.

    Attributes:
        config: the method.
        kind: of the layer.
        shape: of its weight, as the model stores it.
        transposed: whether that is `(in, out)`.
        window: of a convolution; one of padding 1 if None.
        seed: of the values.
    """

    config: AdapterConfig
    kind: Kind = "linear"
    shape: tuple[int, ...] = (6, 10)
    transposed: bool = False
    window: Window | None = None
    seed: int = 0

    def __str__(self) -> str:
        own = [
            f"{item.name}={value}"
            for item in dataclasses.fields(self.config)
            if (value := getattr(self.config, item.name)) not in (item.default, None, {})
        ]
        size = "x".join(map(str, self.shape))
        return "-".join([self.config.peft_type.lower(), f"{self.kind}{'T' * self.transposed}{size}", *own]).replace(
            " ", ""
        )

    @property
    def layer(self) -> Layer:
        flip = self.transposed or (self.kind == "embedding" and self.config.embedding_transposed)
        window = self.window or (Window(padding=1) if self.kind == "conv" else Window())
        shape = self.shape[::-1] if flip else self.shape
        return Layer(_NAME, self.kind, shape, flip, bias=self.kind != "embedding", window=window)

    @property
    def method(self) -> AdapterConfig:
        return self.config.at(_NAME)

    def init(self, weight: Array, *, seed: int = 0) -> Adapter:
        """A new adapter beside `weight`."""
        window = self.layer.window
        return self.config.init(
            weight, seed=seed, name=_NAME, kind=self.kind, transposed=self.transposed, window=window
        )

    def weight(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 0]).standard_normal(self.shape)

    def inputs(self) -> np.ndarray:
        draw = np.random.default_rng([self.seed, 1])
        layer = self.layer
        if self.kind == "embedding":
            return draw.integers(0, self.shape[0], (2, 5))
        if self.kind == "conv":
            return draw.standard_normal((2, layer.shape[1] * layer.window.groups, *(5 for _ in layer.kernel)))
        return draw.standard_normal((2, 3, layer.shape[1]))

    def params(self) -> dict[str, np.ndarray]:
        """Parameters as if trained: every one that is trained is away from its first value."""
        draw = np.random.default_rng([self.seed, 2])
        table = {name: row for name, row in self.method.params(self.layer).items() if row.stored}
        try:
            start = self.init(self.weight()).params
        except UnsupportedError:  # only data can make the first values, and here any will do
            start = {name: np.zeros([n or 1 for n in row.shape]) for name, row in table.items()}
        made = {
            name: start[name] if row.frozen else draw.standard_normal(start[name].shape) * 0.5 + 0.1
            for name, row in table.items()
        }
        return made | self.method.derive(self.layer, made, self.layer.view(self.weight()))


@dataclass(frozen=True)
class Library:
    """An array library, as the suite uses it.

    Attributes:
        name: for messages.
        from_host: a NumPy array as one of its own.
        to_host: the way back.
    """

    name: str
    from_host: Callable[[np.ndarray], Array]
    to_host: Callable[[Array], np.ndarray] = arrays.to_host


def find_libraries(names: Sequence[str] | None = None) -> list[Library]:
    """The libraries of these names, as the backends announce them; all that are installed and work if None.

    Raises:
        ConfigError: a name has no backend.
    """
    points = {point.name: point for point in importlib.metadata.entry_points(group="peftarray.backends")}
    found = []
    for name in sorted(points, key=lambda name: (name != "numpy", name)) if names is None else names:
        if name not in points:
            message = f"there is no backend for {name!r}; there are {', '.join(sorted(points))}"
            raise ConfigError(message)
        try:
            backend = points[name].load()
            backend.from_host(np.zeros(1))
        except (ImportError, PeftError):  # not installed, or without its device
            if names is not None:
                raise
            continue
        found.append(Library(name, backend.from_host, backend.to_host))
    return found


@dataclass(frozen=True)
class Trial:
    """A case on a library.

    Attributes:
        case: the method and the layer.
        library: of the arrays.
        dtype: of arrays whose dtype the law does not choose; what the library makes of it.
    """

    case: Case
    library: Library
    dtype: type = np.float64

    @property
    def method(self) -> AdapterConfig:
        return self.case.method

    @property
    def layer(self) -> Layer:
        return self.case.layer

    def array(self, values: np.ndarray, dtype: type | None = None) -> Array:
        """Of this library; numbers that are not floating keep their dtype."""
        return self.library.from_host(values.astype(dtype or self.dtype) if values.dtype.kind == "f" else values)

    def weight(self, dtype: type | None = None) -> Array:
        return self.array(self.case.weight(), dtype)

    def matrix(self) -> Array:
        return self.layer.view(self.weight())

    def inputs(self, dtype: type | None = None) -> Array:
        return self.array(self.case.inputs(), dtype)

    def bias(self, dtype: type | None = None) -> Array | None:
        """None for an embedding, which has none."""
        return None if self.layer.kind == "embedding" else self.array(np.linspace(-1, 1, self.layer.out), dtype)

    def adapter(self, dtype: type | None = None) -> Adapter:
        """As if trained."""
        params = {name: self.array(values, dtype) for name, values in self.case.params().items()}
        return Adapter(self.method, self.layer, params)

    def host(self, array: Array) -> np.ndarray:
        return self.library.to_host(array)

    def equal(self, found: Array, wanted: Array, what: str) -> None:
        """Refuse two arrays that differ by more than rounding."""
        off, allowed = self._distance(found, wanted, what)
        if not off <= allowed:
            message = f"{what} by {off:.3g}, of which rounding explains {allowed:.3g}"
            raise LawError(message)

    def differ(self, found: Array, wanted: Array, what: str) -> None:
        """Refuse two arrays that differ by no more than rounding."""
        off, allowed = self._distance(found, wanted, what)
        if not off > allowed:
            message = f"{what} (they differ by {off:.3g}, and rounding explains {allowed:.3g})"
            raise LawError(message)

    def same_bits(self, found: Array, wanted: Array, what: str) -> None:
        """Refuse two arrays that differ at all."""
        one, other = self.host(found), self.host(wanted)
        if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
            message = f"{what}: {one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
            if one.shape == other.shape:
                message += f", off by {np.abs(one.astype(np.float64) - other.astype(np.float64)).max():.3g}"
            raise LawError(message)

    def _distance(self, found: Array, wanted: Array, what: str) -> tuple[float, float]:
        one, other = self.host(found), self.host(wanted)
        if one.shape != other.shape:
            message = f"{what}: their shapes are {one.shape} and {other.shape}"
            raise LawError(message)
        eps = max(float(np.finfo(side.dtype).eps) for side in (one, other))
        size = max(1.0, float(np.abs(other).max(initial=0)))
        # A NaN is at no distance that is allowed.
        return float(np.abs(one.astype(np.float64) - other).max(initial=0)), _ROUNDINGS * eps * size
