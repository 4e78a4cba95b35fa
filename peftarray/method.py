"""The protocol: a method is a map from a frozen weight to an effective weight, in two stages.

`prepare(p, layer)` runs once a layer on the whole parameters. `weight(p, w, layer)` takes what it returned and `w`, the
`(out, fan_in)` matrix of the layer *or any tile of it* along the axes that `tiles` declares. Laws that every method
keeps (`peftarray.testing` and tests/laws check them):

- For every axis in `tiles`: cut and concatenated equals whole, at multiples of `granularity`. Along an axis that is not
  declared, cutting fails or differs.
- `apply` equals the effective weight applied to `x`.
- `params(layer)` describes exactly what `init_params` makes and what a file must hold.
- A configuration is a value: frozen, compared by its fields; `at(name)` is hashable.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from peftarray import patterns
from peftarray.adapter import Adapter
from peftarray.arrays import Array, Params, constant, wide
from peftarray.errors import ConfigError, MatchError, ShapeError, UnsupportedError, nearest
from peftarray.layers import Kind, Layer, Window, contract
from peftarray.method_dropout import Dropout
from peftarray.random import Draw
from peftarray.settings import boolean, check_settings, indices, name_list, names, setting, text

__all__ = ["AdapterConfig", "Param"]

_AXIS = re.compile(r"\d*(out|in)(/\w+)?")
# What says where an adapter goes, or where it came from, and not what it computes: `at(name)` puts it to its default.
_ADDRESS = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules modules_to_save layers_to_transform layers_pattern target_parameters trainable_token_indices"
).split()


@dataclass(frozen=True)
class Param:
    """One row of a method's table: one array.

    Attributes:
        axes: a word an axis: `"out r"`, `"r in"`, `"out/v r"`, `"2out"`. Words with `out` or `in` follow that axis of
            the weight, in proportion; the others are the array's own.
        shape: its shape; None where the file decides.
        init: makes its first values from (seed, stream name, shape); None where a file must bring it.
        frozen: not trained.
        shared: the name that layers share it under, None where each layer has its own.
        stored: whether a file holds it; if not, `derive` makes it.
        disk: its name in PEFT's files where that is not its name here: `"lora_A.weight"`, `"lora_embedding_A"`.
    """

    axes: str
    shape: tuple[int | None, ...]
    init: Draw | None = None
    frozen: bool = False
    shared: str | None = None
    stored: bool = True
    disk: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """A method with its hyper-parameters; `adapter_config.json` is its serialised form.

    Subclasses are frozen dataclasses with PEFT's class and field names, and are final.
    """

    peft_type: ClassVar[str]
    patterns: ClassVar[Mapping[str, str]] = {}
    """Field of per-module overrides -> the field that it overrides, such as `{"rank_pattern": "r"}`."""
    prepared: ClassVar[Mapping[str, str]] = {}
    """The axes of what `prepare` adds, under names that no parameter has."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Tensors in a file that begin with one of these play no part in the effective weight."""
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
    reads_peers: ClassVar[bool] = False
    """Whether its arrays depend on which other layers the adapter is on, so that `layer.peers` must hold them."""
    embedding_transposed: ClassVar[bool] = False
    """Whether the method sees an embedding `(vocab, dim)` as the linear map `(dim, vocab)`."""

    task_type: str | None = setting(None, text)
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = setting(None, text)
    base_model_name_or_path: str | None = setting(None, text)
    revision: str | None = setting(None, text)
    inference_mode: bool = setting(False, boolean)
    target_modules: str | list[str] | tuple[str, ...] | None = setting(None, names)
    exclude_modules: str | list[str] | tuple[str, ...] | None = setting(None, names)
    modules_to_save: list[str] | tuple[str, ...] | None = setting(None, name_list)
    layers_to_transform: int | list[int] | tuple[int, ...] | None = setting(None, indices)
    layers_pattern: str | list[str] | tuple[str, ...] | None = setting(None, names)

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            message = f"{type(self).__name__}.layers_to_transform needs target_modules as a list; it is a pattern"
            raise ConfigError(message)
        if self.layers_pattern and self.layers_to_transform is None:
            message = (
                f"{type(self).__name__}.layers_pattern is {self.layers_pattern!r} without layers_to_transform; "
                "set both or neither"
            )
            raise ConfigError(message)

    # What a method defines.

    @property
    @abstractmethod
    def tiles(self) -> str:
        """The axes along which `weight` may be cut: `"out in"`, `"out"`, `"in"` or `""`."""

    @abstractmethod
    def params(self, layer: Layer) -> dict[str, Param]:
        """The table: every array of this method on a layer."""

    def derive(self, layer: Layer, p: Params, w: Array) -> dict[str, Array]:
        """Arrays that a file may leave out: from a seed, from `layer.peers`, or from the base weight `w`.

        Args:
            layer: the layer.
            p: the arrays that are there.
            w: the base weight; without rows where `reads_base` is false, and what it is made of counts all the same.
        """
        return {}

    def reads_base(self, layer: Layer) -> bool:
        """Whether `derive` needs the whole base weight."""
        return False

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        """What `weight` needs, computed once from the whole parameters; differentiable."""
        return dict(p)

    def needs_base(self) -> bool:
        """Whether the update depends on the weight that it is added to; `update` takes None for it if not."""
        return True

    def product(self, p: Params, layer: Layer) -> tuple[Array, Array] | None:
        """`up (out, r)` and `down (r, fan_in)` whose product is the update, from the raw parameters; None without."""
        return None

    @abstractmethod
    def update(self, p: Params, w: Array | None, layer: Layer) -> Array:
        """`weight(p, w, layer) - w`. `w` may be None where not `needs_base()`."""

    @abstractmethod
    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        """The effective weight: `p` prepared (and cut), `w` the matrix or a tile of it."""

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        """Put `weight(p, w, layer)` in the place of `w`; better without a second array of that size."""
        w[...] = self.weight(p, w, layer)

    def effective_bias(self, p: Params, b: Array, w: Array | None, layer: Layer) -> Array:
        """The effective bias from the raw parameters."""
        return b

    def touches(self, layer: Layer) -> tuple[str, ...]:
        """What changes: `"weight"`, `"bias"` or both."""
        return ("weight",)

    def grain(self, layer: Layer) -> int:
        """Rows that must stay together beyond what the axes say."""
        return 1

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        """The weight that `weight(p, ., layer)` made `w` from, to rounding.

        Raises:
            UnsupportedError: the map has no inverse; keep the base.
        """
        message = (
            f"{type(self).__name__} cannot be unmerged from the merged weight alone; keep a copy of the base weight"
        )
        raise UnsupportedError(message)

    @abstractmethod
    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        """The layer's output without bias, from the prepared parameters: `x` through the effective weight."""

    def apply_update(self, p: Params, x: Array, w: Array | None, layer: Layer) -> Array:
        """What the update adds to the layer's output: `apply` less the base's. `w` may be None where `adds_apart()`."""
        assert w is not None
        return self.apply(p, x, w, layer) - contract(x, w, layer)

    def adds_apart(self) -> bool:
        """Whether `apply_update` needs no weight: the layer itself may then make the base's output, in its own way."""
        return False

    def dropout(self) -> Dropout:
        """What training leaves out at random."""
        return Dropout()

    @property
    def scale(self) -> float:
        """What the product or sum that makes the update is multiplied by."""
        return 1.0

    @property
    def starts_as_identity(self) -> bool:
        """Whether `init` makes an adapter that leaves the weight as it is, but for rounding."""
        return True

    # What a reader of files asks; the answers are facts about the configuration.

    def why_not_mergeable(self) -> str | None:
        """Why no effective weight follows from a file with this configuration and the base; None where it does."""
        return None

    def why_not_trainable(self) -> str | None:
        """Why training with this configuration would not be what it says; None where it is."""
        return None

    def trained_biases(self) -> str:
        """Which of the model's biases are trained as well: `"none"`, `"all"`, or those of `"adapted"` layers."""
        wanted = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}.get("bias", "none")
        return wanted if wanted in ("none", "all") else "adapted"

    def stored_in_out(self) -> bool:
        """Whether the configuration says that linear weights are stored `(in, out)`."""
        return False

    def keeps_tied(self) -> bool:
        """Whether a tied head follows the input embedding's adapter."""
        return False

    def parameters_adapted(self) -> tuple[str, ...]:
        """Ends of names of stacked parameters that are adapted, such as fused experts."""
        return ()

    def token_rows(self, name: str, *, is_input: bool) -> tuple[int, ...]:
        """Rows of the embedding called `name` that the adapter's file replaces."""
        return ()

    def applied_twice(self) -> Self:
        """This method with twice its update.

        Raises:
            UnsupportedError: the update cannot be scaled.
        """
        message = f"{type(self).__name__} on the output projection of torch's MultiheadAttention is not supported"
        raise UnsupportedError(message)

    # What follows for every method.

    def at(self, name: str) -> Self:
        """This method for the module called `name`: patterns resolved, targets gone, hashable."""
        return dataclasses.replace(self, **self.resolved(name))

    def resolved(self, name: str) -> dict[str, Any]:
        """The fields of `at(name)` that differ from this configuration's."""
        known = {item.name: item for item in dataclasses.fields(self)}
        changes: dict[str, Any] = {field: known[field].default for field in _ADDRESS if field in known}
        for pattern_field, target in self.patterns.items():
            changes[pattern_field] = None
            for pattern, value in (getattr(self, pattern_field) or {}).items():
                if patterns.match(rf"(.*\.)?({pattern})$", name, pattern_field):
                    changes[target] = value
                    break
        return changes

    def axes(self, layer: Layer) -> dict[str, str]:
        """name -> axes of every array that `weight` may see."""
        return {name: param.axes for name, param in self.params(layer).items()} | dict(self.prepared)

    def cut(self, p: Params, layer: Layer, axis: str, start: int, stop: int) -> dict[str, Array]:
        """The prepared parameters of rows (`axis="out"`) or columns (`"in"`) `start:stop` of the weight.

        Every array axis that follows `axis` is sliced in proportion to its length.
        """
        return self.cutter(p, layer, axis)(start, stop)

    def cutter(self, p: Params, layer: Layer, axis: str) -> Callable[[int, int], dict[str, Array]]:
        """`cut` for many tiles of one layer: which axes follow is looked up once."""
        size = layer.out if axis == "out" else layer.fan_in
        table = self.axes(layer)
        plan = [
            (name, array, [n if _follows(word, axis) else 0 for word, n in zip(words, array.shape, strict=True)])
            for name, array, words in ((name, array, table[name].split()) for name, array in p.items())
        ]

        def cut(start: int, stop: int) -> dict[str, Array]:
            return {
                name: array[tuple(slice(start * n // size, stop * n // size) if n else slice(None) for n in lengths)]
                if any(lengths)
                else array
                for name, array, lengths in plan
            }

        return cut

    def granularity(self, p: Params, layer: Layer, axis: str) -> int:
        """Cuts along `axis` must fall on multiples of this."""
        size = layer.out if axis == "out" else layer.fan_in
        table = self.axes(layer)
        lengths = [
            array.shape[i]
            for name, array in p.items()
            for i, word in enumerate(table[name].split())
            if _follows(word, axis)
        ]
        steps = [size // math.gcd(size, length) for length in lengths]
        return math.lcm(*steps, self.grain(layer) if axis == "out" else 1)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], layer: Layer) -> None:
        """Check what a file holds for a layer against the table.

        Raises:
            ConfigError: the method has no meaning on this kind of layer.
            MatchError: an array is missing or left over.
            ShapeError: an array has another shape.
        """
        if layer.kind not in self.kinds:
            message = (
                f"{layer.name}: {type(self).__name__} has no meaning on {layer.kind} layers; allowed are "
                f"{', '.join(self.kinds)}"
            )
            raise ConfigError(message)
        table = self.params(layer)
        for name, shape in shapes.items():
            if name not in table:
                message = (
                    f"{layer.name}: the adapter tensor {name} has no place in {type(self).__name__} with this "
                    f"configuration{nearest(name, table)}"
                )
                raise MatchError(message)
            wanted = table[name].shape
            if len(shape) != len(wanted) or any(w not in (None, n) for w, n in zip(wanted, shape, strict=True)):
                words = ", ".join(
                    f"{axis}={size}" for axis, size in zip(table[name].axes.split(), wanted, strict=False)
                )
                message = (
                    f"{layer.name}: {name} is {tuple(shape)}; this layer with this configuration wants ({words}); "
                    "check r, the patterns and the base"
                )
                raise ShapeError(message)
        missing = [name for name, param in table.items() if param.stored and name not in shapes]
        if missing:
            message = (
                f"{layer.name}: the adapter lacks {', '.join(missing)}; {type(self).__name__} with this "
                "configuration needs it"
            )
            raise MatchError(message)

    def num_parameters(self, layer: Layer) -> int:
        """How many trained numbers this method has on a layer, without allocating any."""
        return sum(math.prod(n or 0 for n in param.shape) for param in self.params(layer).values() if not param.frozen)

    def init_params(self, layer: Layer, like: Array, seed: int, *, given: Params | None = None) -> dict[str, Array]:
        """First values of every parameter, beside `like` (its library, device and dtype, at least float32).

        Args:
            layer: the layer.
            like: its weight.
            seed: of all draws.
            given: arrays that are there already, such as those that layers share.
        """
        made = dict(given or {})
        for name, param in self.params(layer).items():
            if param.init is None or None in param.shape or name in made:
                continue
            shape = tuple(n or 0 for n in param.shape)
            stream = param.shared or f"{layer.name}/{name}"
            made[name] = constant(param.init(seed, stream, shape), wide(like))
        return made | self.derive(layer, made, layer.view(like))

    def init(
        self,
        weight: Array,
        *,
        seed: int = 0,
        name: str = "",
        kind: Kind | None = None,
        transposed: bool = False,
        window: Window | None = None,
    ) -> Adapter:
        """An adapter for one weight, beside it: same library and device, at least float32.

        Args:
            weight: `(out, in)`, `(out, in / groups, *kernel)`, an embedding `(vocab, dim)`, or `(in, out)` if
                `transposed`.
            seed: the same seed and name give the same values on every library.
            name: the module's name, which patterns see.
            kind: `"linear"`, `"embedding"` or `"conv"`; by the number of axes if None.
            transposed: the weight is stored `(in, out)`.
            window: stride, padding, dilation and groups of a convolution.

        Example:
            >>> import numpy as np
            >>> from peftarray import LoraConfig
            >>> adapter = LoraConfig(r=2).init(np.ones((4, 3), np.float32))
            >>> adapter.num_parameters()
            14
        """
        kind = kind or ("linear" if weight.ndim == 2 else "conv")
        flipped = transposed or (kind == "embedding" and self.embedding_transposed)
        shape = tuple(weight.shape)[::-1] if flipped else tuple(weight.shape)
        dtype = str(weight.dtype).rpartition(".")[2]
        layer = Layer(name, kind, shape, flipped, window=window or Window(), dtype=dtype)
        method = self.at(name)
        if kind not in method.kinds:
            message = f"{type(self).__name__} has no meaning on {kind} layers; allowed are {', '.join(self.kinds)}"
            raise ConfigError(message)
        return Adapter(method, layer, method.init_params(layer, weight, seed))


def _follows(word: str, axis: str) -> bool:
    found = _AXIS.fullmatch(word)
    return found is not None and found.group(1) == axis
