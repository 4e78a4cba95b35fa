"""torch: its autograd and its compiler; bfloat16, which NumPy lacks, goes to the host and back by its bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
import torch.utils.checkpoint

from peftarray import arrays
from peftarray.formats.prompts import holds_prompt
from peftarray.gradients import Chosen, check_loss, refuse_independent, refuse_unused
from peftarray.prompts import Prompt

__all__ = [
    "COMPILES",
    "SIDE_BY_SIDE",
    "adapt_module",
    "as_trainable",
    "checkpoint",
    "from_host",
    "jit",
    "linear_map",
    "load_module",
    "quantize_module",
    "random_state",
    "set_random_state",
    "to_host",
    "value_and_grad",
]

COMPILES = False
"""Inductor takes its time at the first step, and not every model has a graph without breaks."""
SIDE_BY_SIDE = False


def from_host(array: np.ndarray, *, device: str | torch.device | None = None) -> torch.Tensor:
    """A tensor with the values of `array`; on the CPU it shares the array's memory where that may be written."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def to_host(array: Any) -> np.ndarray:
    """A NumPy array with the values of a tensor, of ml_dtypes for bfloat16."""
    return arrays.to_host(array)


def value_and_grad(
    loss: Callable[..., Any],
    *,
    frozen: Collection[str] = (),
    has_aux: bool = False,
    unused: Literal["refuse", "zero"] = "refuse",
    compiled: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """As in `peftarray.backend.Backend`. A compiled loss must be one graph: a break in it is torch's error."""
    function = jit(loss) if compiled else loss

    def run(params: Any, *others: Any, **options: Any) -> tuple[Any, Any]:
        chosen = Chosen(params, frozen)
        leaves = [array.detach().requires_grad_() for array in chosen.arrays]
        with torch.enable_grad():
            result = function(chosen.filled(leaves), *others, **options)
        value, aux = result if has_aux else (result, None)
        check_loss(value)
        if not value.requires_grad:
            refuse_independent(value)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        pairs = list(zip(chosen.places, gradients, strict=True))
        if unused == "refuse":
            refuse_unused([chosen.names[place] for place, gradient in pairs if gradient is None])
        filled = [torch.zeros_like(chosen.values[place]) if g is None else g for place, g in pairs]
        value = value.detach()
        return ((value, _detached(aux)) if has_aux else value), chosen.gradients(filled)

    return run


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, keeping nothing for its gradient but its arguments: it is run again on the way back."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        # Without the generator's state: what is drawn here is drawn from keys.
        return torch.utils.checkpoint.checkpoint(
            function, *arguments, use_reentrant=False, preserve_rng_state=False, **options
        )

    return run


def linear_map(
    product: Callable[[torch.Tensor], torch.Tensor], transpose: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """As in `peftarray.backend.Backend`; the compiler decides for itself what it makes again."""
    if torch.compiler.is_compiling() or not x.requires_grad:
        return product(x)
    return _LinearMap.apply(x, product, transpose)  # type: ignore[no-untyped-call]


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, product: Any, transpose: Any) -> torch.Tensor:
        return product(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.transpose = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.transpose(gradient), None, None


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled as one graph."""
    return torch.compile(function, fullgraph=True)


def adapt_module(
    module: Any,
    config: Any,
    *,
    seed: int = 0,
    adapter_name: str = "default",
    token_ids: Sequence[int] | None = None,
) -> Any:
    """`peftarray.get_peft_model` for a `torch.nn.Module`."""
    if isinstance(config, Prompt):
        from peftarray.backends import torch_prompts

        return torch_prompts.adapt_module(module, config, seed=seed, adapter_name=adapter_name, token_ids=token_ids)
    from peftarray.backends import torch_modules

    return torch_modules.adapt_module(module, config, seed=seed, adapter_name=adapter_name)


def load_module(module: Any, folder: Any, *, adapter_name: str = "default", is_trainable: bool = False) -> Any:
    """`peftarray.PeftModel.from_pretrained` for a `torch.nn.Module`."""
    if holds_prompt(folder):
        from peftarray.backends import torch_prompts

        return torch_prompts.load_module(module, folder, adapter_name=adapter_name, is_trainable=is_trainable)
    from peftarray.backends import torch_modules

    return torch_modules.load_module(module, folder, adapter_name=adapter_name, is_trainable=is_trainable)


def quantize_module(module: Any, choice: Any) -> Any:
    """`peftarray.quantize` for a `torch.nn.Module`."""
    from peftarray.backends import torch_quantised

    return torch_quantised.quantize_module(module, choice)


def as_trainable(module: Any) -> Any:
    """What `peftarray.fit` trains of a `torch.nn.Module`: its parameters that require a gradient."""
    from peftarray.backends import torch_training

    return torch_training.TrainableModule(module)


def random_state() -> dict[str, Any]:
    """Where torch's own generators are: modules draw their dropout from them."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state().numpy(), "cuda": [state.numpy() for state in on_gpus]}


def set_random_state(state: dict[str, Any]) -> None:
    """Put torch's own generators back to where they were."""
    torch.set_rng_state(torch.from_numpy(state["cpu"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([torch.from_numpy(one) for one in state["cuda"]])


def _detached(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, tree)
