"""Models with quantised weights: which weights of a model a codec stores, and the same model with those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peftarray import trees
from peftarray.arrays import Array
from peftarray.errors import ConfigError, MatchError, ShapeError, nearest
from peftarray.formats.models import input_embedding_names
from peftarray.methods import LoraConfig
from peftarray.model.bases import backend_of_module, model_type_of, weights_of
from peftarray.model.sites import TASK_HEADS, find_sites, heads_among
from peftarray.quant import Codec, codec_of
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.targets import ends_with

__all__ = ["Choice", "quantize"]


class Choice:
    """Which weights are quantised, and how: settings that are checked once and asked for every weight.

    Attributes:
        codec: of linear layers.
        skip: names of modules, or ends of names, that stay as they are.
        embeddings: of the input embedding; None where it stays as it is.
        codecs: names of modules, or ends of names -> the codec of those linear layers in place of `codec`.
    """

    def __init__(
        self,
        codec: str | Codec,
        *,
        skip: Iterable[str] = (),
        embeddings: str | Codec | None = None,
        codecs: Mapping[str, str | Codec] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(skip, str):
            message = f"skip is {skip!r}; it must be a list of names of modules, or of ends of names"
            raise ConfigError(message)
        self.codec = codec_of(codec, **settings)
        self.skip = tuple(skip)
        self.embeddings = None if embeddings is None else codec_of(embeddings)
        self.codecs = {item: codec_of(other) for item, other in (codecs or {}).items()}

    def among(self, shapes: Mapping[str, tuple[int, ...]], model_type: str | None = None) -> dict[str, Codec]:
        """name of a weight -> its codec, for those that are quantised.

        Linear layers are, but for output layers: heads of language models and of tasks. A tied head is its embedding.

        Args:
            shapes: name -> shape of every floating array of the model.
            model_type: the architecture, where it is known.

        Raises:
            MatchError: an item of `skip` or `codecs` names nothing, or nothing is left.
        """
        # What a layer is follows from names and shapes; an array of them that takes no memory will do.
        arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        sites = find_sites(arrays, LoraConfig(), {}, model_type)
        for item in self.skip:
            if not any(_names(item, module) for module in sites):
                message = f"skip names {item!r}, which is none of {len(sites)} modules{nearest(item, sites)}"
                raise MatchError(message)
        linear = [module for module, site in sites.items() if site.layer.kind == "linear"]
        for item in self.codecs:
            if not any(_names(item, module) for module in linear):
                message = f"codecs names {item!r}, which is none of {len(linear)} linear layers{nearest(item, linear)}"
                raise MatchError(message)
        heads = heads_among(sites)
        found: dict[str, Codec] = {}
        for module, site in sites.items():
            if any(_names(item, module) for item in self.skip) or module in heads:
                continue
            if site.layer.kind == "linear" and not ends_with(module, TASK_HEADS):
                own = [other for item, other in self.codecs.items() if _names(item, module)]
                found[site.tensor] = own[-1] if own else self.codec
            elif self.embeddings is not None and ends_with(module, input_embedding_names(model_type)):
                found[site.tensor] = self.embeddings
        if not found:
            message = f"none of {len(shapes)} arrays is the weight of a linear layer that is not skipped; name others"
            raise MatchError(message)
        return found


def _names(item: str, module: str) -> bool:
    """Whether an item of a setting is the name of a module, an end of it, or of what it is in."""
    return f".{item}." in f".{module}."


def quantize(
    model: Any,
    codec: str | Codec = "nf4",
    *,
    skip: Iterable[str] = (),
    embeddings: str | Codec | None = None,
    codecs: Mapping[str, str | Codec] | None = None,
    **settings: Any,
) -> Any:
    """The same model with the weights of its linear layers quantised.

    Embeddings, output layers, norms, convolutions and biases stay as they are. Adapters go on top of it as on any
    model: `get_peft_model(quantize(model), config)`.

    Args:
        model: a mapping of names to arrays, or nested ones; an object with such `weights`, as those of
            `peftarray.models`; or a `torch.nn.Module`, whose layers are replaced in place.
        codec: how, by a name of `peftarray.quant.CODECS` or as a codec.
        skip: modules that stay as they are, by their names or ends of names, such as `["o_proj"]`.
        embeddings: the codec of the input embedding, and so of a head that is tied to it; as it is if None.
        codecs: linear layers that have another codec, by their names or ends of names: `{"v_proj": "int8"}`. Of several
            that fit, the last one counts.
        **settings: of the codec, where it is a name.

    Returns:
        The model in its own form, with a `QuantisedWeight` in place of each such array. What is quantised already stays
        so.

    Raises:
        ConfigError: the codec has no such setting, or the model is of no kind that is known.
        MatchError: `skip` or `codecs` names nothing, or nothing is left to quantise.
        NumberError: a weight holds NaN or infinity.
        ShapeError: a weight cannot be stored so; skip its module, or choose another block.

    Example:
        >>> import numpy as np
        >>> weights = {"up.weight": np.ones((8, 64), np.float32), "norm.weight": np.ones(64, np.float32)}
        >>> quantize(weights, "nf4", double=False)["up.weight"]
        QuantisedWeight(NormalFloat(block=64, double=False), (8, 64), float32)
    """
    choice = Choice(codec, skip=skip, embeddings=embeddings, codecs=codecs, **settings)
    tree = weights_of(model)
    if tree is None:
        return backend_of_module(model).quantize_module(model, choice)
    arrays = dict(trees.named(tree))
    shapes = {name: tuple(array.shape) for name, array in arrays.items() if is_plain(array)}
    chosen = choice.among(shapes, model_type_of(model))
    weights = trees.refill(
        tree,
        [quantised(name, array, chosen[name]) if name in chosen else array for name, array in arrays.items()],
    )
    return weights if model is tree else replace(model, weights=weights)


def quantised(name: str, array: Array, codec: Codec) -> QuantisedWeight:
    """An array as the parts of a codec, in its place.

    Raises:
        NumberError, ShapeError: it cannot be; the message names it.
    """
    try:
        return quantised_weight(codec, codec.quantize(array), tuple(array.shape), array.dtype)
    except ShapeError as error:
        message = f"{name}: {error}; skip it, or choose other settings"
        raise ShapeError(message) from None


def is_plain(array: Any) -> bool:
    """Whether it is an array of floating numbers, and nothing that stands in for one."""
    return hasattr(array, "dtype") and not isinstance(array, QuantisedWeight) and "float" in str(array.dtype)
