"""AdaLoRA's budget: how many singular triples training keeps at a step, and which of which layers.

Every function is pure. Layers are `{module: params}` with the `lora_A`, `lora_E` and `lora_B` of `AdaLoraConfig`;
gradients have the same form. `allocate` is what a training loop calls after each step, and `pruned` what it saves.

Source: Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, sections 3.1 to 3.3,
arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peftarray.adapter import Adapter
from peftarray.arrays import Array, Params, device, integers, namespace, to_host
from peftarray.errors import ConfigError, MatchError, nearest
from peftarray.method import AdapterConfig
from peftarray.methods.adalora import AdaLoraConfig

__all__ = [
    "Importance",
    "allocate",
    "budget_at",
    "kept",
    "last_pruning",
    "observe",
    "orthogonality_penalty",
    "pruned",
    "pruned_adapters",
    "scores",
]

Layers = Mapping[str, Params]


@dataclass(frozen=True)
class Importance:
    """What was seen of every entry up to a step, in the form of the parameters.

    Attributes:
        sensitivity: the average of |p g|, whose older terms fade.
        uncertainty: the average distance of |p g| from it.
    """

    sensitivity: Layers
    uncertainty: Layers


def orthogonality_penalty(config: AdaLoraConfig, layers: Layers) -> Array:
    """`orth_reg_weight` times the mean of `|A A^T - I|` and `|B^T B - I|` over all layers, to be added to the loss."""
    terms = [_from_identity(p["lora_A"] @ p["lora_A"].mT) for p in layers.values()]
    terms += [_from_identity(p["lora_B"].mT @ p["lora_B"]) for p in layers.values()]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total * (config.orth_reg_weight / len(terms))


def observe(config: AdaLoraConfig, before: Importance | None, layers: Layers, gradients: Layers) -> Importance:
    """The importance after a step: both averages, moved by its parameters and their gradients."""
    sensitivity: dict[str, Params] = {}
    uncertainty: dict[str, Params] = {}
    for module, p in layers.items():
        now = {name: namespace(array).abs(array * gradients[module][name]) for name, array in p.items()}
        smooth = {name: value * (1 - config.beta1) for name, value in now.items()}
        if before is not None:
            smooth = {name: config.beta1 * before.sensitivity[module][name] + new for name, new in smooth.items()}
        away = {name: namespace(v).abs(v - smooth[name]) * (1 - config.beta2) for name, v in now.items()}
        if before is not None:
            away = {name: config.beta2 * before.uncertainty[module][name] + new for name, new in away.items()}
        sensitivity[module], uncertainty[module] = smooth, away
    return Importance(sensitivity, uncertainty)


def scores(importance: Importance) -> dict[str, Array]:
    """module -> the score `(r,)` of each triple: its singular value's, and the means over its two vectors."""
    found = {}
    for module, smooth in importance.sensitivity.items():
        entries = {name: value * importance.uncertainty[module][name] for name, value in smooth.items()}
        xp = namespace(*entries.values())
        means = xp.mean(entries["lora_A"], axis=1) + xp.mean(entries["lora_B"], axis=0)
        found[module] = entries["lora_E"][:, 0] + means
    return found


def budget_at(config: AdaLoraConfig, step: int, total: int, layers: int) -> tuple[int, bool]:
    """How many triples may stay after a step, and whether the step prunes.

    Args:
        config: with `total_step`.
        step: counted from 0.
        total: triples of all layers at the start.
        layers: how many layers there are.
    """
    last = last_pruning(config)
    target = config.target_r * layers
    if step <= config.tinit:
        return total, False
    if step > last:
        return target, True
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((total - target) * left**3 + target), step % config.deltaT == 0


def kept(triples: Mapping[str, Array], budget: int) -> dict[str, list[bool]]:
    """module -> whether each triple is among the `budget` of the highest scores; of equal ones at the edge, none is."""
    xp = namespace(*triples.values())
    ranked = xp.sort(xp.concat(list(triples.values())))
    dropped = ranked.shape[0] - budget
    if dropped <= 0:
        return {module: [True] * score.shape[0] for module, score in triples.items()}
    edge = ranked[dropped - 1]
    return {module: to_host(score > edge).tolist() for module, score in triples.items()}


