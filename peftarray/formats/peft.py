"""Adapters as Hugging Face PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.

One rule reads every key: split it at the longest prefix that is a module of the base; what remains is a name in the
method's table, or the name of a tensor of that module, which the adapter then replaces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftarray.errors import ConfigError, FormatError, MatchError, ShapeError, UnsupportedError, nearest
from peftarray.formats.adapters import Adapters, Ref, Site, same_values
from peftarray.formats.experts import expert_sites, target_parameters
from peftarray.formats.names import WRAPPERS, Alignment, BaseNames
from peftarray.formats.peft_config import read_config
from peftarray.formats.tying import settle_ties
from peftarray.layers import Layer, Peers
from peftarray.method import AdapterConfig
from peftarray.methods import TrainableTokensConfig
from peftarray.stores.checkpoint import Checkpoint
from peftarray.targets import is_saved, is_targeted

__all__ = ["open_weights", "read"]

_PREFIX, _SHARED = "base_model.model.", "base_model."
_TOKENS = "trainable_tokens_delta"


@dataclass
class _Sorted:
    """The adapter's keys, each in exactly one place."""

    # (module, depth of nesting) -> the method's name -> key
    methods: dict[tuple[str, int], dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    embeddings: set[str] = field(default_factory=set)
    tokens: dict[str, str] = field(default_factory=dict)
    replace: dict[str, Ref] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)


def read(
    path: str | Path,
    base: Checkpoint,
    *,
    allow_unmatched: bool = False,
    config: AdapterConfig | None = None,
    layers: Mapping[str, Layer] | None = None,
) -> Adapters:
    """An adapter folder, against the base that it is for. Reads headers and two JSON files, no data.

    Args:
        path: the folder.
        base: the base checkpoint.
        allow_unmatched: pass over tensors, targets and configuration fields without a counterpart.
        config: in place of the folder's own.
        layers: module's name -> its layer, where more is known of it than the base's tensors tell.

    Raises:
        PeftError: of the kind that fits; see `peftarray.errors`.
    """
    folder = Path(path)
    config = config or read_config(folder, allow_unknown=allow_unmatched)
    reason = config.why_not_mergeable()
    if reason:
        message = f"{folder}: {reason}"
        raise UnsupportedError(message)
    tensors = open_weights(folder)
    names = BaseNames(base, layers)
    keys = {key.removeprefix(_PREFIX): key for key in tensors}
    if len(keys) != len(tensors):
        message = f"{folder}: some tensors stand with and without the prefix {_PREFIX}; the file is damaged"
        raise FormatError(message)
    of_all = [path for path in keys if path.startswith(_SHARED) and names.split(path) is None]
    shared = {path.removeprefix(_SHARED): keys.pop(path) for path in of_all}
    alignment = names.align(keys)
    found = _sort(keys, config, names, alignment, tensors)
    _check_replacements(found.replace, names, tensors)
    # Rows are replaced below what else a module has: PEFT wraps a tied head, its rows trained as tokens, in LoRA.
    sites = [
        *_token_sites(found, config, names, alignment, tensors),
        *_sharing(_method_sites(found, config, names, alignment, tensors), shared, found.leftover),
    ]
    adapted = {piece.tensor for site in sites for piece in site.pieces}
    absent = _absent_targets(config, names, alignment, adapted, {module for module, _ in found.methods})
    absent += _absent_values(config, names, alignment, found)
    if (found.leftover or absent) and not allow_unmatched:
        raise _unmatched(folder, found.leftover, absent, names, alignment, len(tensors), base)
    if found.leftover or absent:
        _check_peers(folder, sites)
    for site in sites:
        shapes = {name: ref.shape(tensors) for name, ref in site.params.items()}
        site.method.check_shapes(shapes, site.layer)
    return settle_ties(
        Adapters(
            name=str(folder),
            tensors=tensors,
            config=config,
            sites=tuple(sites),
            replace=found.replace,
            unused=tuple(found.unused),
            unmatched=(*found.leftover, *absent),
        ),
        names,
    )


