"""A linear layer and a thin update beside it in one step of autograd, with no pass over the output for the sum.

Formula: `y = x W^T + b + (x down^T) up^T`; back, `dx = dy W + (dy up) down`, each sum made by the product that ends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftarray.adapter import Adapter
from peftarray.method_kinds import LowRank

__all__ = ["fused_output"]


def fused_output(base: nn.Module, adapter: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The adapted output of a layer, where it can be made at once; None where torch must see both parts.

    Only a plain `Linear` that nothing is hooked to and that computes in the dtype of the update. What is trained does
    not matter: what an adapter makes has the same bits when it is loaded as when it was trained.
    """
    if type(base) is not nn.Linear or torch.compiler.is_compiling():
        return None
    weight, bias = base.weight, base.bias
    if type(weight) is not nn.Parameter or type(x) is not torch.Tensor or weight.dtype is not x.dtype:
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    if torch.is_autocast_enabled(x.device.type) or not (isinstance(adapter, Adapter) and _is_thin(adapter)):
        return None
    prepared = adapter.prepared
    if prepared.keys() != {"up", "down"}:
        return None
    up, down = prepared["up"], prepared["down"]
    if up.dtype is not x.dtype or type(up) is not torch.Tensor or x.numel() == 0:
        return None
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _LinearBesideUpdate.apply
    return apply(x, weight, bias, down, up)[0]


def _is_thin(adapter: Adapter) -> bool:
    """Whether all that it does to a linear layer is to add `up @ down`, if it prepares nothing else."""
    method = adapter.config
    adds = isinstance(method, LowRank) and method.adds_apart()
    return adds and adapter.layer.kind == "linear" and adapter.touches() == ("weight",)


class _LinearBesideUpdate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: Any, down: torch.Tensor, up: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        thin = rows @ down.mT
        y = functional.linear(rows, weight, bias).addmm_(thin, up.mT)
        return y.view(*x.shape[:-1], weight.shape[0]), thin

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, down, up = inputs
        _, thin = output
        ctx.mark_non_differentiable(thin)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, down, up, thin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None, None
        x, weight, down, up, thin = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, weight.shape[0])
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            thin = rows @ down.mT
        needs, back = ctx.needs_input_grad, grad @ up
        of_x = (grad @ weight).addmm_(back, down).view(x.shape) if needs[0] else None
        of_weight = grad.mT @ rows if needs[1] else None
        of_bias = grad.sum(0) if needs[2] else None
        of_down = back.mT @ rows if needs[3] else None
        of_up = grad.mT @ thin if needs[4] else None
        return of_x, of_weight, of_bias, of_down, of_up
