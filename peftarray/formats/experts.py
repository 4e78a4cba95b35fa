"""PEFT's `target_parameters`: LoRA on the stacked weights of fused experts, one site for each expert."""

from __future__ import annotations

import dataclasses

from peftarray.errors import MatchError, ShapeError
from peftarray.formats.adapters import Ref, Site
from peftarray.formats.names import Alignment, BaseNames
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.stores.checkpoint import Checkpoint
from peftarray.targets import ends_with

__all__ = ["expert_sites", "target_parameters"]


def target_parameters(module: str, config: AdapterConfig, names: BaseNames, alignment: Alignment) -> list[str]:
    """The stacked parameters of a module that the configuration adapts, in the order of their registration."""
    wanted = config.parameters_adapted()
    if not wanted:
        return []
    head = f"{module}."
    own = [
        name.removeprefix(head)
        for name in names.places
        if name.startswith(head)
        and "." not in name.removeprefix(head)
        and ends_with(alignment.to_adapter(name), wanted)
    ]
    order = names.parameter_order()
    return sorted(own, key=lambda name: (order.index(name) if name in order else len(order), name))


def expert_sites(
    module: str,
    groups: dict[int, dict[str, str]],
    parameters: list[str],
    config: AdapterConfig,
    names: BaseNames,
    alignment: Alignment,
    tensors: Checkpoint,
) -> list[Site]:
    """One site for each expert of each stacked parameter.

    The parameter's name is not in the key: wrappers nest in the order of registration, the first innermost. `lora_A`
    `(experts * r, in)` counts experts slowest, `lora_B` `(out, r * experts)` counts them fastest.
    """
    unordered = [name for name in parameters if name not in names.parameter_order()]
    if len(parameters) != len(groups) or (len(parameters) > 1 and unordered):
        message = (
            f"{module}: the adapter wraps {len(groups)} parameters and the base has {', '.join(parameters)}; "
            f"which is which cannot be told for model_type {names.model_type}; use the base that the adapter was "
            "trained on"
        )
        raise MatchError(message)
    path = alignment.to_adapter(module)
    sites = []
    for parameter, depth in zip(parameters, sorted(groups, reverse=True), strict=True):
        tensor = f"{module}.{parameter}"
        shape = names.shape(tensor)
        if len(shape) not in (2, 3) or not shape[0]:
            message = f"{tensor} is {shape}; only matrices and stacks of them can be adapted as parameters"
            raise ShapeError(message)
        experts, rows, columns = shape if len(shape) == 3 else (1, *shape)
        stacked_in_out = names.stored_transposed(parameter)
        logical = (columns, rows) if stacked_in_out else (rows, columns)
        layer = Layer(f"{path}.{parameter}", "linear", logical, transposed=stacked_in_out != names.flipped(tensor))
        # Patterns of ranks match the parameter's whole name, as those that PEFT writes for fused experts do.
        method, group = config.at(layer.name), groups[depth]
        for name, key in group.items():
            axis, got = (0, tensors[key].shape) if name == "lora_A" else (1, tensors[key].shape)
            if name not in ("lora_A", "lora_B") or len(got) != 2 or got[axis] % experts:
                message = (
                    f"{tensor}: {key} is {got}; stacked parameters take lora_A (experts*r, in) and lora_B (out, "
                    f"r*experts) for {experts} experts"
                )
                raise ShapeError(message)
        for expert in range(experts):
            params = {name: _expert_ref(name, key, tensors, expert, experts) for name, key in group.items()}
            pieces = names.pieces(tensor, expert if len(shape) == 3 else None)
            sites.append(Site(dataclasses.replace(layer, name=f"{layer.name}.{expert}"), method, params, pieces))
    return sites


def _expert_ref(name: str, key: str, tensors: Checkpoint, expert: int, experts: int) -> Ref:
    if experts == 1:
        return Ref(key)
    if name == "lora_B":
        return Ref(key, columns=(expert, experts))
    rank = tensors[key].shape[0] // experts
    return Ref(key, rows=(expert * rank, (expert + 1) * rank))