def open_weights(folder: Path) -> Checkpoint:
    """The tensors of an adapter folder.

    Raises:
        FormatError: there are none.
        UnsupportedError: they are pickles.
    """
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return Checkpoint.open(file)
    pickle = folder / "adapter_model.bin"
    if pickle.exists():
        return Checkpoint.open(pickle)
    message = f"{folder} has no adapter_model.safetensors; give the folder that save_pretrained wrote"
    raise FormatError(message)


def _sort(
    keys: dict[str, str], config: AdapterConfig, names: BaseNames, alignment: Alignment, tensors: Checkpoint
) -> _Sorted:
    found = _Sorted()
    embedding = names.input_embedding()
    for path, key in keys.items():
        if _is_copy(path, keys, config):
            found.unused.append(key)
            continue
        aligned = alignment.to_base(path)
        split = names.split(aligned)
        head = names.head_in(path, split.module if split is not None else None)
        if head is not None and names.may_be_tied():
            names.untie(head)
            split = names.split(path)
        if split is None:
            module, local = names.split_embedding(path)
            twin = keys.get(f"{alignment.to_adapter(embedding)}.{local}") if module and embedding else None
            if twin is not None and same_values(Ref(key), Ref(twin), tensors):
                found.unused.append(key)  # of another module for the same embedding, tied to it
            else:
                _place_new(found, path, key, config, names)
            continue
        tensor = f"{split.module}.{split.local}"
        if tensor in names.places:
            found.replace[tensor] = Ref(key)
        elif split.local.startswith(config.training_only) and config.training_only:
            found.unused.append(key)
        elif split.local == _TOKENS and config.peft_type != TrainableTokensConfig.peft_type:
            found.tokens[split.module] = key
        elif is_saved(alignment.to_adapter(split.module), config) and split.local in ("weight", "bias"):
            found.replace[tensor] = Ref(key)
        else:
            _place_local(found, split.module, split.depth, split.local, key, tensors)
    return found


def _is_copy(path: str, keys: dict[str, str], config: AdapterConfig) -> bool:
    """Whether a key is of the two that `bias="all"` adds for a bias of `modules_to_save`: its old value, and a copy."""
    for word in ("original_module", "modules_to_save"):
        module, found, local = path.partition(f".{word}.")
        # The copy's key has the adapter's name where the module has children.
        twins = (f"{module}.{local}", f"{module}.{local.partition('.')[2]}")
        if found and is_saved(module, config) and any(twin in keys for twin in twins):
            return True
    return False


def _place_new(found: _Sorted, path: str, key: str, config: AdapterConfig, names: BaseNames) -> None:
    """A tensor that the base lacks is a new head if the configuration says so, and left over if not."""
    clean = ".".join(word for word in path.split(".") if word not in WRAPPERS)
    module, _, last = clean.rpartition(".")
    if is_saved(module, config) and "lora_" not in last and not any(clean.startswith(f"{m}.") for m in names.places):
        found.replace[clean] = Ref(key)
    else:
        found.leftover.append(key)


def _place_local(found: _Sorted, module: str, depth: int, local: str, key: str, tensors: Checkpoint) -> None:
    name = local.removesuffix(".weight")
    if "_embedding_" in name:
        found.embeddings.add(module)
        name = name.replace("_embedding_", "_")
    group = found.methods[module, depth]
    if name in group and same_values(Ref(key), Ref(group[name]), tensors):
        found.unused.append(key)  # PEFT saves a layer with its embedding, and gives the magnitude another name there
        return
    if name in group:
        message = f"the adapter has {name} of {module} twice ({group[name]} and {key}); the file is damaged"
        raise FormatError(message)
    group[name] = key


def _method_sites(
    found: _Sorted, config: AdapterConfig, names: BaseNames, alignment: Alignment, tensors: Checkpoint
) -> list[Site]:
    nested: dict[str, dict[int, dict[str, str]]] = defaultdict(dict)
    for (module, depth), group in found.methods.items():
        nested[module][depth] = group
    sites: list[Site] = []
    for module, groups in nested.items():
        parameters = target_parameters(module, config, names, alignment)
        if parameters:
            sites += expert_sites(module, groups, parameters, config, names, alignment, tensors)
            continue
        merged: dict[str, str] = {}
        for group in groups.values():
            merged |= group
        if sum(map(len, groups.values())) != len(merged):
            message = f"the adapter wraps {module} more than once; save each adapter by itself"
            raise MatchError(message)
        sites.append(_module_site(module, max(groups), merged, module in found.embeddings, config, names, alignment))
    return sites