def allocate(
    config: AdaLoraConfig,
    step: int,
    layers: Layers,
    gradients: Layers,
    importance: Importance | None = None,
    keep: Mapping[str, Sequence[bool]] | None = None,
) -> tuple[dict[str, Params], Importance | None, Mapping[str, Sequence[bool]] | None]:
    """What follows an optimiser's step: triples beyond the budget have their singular value set to zero.

    Args:
        config: with `total_step`.
        step: counted from 0.
        layers: the parameters after the step.
        gradients: of the step.
        importance, keep: as the call before returned them.

    Returns:
        The parameters, and what the next call needs: the importance, and which triples were kept at the last pruning
        (for `rank_pattern`; None before the first).
    """
    last = last_pruning(config)
    if step < last:
        importance = observe(config, importance, layers, gradients)
    total = sum(p["lora_E"].shape[0] for p in layers.values())
    budget, prunes = budget_at(config, step, total, len(layers))
    if step < last and not prunes:
        return dict(layers), importance, keep
    if step <= last and importance is not None:
        keep = kept(scores(importance), budget)
        importance = None if step == last else importance
    if keep is None:
        message = f"step {step} of {config.total_step} prunes, and no importance of a step before it was given"
        raise ConfigError(message)
    return {module: _without(p, keep[module]) for module, p in layers.items()}, importance, keep


def pruned(params: Params, keep: Sequence[bool]) -> dict[str, Array]:
    """The arrays of one layer with only the triples that are kept, as a file with a `rank_pattern` holds them."""
    xp = namespace(*params.values())
    places = integers([i for i, keeps in enumerate(keep) if keeps], params["lora_E"])
    return {name: xp.take(array, places, axis=1 if name == "lora_B" else 0) for name, array in params.items()}


def pruned_adapters(
    config: AdapterConfig, adapters: Mapping[str, Adapter], keep: Mapping[str, Sequence[bool]]
) -> tuple[AdaLoraConfig, dict[str, Adapter]]:
    """The configuration with the `rank_pattern`, and the adapters with only the triples that are kept.

    Raises:
        ConfigError: the method is not AdaLoRA, or the triples were left out before.
        MatchError: a module has no adapter, or an adapter no entry.
    """
    if not isinstance(config, AdaLoraConfig) or config.rank_pattern:
        what = "is pruned already" if isinstance(config, AdaLoraConfig) else f"is {type(config).__name__}'s"
        message = f"the adapter {what}; prune leaves out triples of an AdaLoRA adapter once, when its training is over"
        raise ConfigError(message)
    ours = {name: adapter for name, adapter in adapters.items() if isinstance(adapter.config, AdaLoraConfig)}
    for name in keep.keys() ^ ours.keys():
        message = f"{name} has {'no adapter' if name in keep else 'an adapter, and no entry'}{nearest(name, ours)}"
        raise MatchError(message)
    config = replace(config, rank_pattern={f"{name}.lora_E": list(keep[name]) for name in ours})
    small = {
        name: replace(adapter, config=config.at(name), params=pruned(adapter.params, keep[name]))
        for name, adapter in ours.items()
    }
    return config, {**adapters, **small}


def last_pruning(config: AdaLoraConfig) -> int:
    """The step of the last pruning."""
    if config.total_step is None:
        message = "AdaLoraConfig.total_step is None; the schedule needs the number of training steps"
        raise ConfigError(message)
    return config.total_step - config.tfinal


def _from_identity(square: Array) -> Array:
    xp = namespace(square)
    return xp.linalg.vector_norm(square - xp.eye(square.shape[0], dtype=square.dtype, device=device(square)))


def _without(p: Params, keep: Sequence[bool]) -> Params:
    values = p["lora_E"]
    xp = namespace(values)
    mask = xp.asarray([[keeps] for keeps in keep], dtype=xp.bool, device=device(values))
    return {**p, "lora_E": xp.where(mask, values, xp.zeros_like(values))}
