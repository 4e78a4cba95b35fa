"""Whole adapters combined into one: their modules, and what they hold besides (heads, biases, rows of embeddings)."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftarray.adapter import Adapter
from peftarray.arrays import Array, to_host
from peftarray.combining.layer import LoraFit, combine_by
from peftarray.combining.recipe import Recipe, checked_weights
from peftarray.combining.updates import as_lora, padded
from peftarray.errors import ConfigError, MatchError, UnsupportedError
from peftarray.formats.peft_writer import OUT_PROJECTION, TOKENS, SavedAdapters
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.methods import LoraConfig, TrainableTokensConfig
from peftarray.targets import is_targeted

__all__ = ["CombinedAdapters", "combine_sets"]

# What `trained_biases` says, from least to most -> what LoRA's `bias` is called for it.
_BIASES = {"none": "none", "adapted": "lora_only", "all": "all"}
_PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True, eq=False)
class CombinedAdapters:
    """The LoRA adapter that stands for several.

    Attributes:
        saved: its configuration, its adapters by module, and the tensors that replace the model's.
        fits: module -> its adapter, and how much that holds of what the combination defines.
        notes: what was taken over as it is.
    """

    saved: SavedAdapters
    fits: Mapping[str, LoraFit]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Source:
    """One of the adapters that take part."""

    name: str
    weight: float
    saved: SavedAdapters

    @property
    def config(self) -> AdapterConfig:
        return self.saved.config

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Module -> adapter, of the method."""
        return {module: a for module, a in self.saved.adapters.items() if not module.endswith(TOKENS)}


def combine_sets(
    adapters: Sequence[SavedAdapters],
    weights: Sequence[float] | None = None,
    recipe: Recipe | None = None,
    *,
    base: Callable[[str, Layer], Array] | None = None,
    names: Sequence[str] | None = None,
) -> CombinedAdapters:
    """One LoRA adapter in place of several, module by module.

    A module that some of them do not adapt is combined of those that do. Heads, trained biases and rows of embeddings
    have no combination: one adapter may bring them, or all that do bring the same.

    Args:
        adapters: with arrays of one library; nothing of them changes.
        weights: one for each, 1 by default.
        recipe: how; an exact sum by default.
        base: gives a module's weight as the model stores it, from the module's name and layer; asked where what a
            method adds depends on it, as with DoRA.
        names: what to call the adapters in messages.

    Raises:
        ConfigError: a setting is not allowed, or the configurations contradict each other.
        MatchError: adapters bring different values for what cannot be combined.
        ShapeError: a module has another shape in another adapter.
        UnsupportedError: an adapter cannot be combined; the message says why.

    Example:
        >>> import numpy as np
        >>> from peftarray import LoraConfig, SavedAdapters
        >>> config, weight = LoraConfig(r=2, target_modules=["proj"]), np.ones((4, 3), np.float32)
        >>> saved = SavedAdapters(config, {"proj": config.init(weight, name="proj")})
        >>> combine_sets([saved, saved]).saved.config.r
        4
    """
    recipe = recipe or Recipe()
    checked = checked_weights(weights, len(adapters), recipe)
    called = names or [f"adapter {place + 1}" for place in range(len(adapters))]
    for name, saved in zip(called, adapters, strict=True):
        _check(name, saved.config)
    sources = [_Source(*parts) for parts in zip(called, checked, adapters, strict=True) if parts[1]]
    fits = {}
    for module in dict.fromkeys(module for source in sources for module in source.adapters):
        held = [(source.adapters[module], source.weight) for source in sources if module in source.adapters]
        needed = any(adapter.config.needs_base() for adapter, _ in held)
        weight = base(module, held[0][0].layer) if needed and base is not None else None
        fits[module] = combine_by(recipe, [a for a, _ in held], [w for _, w in held], base=weight)
    if not fits:
        message = "the adapters hold nothing that could be combined; give adapters of weights"
        raise MatchError(message)
    replace, notes = _replacements(sources)
    tokens, more = _token_rows(sources)
    config = _config(sources, fits, tokens)
    made = {module: _stated(fit.adapter, config, module) for module, fit in fits.items()}
    notes += [*more, *_of_bases(sources)]
    return CombinedAdapters(SavedAdapters(config, made | tokens, replace), fits, tuple(notes))