def _sharing(sites: list[Site], shared: dict[str, str], leftover: list[str]) -> list[Site]:
    """The same sites, which know of each other where their method asks, and of the tensors that they share."""
    if not (shared or any(site.method.reads_peers for site in sites)):
        return sites
    peers = Peers(site.layer for site in sites)
    used: set[str] = set()
    found = []
    for site in sites:
        layer = replace(site.layer, peers=peers) if site.method.reads_peers else site.layer
        common = {name: row.shared for name, row in site.method.params(layer).items() if row.shared in shared}
        refs = {name: Ref(shared[key]) for name, key in common.items() if key is not None}
        used.update(ref.name for ref in refs.values())
        found.append(replace(site, layer=layer, params={**site.params, **refs}))
    leftover += [key for key in shared.values() if key not in used]
    return found


def _check_peers(folder: Path, sites: list[Site]) -> None:
    """Refuse to derive arrays from the layers of an adapter where not all of them are here."""
    for site in sites:
        missing = [name for name in site.method.params(site.layer) if name not in site.params]
        if missing and site.method.reads_peers:
            message = (
                f"{folder}: {missing[0]} is not in the file and depends on every layer that the adapter was trained "
                "on, some of which are not here; use the base that it was trained on"
            )
            raise UnsupportedError(message)


def _module_site(
    module: str,
    depth: int,
    group: dict[str, str],
    embedding: bool,
    config: AdapterConfig,
    names: BaseNames,
    alignment: Alignment,
) -> Site:
    tensor, bias = f"{module}.weight", f"{module}.bias"
    if tensor not in names.places and f"{module}.in_proj_weight" in names.places:
        tensor, bias = f"{module}.in_proj_weight", f"{module}.in_proj_bias"
    if tensor not in names.places:
        first = next(iter(group.values()))
        message = (
            f"the adapter tensor {first} is for {module}, which has no weight in "
            f"{names.base.path}{nearest(module, names.modules)}"
        )
        raise MatchError(message)
    path = alignment.to_adapter(module)
    parent = module.rpartition(".")[0]
    if depth and module.endswith(".out_proj") and f"{parent}.in_proj_weight" in names.places:
        # PEFT gives it the attention's rank, and adds it in the attention's wrapper and in its own.
        method = config.at(alignment.to_adapter(parent)).applied_twice()
    else:
        method = config.at(path)
    has_bias = bias in names.places
    layer = replace(_layer(path, tensor, embedding, method, names), bias=has_bias, dtype=names.dtype(tensor))
    if "bias" in method.touches(layer) and not has_bias:
        message = (
            f"{module}: the adapter changes a bias, which this layer of {names.base.path} does not have; use the "
            "base that it was trained on"
        )
        raise MatchError(message)
    return Site(
        layer=layer,
        method=method,
        params={name: Ref(key) for name, key in group.items()},
        pieces=names.pieces(tensor),
        bias=names.places[bias][0].disk if has_bias else None,
    )


def _layer(path: str, tensor: str, embedding: bool, method: AdapterConfig, names: BaseNames) -> Layer:
    if path in names.layers:
        return names.layers[path]
    shape = names.shape(tensor)
    if len(shape) < 2:
        message = f"{path}: its weight has the shape {shape}; a method needs a matrix, so this layer cannot be adapted"
        raise ShapeError(message)
    if len(shape) > 2:
        return Layer(path, "conv", shape)
    if embedding:
        flip = method.embedding_transposed
        return Layer(path, "embedding", shape[::-1] if flip else shape, transposed=flip)
    conv1d = names.is_conv1d(path)
    stored_in_out = method.stored_in_out() if conv1d is None else conv1d
    return Layer(path, "linear", shape[::-1] if stored_in_out else shape, transposed=stored_in_out)


