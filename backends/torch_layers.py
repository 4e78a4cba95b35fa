"""torch's layers with an adapter: one wrapper for all methods, with the names that PEFT's modules have.

`<layer>.base_layer` is the layer, and a method's array `lora_A` of the adapter `default` is the parameter
`<layer>.lora_A.default.weight`, or `<layer>.hada_w1_a.default` where a file has no `.weight` behind its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peftarray.backends.torch_quantised import QuantisedLinear
from torch import nn
from torch.nn import functional

from peftarray.adapted_weight import AdaptedWeight, adapted
from peftarray.adapter import Adapter
from peftarray.arrays import Array, namespace
from peftarray.errors import NumberError, UnsupportedError
from peftarray.layers import Kind, Layer, Window
from peftarray.method import AdapterConfig, Param
from peftarray.method_dropout import Dropout
from peftarray.methods import TrainableTokensConfig
from peftarray.quant.int8 import Int8Rows
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.stand_in import StandIn, kind_for
from peftarray.widened import Widened

__all__ = ["AdaptedLayer", "Arrays", "SavedModule", "TiedHead", "TokenRows", "base_weight", "layer_of"]

_FORWARDS = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding))
_NO_DROPOUT = Dropout()
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_of(name: str, module: Any, config: AdapterConfig) -> Layer | None:
    """What a method knows of a module, None where it is of no kind that methods adapt."""
    kind: Kind = "linear"
    flip, window = False, Window()
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
    elif _is_conv1d(module):
        shape, flip = tuple(module.weight.shape[::-1]), True
    elif isinstance(module, nn.Embedding):
        kind, flip = "embedding", config.embedding_transposed
        shape = (module.num_embeddings, module.embedding_dim)[:: -1 if flip else 1]
    elif isinstance(module, _CONVOLUTIONS):
        kind, shape, window = "conv", tuple(module.weight.shape), _window(module)
    else:
        return None
    has_bias = kind != "embedding" and module.bias is not None
    return Layer(name, kind, shape, flip, has_bias, window, str(module.weight.dtype).rpartition(".")[2])


def base_weight(module: Any, layer: Layer) -> Array:
    """The weight beside which an adapter is made; where the module stores it packed, one of zeros without memory.

    Raises:
        UnsupportedError: the weight is not loaded.
    """
    weight = module.weight
    if isinstance(weight, StandIn):
        return weight
    if weight.is_meta:
        message = f"the weight of {layer.name} is on the meta device; load the model's weights first"
        raise UnsupportedError(message)
    if _is_packed(module, layer):
        return torch.zeros((), device=weight.device).expand(layer.stored_shape)
    return weight.detach()


class Arrays(nn.Module):
    """Arrays by name: parameters where they are trained, buffers where not."""

    def put(self, name: str, array: torch.Tensor, row: Param, trainable: bool) -> None:
        """Hold an array under a name."""
        if row.frozen or not array.is_floating_point():
            self.register_buffer(name, array, persistent=row.stored)
        else:
            self.register_parameter(name, nn.Parameter(array, requires_grad=trainable))

    def extra_repr(self) -> str:
        arrays = {**self._parameters, **self._buffers}
        return ", ".join(f"{name}={tuple(array.shape)}" for name, array in arrays.items() if array is not None)


class AdaptedLayer(nn.Module):
    """A layer with an adapter.

    Attributes:
        base_layer: the layer.
        methods: name of an adapter -> its method, and what it knows of the layer.
        active: the name of the adapter that acts; None for none.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.methods: dict[str, tuple[AdapterConfig, Layer]] = {}
        self.active: str | None = None
        self._places: dict[str, tuple[tuple[str, Arrays, str], ...]] = {}
        self._ways: dict[str, str] = {}

    def add(self, name: str, adapter: Adapter, shared: Mapping[str, tuple[Arrays, str]]) -> None:
        """Hold an adapter under a name, and let it act.

        Args:
            name: of the adapter.
            adapter: with its arrays.
            shared: name of what layers share -> where it is held.
        """
        places = []
        for key, row in adapter.config.params(adapter.layer).items():
            if row.shared is not None:
                places.append((key, *shared[row.shared]))
                continue
            stem, _, last = (row.disk or key).partition(".")
            holder = self._child(self, stem)
            last, holder = (last, self._child(holder, name)) if last else (name, holder)
            holder.put(last, adapter.params[key], row, adapter.trainable)
            places.append((key, holder, last))
        self._places[name] = tuple(places)
        self.methods[name] = (adapter.config, adapter.layer)
        self._ways[name] = self._way(adapter.config, adapter.layer)
        self.active = name

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name, with the arrays that it has now."""
        method, layer = self.methods[name]
        return Adapter(method, layer, {key: getattr(holder, last) for key, holder, last in self._places[name]})

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """The layer's output, adapted."""
        base = self.base_layer
        if self.active is None:
            return base(x, *arguments, **options)
        adapter, way = self.adapter(self.active), self._ways[self.active]
        drop = _drop if self.training and adapter.config.dropout() != _NO_DROPOUT else None
        if way == "apart":
            y = base(x, *arguments, **options)
            bias = base.bias if "bias" in adapter.config.touches(adapter.layer) else None
            z = y + adapter.added(_widened(x), bias=bias, drop=drop)
            return z if z.dtype is y.dtype else z.to(y.dtype)
        if way == "instead":
            return adapter.forward(x, base.weight, bias=getattr(base, "bias", None), drop=drop)
        return torch.func.functional_call(base, self._effective(adapter), (x, *arguments), options)

    @property
    def weight(self) -> Any:
        """What stands for the effective weight, for modules that read the weight of another."""
        if self.active is None:
            return self.base_layer.weight
        return adapted(self.adapter(self.active), self.base_layer.weight)

    @property
    def bias(self) -> Any:
        """The effective bias."""
        base = getattr(self.base_layer, "bias", None)
        if self.active is None or base is None:
            return base
        return self.adapter(self.active).merge_bias(base, self.base_layer.weight)

    def merged(self, safe: bool) -> nn.Module:
        """The layer, with the adapter merged into it."""
        if self.active is not None:
            effective = self._effective(self.adapter(self.active))
            if isinstance(self.base_layer, QuantisedLinear):
                self.base_layer = self.base_layer.formed()
            for name, array in effective.items():
                if safe and not bool(torch.isfinite(array).all()):
                    where = self.methods[self.active][1].name
                    message = f"the {name} of {where} would hold NaN or infinity after merging; the adapter is broken"
                    raise NumberError(message)
            for name, array in effective.items():
                # A new parameter: another layer that shares the old one keeps it.
                setattr(self.base_layer, name, nn.Parameter(array.detach(), requires_grad=False))
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        """What this module has, or else what the layer has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={type(method).__name__}" for name, (method, _) in self.methods.items())

    def _way(self, method: AdapterConfig, layer: Layer) -> str:
        """How the layer's output is made: the update `"apart"` and added, the method's path `"instead"` of the layer's
        own, or the layer's own, which does what no method knows of, on the effective weight (`"within"`).
        """
        base = self.base_layer
        if isinstance(base, _CONVOLUTIONS):
            is_plain = base.padding_mode == "zeros" and not isinstance(base.padding, str)
        else:
            is_plain = not isinstance(base, nn.Embedding) or base.max_norm is None
        is_own = type(base).forward in _FORWARDS or isinstance(base.weight, StandIn)
        is_plain = is_plain and (is_own or _is_conv1d(base))
        is_packed = _is_packed(base, layer)
        if method.adds_apart() and (is_plain or is_packed):
            return "apart"
        if is_packed:
            message = (
                f"{layer.name}: {type(method).__name__} needs the weight, and this {type(base).__name__} stores it "
                "packed; use a method that adds to the output, such as LoRA"
            )
            raise UnsupportedError(message)
        # Hooks, such as those that move a model's inputs between devices, run with the layer.
        is_hooked = bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        return "instead" if is_plain and not is_hooked else "within"

    def _effective(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        touches, base = adapter.config.touches(adapter.layer), self.base_layer
        found = {}
        if "weight" in touches:
            found["weight"] = adapter.merge(base.weight)
        if "bias" in touches:
            found["bias"] = adapter.merge_bias(base.bias, base.weight).to(base.bias.dtype)
        return found

    @staticmethod
    def _child(parent: nn.Module, name: str) -> Arrays:
        children = dict(parent.named_children())
        if name not in children:
            parent.add_module(name, Arrays())
        return parent.get_submodule(name)  # type: ignore[return-value]


class TokenRows(nn.Module):
    """An embedding of which some rows are trained as they are, under PEFT's name for it."""

    def __init__(self, embedding: AdaptedLayer) -> None:
        super().__init__()
        self.token_adapter = embedding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, those that are trained in place of the base's."""
        return self.token_adapter(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "token_adapter":
                raise
            return getattr(self.token_adapter, name)


class TiedHead(nn.Module):
    """An output layer whose weight is an embedding's: the rows that the embedding trains are its rows too."""

    def __init__(self, base_layer: nn.Linear, rows: AdaptedLayer) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._rows = (rows,)  # in a tuple it is no child: its parameters belong to the embedding

    @property
    def embedding(self) -> Any:
        """The embedding that it is tied to."""
        return self._rows[0].base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores, those of the trained rows by the rows that are trained."""
        scores = self.base_layer(x)
        rows = self._rows[0]
        if rows.active is None:
            return scores
        adapter = rows.adapter(rows.active)
        assert isinstance(adapter.config, TrainableTokensConfig)
        places = torch.as_tensor(adapter.config.token_indices, device=x.device)
        mine = functional.linear(x, adapter.params["trainable_tokens_delta"].to(x.dtype))
        if self.base_layer.bias is not None:
            mine = mine + self.base_layer.bias[places]
        return scores.index_copy(-1, places, mine.to(scores.dtype))

    @property
    def weight(self) -> Any:
        return self._rows[0].weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class SavedModule(nn.Module):
    """A module that is trained whole, as a copy beside the one that the model came with."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the active copy makes."""
        return self.current(*arguments, **options)

    @property
    def current(self) -> nn.Module:
        """The module that acts."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.current, name)


def _prepare_kinds() -> None:
    """Make the kinds of stand-ins over tensors now: torch's compiler does not trace how a class is made."""
    plain, parameter = torch.zeros(1), nn.Parameter(torch.zeros(1))
    for arrays in ((plain,), (parameter,), (plain, parameter), (parameter, plain)):
        for kind in (Widened, AdaptedWeight, QuantisedWeight):
            namespace(object.__new__(kind_for(kind, *arrays)))
    some = torch.zeros((1, 2))
    quantised_weight(Int8Rows(), Int8Rows().quantize(some), (1, 2)).mT.after(some)


def _drop(x: torch.Tensor, share: float) -> torch.Tensor:
    return functional.dropout(x, share, training=True)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """What meets float32 parameters; under autocast, torch does what is needed by itself."""
    short = x.is_floating_point() and x.dtype.itemsize < 4
    return x.float() if short and not torch.is_autocast_enabled(x.device.type) else x


def _is_conv1d(module: Any) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is stored `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_packed(module: Any, layer: Layer) -> bool:
    weight = module.weight
    if isinstance(weight, StandIn):  # a method may compute with it
        return False
    return tuple(weight.shape) != layer.stored_shape or not bool(weight.is_floating_point())


def _window(module: Any) -> Window:
    padding = 0 if isinstance(module.padding, str) else tuple(module.padding)
    return Window(tuple(module.stride), padding, tuple(module.dilation), module.groups)


_prepare_kinds()
