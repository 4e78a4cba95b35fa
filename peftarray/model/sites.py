"""Which weights of a model in memory a configuration adapts, and the adapters that training starts from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from peftarray.adapter import Adapter
from peftarray.arrays import Array, namespace
from peftarray.errors import ConfigError, MatchError, UnsupportedError, nearest
from peftarray.formats.models import input_embedding_names, is_conv1d, output_embedding_names
from peftarray.layers import Layer, Peers
from peftarray.method import AdapterConfig
from peftarray.methods import TrainableTokensConfig
from peftarray.prompts import VirtualTokens
from peftarray.targets import ends_with, is_saved, targeted

__all__ = [
    "TASK_HEADS",
    "TOKENS",
    "Site",
    "check_training",
    "choose",
    "find_sites",
    "heads_among",
    "input_embedding",
    "module_here",
    "placed",
    "saved_modules",
    "start_adapters",
    "start_tokens",
    "with_heads",
    "with_names",
]

TOKENS = ".token_adapter"
"""What PEFT puts behind the name of an embedding of which some rows are trained beside another method."""

Config = TypeVar("Config", AdapterConfig, VirtualTokens)

_OTHER_EMBEDDINGS = (
    *("wpe", "embed_positions", "position_embeddings", "token_type_embeddings"),
    "relative_attention_bias",
)
_HEADS_OF = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
TASK_HEADS = tuple(dict.fromkeys(name for names in _HEADS_OF.values() for name in names))
"""Output layers of models for tasks, by their names."""
# How the last word of a weight's name says what it is: torch's modules, and Flax's.
_TORCH, _FLAX, _FLAX_EMBEDDING = "weight", "kernel", "embedding"


@dataclass(frozen=True)
class Site:
    """A weight that an adapter may be on.

    Attributes:
        tensor: its name in the model.
        layer: what a method would know of it; `layer.name` is the module's.
        bias: the name of the array that is its bias; None where it has none.
    """

    tensor: str
    layer: Layer
    bias: str | None = None


def find_sites(
    arrays: Mapping[str, Array], config: AdapterConfig, layers: Mapping[str, Layer], model_type: str | None = None
) -> dict[str, Site]:
    """module -> its weight, for every array of a mapping that may be a layer's.

    `<module>.weight` is stored `(out, in)`, or as an embedding `(vocab, dim)` where the module has an embedding's name;
    Flax's `<module>.kernel` is `(in, out)`, and `<module>.embedding` an embedding. Any other matrix is a module of its
    own name. Where the mapping does not tell, the architecture does if `model_type` names a known one, then the
    configuration's `fan_in_fan_out`; `layers` outranks all.

    Raises:
        MatchError: `layers` names a module that is not there.
    """
    found = {}
    for tensor, array in arrays.items():
        site = _site(tensor, array, config, layers, model_type)
        if site is not None:
            bias = f"{site.layer.name}.bias"
            has_bias = bias in arrays and tensor != site.layer.name
            layer = replace(site.layer, bias=has_bias, dtype=str(array.dtype).rpartition(".")[2])
            found[layer.name] = Site(tensor, layer, bias if has_bias else None)
    for module in layers:
        if module not in found:
            message = f"layers names {module}, which has no weight of that kind here{nearest(module, found)}"
            raise MatchError(message)
    return found


def _site(
    tensor: str, array: Array, config: AdapterConfig, layers: Mapping[str, Layer], model_type: str | None
) -> Site | None:
    head, _, last = tensor.rpartition(".")
    named = head and last in (_TORCH, _FLAX, _FLAX_EMBEDDING)
    module = head if named else tensor
    shape = tuple(array.shape)
    if not hasattr(array, "dtype") or len(shape) < 2 or not namespace(array).isdtype(array.dtype, "real floating"):
        return None
    if module in layers:
        return Site(tensor, replace(layers[module], name=module))
    tables = (*input_embedding_names(model_type), *_OTHER_EMBEDDINGS)
    is_embedding = last == _FLAX_EMBEDDING or (last == _TORCH and ends_with(module, tables))
    if named and is_embedding and len(shape) == 2:
        flip = config.embedding_transposed
        return Site(tensor, Layer(module, "embedding", shape[::-1] if flip else shape, transposed=flip))
    if len(shape) == 2:
        known = is_conv1d(model_type, module)
        flip = last == _FLAX or (config.stored_in_out() if known is None else known)
        return Site(tensor, Layer(module, "linear", shape[::-1] if flip else shape, transposed=flip))
    # Flax stores its other kernels with the axes in another order, and a bare array is no convolution.
    return Site(tensor, Layer(module, "conv", shape)) if named and last == _TORCH and len(shape) <= 5 else None


def choose(sites: Mapping[str, Layer], config: AdapterConfig, heads: Iterable[str] = ()) -> list[str]:
    """The modules among `sites` that a configuration adapts.

    Raises:
        ConfigError: the method has no meaning on the kind of a module that is targeted.
        MatchError: nothing is targeted, or an item of the list names nothing.
        UnsupportedError: the configuration asks for what cannot be trained here.
    """
    if config.parameters_adapted():
        message = (
            f"{type(config).__name__}.target_parameters is set; fused experts are merged here (pa.merge), not trained: "
            "name modules in target_modules"
        )
        raise UnsupportedError(message)
    wanted = config.target_modules
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    names = [name for name, layer in sites.items() if not everything or layer.kind == "linear"]
    found = targeted(names, config, set(heads))
    for item in () if wanted is None or isinstance(wanted, str) else wanted:
        if not any(ends_with(name, [item]) for name in sites):
            message = (
                f"{type(config).__name__}.target_modules names {item!r}, which matches none of {len(sites)} modules"
                f"{nearest(item, sites)}"
            )
            raise MatchError(message)
    for name in found:
        kind, kinds = sites[name].kind, config.at(name).kinds
        if kind not in kinds:
            message = f"{name}: {type(config).__name__} has no meaning on {kind} layers; allowed are {', '.join(kinds)}"
            raise ConfigError(message)
    return found


def with_names(config: AdapterConfig, chosen: Iterable[str]) -> AdapterConfig:
    """The configuration with the names of modules in place of `"all-linear"`, which others may read otherwise."""
    wanted = config.target_modules
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    return replace(config, target_modules=sorted(chosen)) if everything else config


def heads_among(modules: Iterable[str]) -> set[str]:
    """Output layers, by the names that they have in known architectures."""
    return {name for name in modules if ends_with(name, output_embedding_names(None))}


def module_here(path: str, modules: Collection[str]) -> str:
    """The module of a model that a file calls `path`: those with a head have a prefix before the names of others.

    A path may end in `TOKENS`, and so does then what is returned.

    Raises:
        MatchError: no module is meant, or several may be.
    """
    plain = path.removesuffix(TOKENS)
    found = [plain] if plain in modules else [m for m in modules if ends_with(plain, [m]) or ends_with(m, [plain])]
    if len(found) != 1:
        message = f"the adapter is on {plain}, which {len(found)} modules of the model may be{nearest(plain, modules)}"
        raise MatchError(message)
    return found[0] + path[len(plain) :]


def input_embedding(modules: Iterable[str]) -> str | None:
    """The module among these that has an input embedding's name, the likeliest; None where none has."""
    known = list(modules)
    for name in input_embedding_names(None):
        found = [module for module in known if ends_with(module, [name])]
        if found:
            return min(found, key=lambda module: (module.count("."), module))
    return None