def _check(name: str, config: AdapterConfig) -> None:
    """Refuse adapters that no LoRA adapter on the same model can stand for."""
    reason = config.why_not_mergeable()
    if reason is None and config.parameters_adapted():
        reason = "target_parameters adapts stacked parameters, whose factors hold many experts; merge it (pa.merge)"
    if reason is None and config.keeps_tied():
        reason = "ensure_weight_tying lets a head follow the embedding's adapter; merge it (pa.merge)"
    if reason is not None:
        message = f"{name} cannot be combined: {reason}"
        raise UnsupportedError(message)


def _config(sources: Sequence[_Source], fits: Mapping[str, LoraFit], tokens: Mapping[str, Adapter]) -> LoraConfig:
    configs = [source.config for source in sources]
    in_out = {config.stored_in_out() for config in configs}
    if len(in_out) > 1:
        message = (
            "fan_in_fan_out is True in one adapter and False in another; it says how the base stores its weights, "
            "so correct the one that is wrong"
        )
        raise ConfigError(message)
    biased = {module for module, fit in fits.items() if fit.adapter.config.touches(fit.adapter.layer) != ("weight",)}
    if biased and biased != set(fits):
        other = next(module for module in fits if module not in biased)
        message = (
            f"lora_bias is one setting for all modules, and no adapter that has it is on {other}; combine adapters "
            "that have it on the same modules, or merge them (pa.merge)"
        )
        raise UnsupportedError(message)
    ranks: dict[str, int] = {}
    for module, fit in fits.items():
        target = module.removesuffix(OUT_PROJECTION)
        ranks[target] = max(ranks.get(target, 0), fit.rank)
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda value: (counts[value], value))
    pattern = {_pattern(target, ranks): own for target, own in ranks.items() if own != rank}
    heads = sorted({name for config in configs for name in config.modules_to_save or ()})
    biases = [config.trained_biases() for config in configs]
    dropouts = {config.dropout().inputs for config in configs}
    made = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        lora_bias=bool(biased),
        lora_dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        fan_in_fan_out=in_out.pop(),
        bias=_BIASES[max(biases, key=list(_BIASES).index)],
        modules_to_save=heads or None,
        trainable_token_indices={
            name.removesuffix(TOKENS): list(adapter.config.token_indices)
            for name, adapter in tokens.items()
            if isinstance(adapter.config, TrainableTokensConfig)
        }
        or None,
        task_type=_agreed(config.task_type for config in configs),
        auto_mapping=_agreed(config.auto_mapping for config in configs),
        revision=_agreed(config.revision for config in configs),
        base_model_name_or_path=next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None),
        inference_mode=True,
    )
    return _with_targets(made, configs, sorted(ranks))


