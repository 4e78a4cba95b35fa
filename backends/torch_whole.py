"""What torch's models with adapters and those with prompts tell alike: what they take, and what training changes."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from peftarray.backends.torch_arrays import parameters_within
from torch import nn

from peftarray.model.summary import trainable_summary

__all__ = ["WholeModel"]


class WholeModel(nn.Module):
    """A module that is used and trained in place of a model."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers training changes, and how many there are."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters_within(self)]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers training changes, as PEFT words it."""
        print(trainable_summary(*self.get_nb_trainable_parameters()))

    def _show_inputs(self, signature: inspect.Signature) -> None:
        """Let `forward` say that it takes these arguments: a training loop looks there for what a model takes."""
        function = type(self).forward

        def forward(self: Any, *arguments: Any, **options: Any) -> Any:
            return function(self, *arguments, **options)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
        self.forward = MethodType(forward, self)