def with_heads(config: Config, modules: Iterable[str]) -> Config:
    """The configuration with the heads in `modules_to_save` that a task's models start from noise, as PEFT has it."""
    known = {name.rpartition(".")[2] for name in modules}
    heads = [name for name in _HEADS_OF.get(config.task_type or "", ()) if name in known]
    listed: list[str] = list(config.modules_to_save or ())
    missing: list[str] = [name for name in heads if name not in listed]
    return replace(config, modules_to_save=[*listed, *missing]) if missing else config


def saved_modules(modules: Iterable[str], config: AdapterConfig | VirtualTokens, *, strict: bool = True) -> list[str]:
    """The modules among these that `modules_to_save` names, without what lies within them.

    Raises:
        MatchError: an item names nothing, and `strict`.
    """
    known = [name for name in modules if name]
    for item in (config.modules_to_save or ()) if strict else ():
        if not any(f".{item}." in f".{name}." for name in known):
            message = f"modules_to_save names {item!r}, which is none of {len(known)} modules{nearest(item, known)}"
            raise MatchError(message)
    found = [name for name in known if is_saved(name, config)]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def check_training(config: AdapterConfig) -> None:
    """Refuse a configuration that cannot be trained as it says.

    Raises:
        UnsupportedError: with the reason.
    """
    reason = config.why_not_trainable()
    if reason is not None:
        raise UnsupportedError(reason)