def _with_targets(made: LoraConfig, configs: Sequence[AdapterConfig], targets: list[str]) -> LoraConfig:
    """The targets that all the configurations have, where these mean the modules; or else their names."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    first = {name: getattr(configs[0], name) for name in fields}
    wanted = first["target_modules"]
    same = all({name: getattr(config, name) for name in fields} == first for config in configs)
    if same and wanted is not None and not (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        kept = dataclasses.replace(made, **first)
        if all(is_targeted(target, kept) for target in targets):
            return kept
    return dataclasses.replace(made, target_modules=targets)


def _pattern(target: str, others: Iterable[str]) -> str:
    """A key of `rank_pattern` that means this module alone: a plain key means all names that end in it, at a dot."""
    if _PLAIN.fullmatch(target):
        meant = re.compile(rf"(.*\.)?({target})$")
        if not any(meant.match(other) for other in others if other != target and len(other) >= len(target)):
            return target
    return "^" + re.escape(target)


def _stated(adapter: Adapter, config: LoraConfig, module: str) -> Adapter:
    """The same update under the configuration of the whole, which may have a larger rank or another scale there."""
    target = module.removesuffix(OUT_PROJECTION)
    method = config.at(target) if target == module else config.at(target).applied_twice()
    if adapter.config == method:
        return adapter
    product = adapter.product()
    assert product is not None
    up, down = padded(product[0], method.r, 1), padded(product[1], method.r, 0)
    made = as_lora(up / method.scale, down, adapter.layer, bias=adapter.params.get("lora_B.bias"))
    return dataclasses.replace(made, config=method)


def _replacements(sources: Sequence[_Source]) -> tuple[dict[str, Array], list[str]]:
    """Tensors that replace the model's, where one adapter brings them or all bring the same."""
    found: dict[str, Array] = {}
    notes = []
    for tensor in dict.fromkeys(tensor for source in sources for tensor in source.saved.replace):
        holders = [source for source in sources if tensor in source.saved.replace]
        found[tensor] = holders[0].saved.replace[tensor]
        _check_same(tensor, holders, [{"": source.saved.replace[tensor]} for source in holders])
        _check_alone(tensor, tensor, holders, sources)
        notes.append(f"{tensor} is that of {holders[0].name}, as it is")
    return found, notes


def _token_rows(sources: Sequence[_Source]) -> tuple[dict[str, Adapter], list[str]]:
    """Rows of embeddings that were trained as they are, where one adapter brings them or all bring the same."""
    found: dict[str, Adapter] = {}
    notes = []
    names = [module for source in sources for module in source.saved.adapters if module.endswith(TOKENS)]
    for module in dict.fromkeys(names):
        holders = [source for source in sources if module in source.saved.adapters]
        held = [source.saved.adapters[module] for source in holders]
        if any(adapter.config != held[0].config for adapter in held):
            message = f"{module}: adapters train other rows of the embedding; leave them out of all but one adapter"
            raise MatchError(message)
        _check_same(module, holders, [adapter.params for adapter in held])
        _check_alone(module, f"{module.removesuffix(TOKENS)}.weight", holders, sources)
        found[module] = held[0]
        notes.append(f"the trained rows of {module.removesuffix(TOKENS)} are those of {holders[0].name}, as they are")
    return found, notes


def _check_same(what: str, holders: Sequence[_Source], values: Sequence[Mapping[str, Array]]) -> None:
    first = {key: to_host(array) for key, array in values[0].items()}
    for holder, other in zip(holders[1:], values[1:], strict=True):
        for key, array in other.items():
            host = to_host(array)
            if host.shape != first[key].shape or (host != first[key]).any():
                message = (
                    f"{what} differs between {holders[0].name} and {holder.name}; it replaces the model's own, so it "
                    "has no weighted sum: leave it out of all but one adapter, or make it equal in all"
                )
                raise MatchError(message)


def _check_alone(what: str, tensor: str, holders: Sequence[_Source], sources: Sequence[_Source]) -> None:
    """Refuse that one adapter replaces what another, which was trained beside the old values, adds to."""
    module, _, local = tensor.rpartition(".")
    for source in sources:
        adapter = source.adapters.get(module)
        if source in holders or adapter is None:
            continue
        if ("bias" if local.endswith("bias") else "weight") in adapter.config.touches(adapter.layer):
            message = (
                f"{what} of {holders[0].name} replaces the model's own, and {source.name} adds to it as it was before; "
                "combine adapters that agree on it"
            )
            raise MatchError(message)


def _of_bases(sources: Sequence[_Source]) -> list[str]:
    named = dict.fromkeys(source.config.base_model_name_or_path for source in sources)
    known = [name for name in named if name]
    if len(known) < 2:
        return []
    return [f"the adapters name {len(known)} bases ({', '.join(known[:4])}); the result names the first"]


def _agreed(values: Iterable[Any]) -> Any:
    """What all say that say something; None where they differ."""
    said = [value for value in values if value is not None]
    return said[0] if said and all(value == said[0] for value in said) else None