def _token_sites(
    found: _Sorted, config: AdapterConfig, names: BaseNames, alignment: Alignment, tensors: Checkpoint
) -> list[Site]:
    sites = []
    for module, key in found.tokens.items():
        path, embedding = alignment.to_adapter(module), names.input_embedding(module)
        rows = config.token_rows(path, is_input=module == embedding)
        if not rows and embedding and names.is_tied(module):
            rows = config.token_rows(alignment.to_adapter(embedding), is_input=True)
        if not rows:
            message = (
                f"the adapter has {key}, and adapter_config.json names no trainable_token_indices for {path}; add them"
            )
            raise ConfigError(message)
        method = TrainableTokensConfig(token_indices=list(rows)).at(path)
        tensor = f"{module}.weight"
        shape = names.shape(tensor) if tensor in names.places else ()
        if len(shape) != 2:
            what = f"its weight has the shape {shape}" if tensor in names.places else "it has no weight"
            message = f"{path}: {key} is for rows of an embedding; in {names.base.path} {what}"
            raise ShapeError(message)
        if max(rows) >= shape[0]:
            message = (
                f"{path}: trainable_token_indices go up to {max(rows)}; this embedding of {names.base.path} has "
                f"{shape[0]} rows, and the adapter brings no larger one; save it with "
                "save_embedding_layers=True, or resize the base first"
            )
            raise ShapeError(message)
        sites.append(Site(Layer(path, "embedding", shape), method, {_TOKENS: Ref(key)}, names.pieces(tensor)))
    return sites


def _check_replacements(replace: dict[str, Ref], names: BaseNames, tensors: Checkpoint) -> None:
    """Refuse tensors that fit no place, and let the names know of those with another number of rows."""
    for tensor, ref in replace.items():
        if tensor not in names.places:
            continue
        old, new = names.shape(tensor), ref.shape(tensors)
        if old[1:] != new[1:] or len(old) != len(new) or len(names.places[tensor]) > 1:
            message = (
                f"{tensor} is {old} in {names.base.path}; the adapter brings {ref.name} of {new} to replace it; "
                "only the number of rows (vocabulary, labels) may differ"
            )
            raise ShapeError(message)
        if old != new and tensor.rpartition(".")[2] not in ("weight", "bias"):
            message = (
                f"{tensor} is {old} in {names.base.path} and {new} in the adapter; use the base that it was trained on"
            )
            raise ShapeError(message)
        if old != new:
            names.resized[names.places[tensor][0].disk] = new[0]


def _absent_targets(
    config: AdapterConfig, names: BaseNames, alignment: Alignment, adapted: set[str], wrapped: set[str]
) -> list[str]:
    """Modules of the base that the configuration targets and the file has nothing for: another model's adapter."""
    if config.target_modules is None or (
        isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    ):
        return []
    without = [module for module in names.adaptable() if module not in wrapped]
    without = [module for module in without if any(p.disk not in adapted for p in names.places[f"{module}.weight"])]
    return [path for path in map(alignment.to_adapter, without) if is_targeted(path, config)]


def _absent_values(config: AdapterConfig, names: BaseNames, alignment: Alignment, found: _Sorted) -> list[str]:
    """What the configuration says the file holds besides the method's arrays, where it holds none of it."""
    absent = []
    if config.modules_to_save and not found.replace:
        # PEFT adds the names of heads that a model may have; those that this base lacks say nothing.
        absent += sorted(m for m in names.modules if is_saved(alignment.to_adapter(m), config))
    embedding = names.input_embedding()
    if embedding and not found.tokens and config.token_rows(alignment.to_adapter(embedding), is_input=True):
        absent.append(f"{embedding} (trainable_token_indices)")
    return absent


def _unmatched(
    folder: Path,
    leftover: list[str],
    absent: list[str],
    names: BaseNames,
    alignment: Alignment,
    total: int,
    base: Checkpoint,
) -> MatchError:
    if leftover:
        module = alignment.to_base(leftover[0].removeprefix(_PREFIX)).partition(".lora_")[0]
        what = (
            f"{len(leftover)} of {total} adapter tensors have no place in {base.path}, the first is "
            f"{leftover[0]}{nearest(module, names.modules)}"
        )
    else:
        what = (
            f"the adapter has nothing for {len(absent)} modules of {base.path} that its configuration names, "
            f"the first is {absent[0]}"
        )
    return MatchError(f"{folder}: {what}; use the base that it was trained on, or allow it (--allow-unmatched)")