def placed(layers: Iterable[Layer], config: AdapterConfig) -> dict[str, tuple[AdapterConfig, Layer]]:
    """module -> the method that is resolved for it, and its layer, which knows the others where the method asks."""
    known = list(layers)
    peers = Peers(known)
    found = {}
    for layer in known:
        method = config.at(layer.name)
        found[layer.name] = method, replace(layer, peers=peers) if method.reads_peers else layer
    return found


def start_adapters(
    layers: Iterable[Layer], config: AdapterConfig, weight: Callable[[str], Array], seed: int
) -> dict[str, Adapter]:
    """module -> a new adapter for each layer, beside its weight. What layers share is made once.

    Args:
        layers: of the adapted modules.
        config: with targets and patterns.
        weight: module's name -> its weight, as the model stores it.
        seed: of all draws.

    Raises:
        MatchError: the method changes a bias that a layer does not have.
    """
    shared: dict[str, Array] = {}
    made = {}
    for name, (method, layer) in placed(layers, config).items():
        if "bias" in method.touches(layer) and not layer.bias:
            message = f"{name}: {type(config).__name__} changes the bias, and this layer has none; leave it out"
            raise MatchError(message)
        table = method.params(layer)
        given = {key: shared[row.shared] for key, row in table.items() if row.shared in shared}
        params = method.init_params(layer, weight(name), seed, given=given)
        shared |= {row.shared: params[key] for key, row in table.items() if row.shared is not None}
        made[name] = Adapter(method, layer, {key: params[key] for key in table})
    return made


def start_tokens(
    sites: Mapping[str, Layer],
    config: AdapterConfig,
    weight: Callable[[str], Array],
    *,
    chosen: Iterable[str],
    embedding: str | None = None,
) -> dict[str, Adapter]:
    """`<module>.token_adapter` -> an adapter for the rows of embeddings that a configuration trains as they are.

    Args:
        sites: module -> its layer.
        config: which may name rows.
        weight: module's name -> its weight.
        chosen: the modules that the method itself is on.
        embedding: the module of the input embedding; by its name if None.

    Raises:
        ConfigError: rows are named of a module that the method is on.
        MatchError: rows are named, and no embedding is theirs.
    """
    inputs = embedding if embedding is not None else input_embedding(sites)
    made: dict[str, Adapter] = {}
    if config.peft_type == TrainableTokensConfig.peft_type:
        return made
    for name in sites:
        rows = config.token_rows(name, is_input=name == inputs)
        if rows and name in set(chosen):
            message = (
                f"{name} is targeted, and trainable_token_indices names rows of it; train it one way (target_modules "
                "without it, or no rows)"
            )
            raise ConfigError(message)
        if rows:
            array = weight(name)
            method = TrainableTokensConfig(token_indices=list(rows)).at(name)
            layer = Layer(name, "embedding", tuple(array.shape), dtype=sites[name].dtype)
            made[name + TOKENS] = Adapter(method, layer, method.init_params(layer, array, 0))
    named = config.token_rows("", is_input=True)
    if named and not made:
        message = (
            f"{type(config).__name__}.trainable_token_indices names rows {list(named)[:4]}, and no input embedding is "
            f"among {len(sites)} modules{nearest('embed_tokens', sites)}; give a mapping from its name to the rows"
        )
        raise MatchError(message)
    return made
