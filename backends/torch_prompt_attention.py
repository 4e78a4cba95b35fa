"""LLaMA-Adapter in torch: attention modules of transformers with a prompt that they attend to apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftarray.autodiff.fused import rope
from peftarray.errors import UnsupportedError
from peftarray.prompts.adaption_prompt import GATE, PROMPT, gated_attention

__all__ = ["PromptedAttention"]

_TURNED = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose queries are turned whole, in two halves, by the angles that the attention is called with."""


class PromptedAttention(nn.Module):
    """An attention module with a prompt, under PEFT's names.

    Attributes:
        model: the attention module.
        adaption_prompt: `(1, n, width)`.
        adaption_gate: `(1,)`.

    Raises:
        UnsupportedError: how it makes its queries is not known.
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor, gate: torch.Tensor, *, trainable: bool) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.adaption_prompt = nn.Parameter(prompt, requires_grad=trainable)
        self.adaption_gate = nn.Parameter(gate, requires_grad=trainable)
        self._one_projection = self.check(model)

    @staticmethod
    def check(model: nn.Module) -> bool:
        """Whether one projection makes queries, keys and values.

        Raises:
            UnsupportedError: how the attention makes its queries is not known.
        """
        kind, parts = getattr(getattr(model, "config", None), "model_type", None), dict(model.named_children())
        if kind == "gpt2" and "c_attn" in parts and "q_attn" not in parts:
            return True
        if kind in _TURNED and {"q_proj", "k_proj", "v_proj", "o_proj"} <= parts.keys():
            return False
        message = (
            f"LLaMA-Adapter goes on the attention of {', '.join(_TURNED)} and gpt2, and {type(model).__name__} of "
            f"{kind or 'this model'} is none"
        )
        raise UnsupportedError(message)

    def arrays(self, module: str) -> dict[str, torch.Tensor]:
        """Its arrays by the names that the prompt's table has."""
        return {f"{module}.{GATE}": self.adaption_gate, f"{module}.{PROMPT}": self.adaption_prompt}

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the attention makes, and the gated attention to the prompt."""
        output, *rest = self.model(*arguments, **options)
        x = arguments[0] if arguments else options["hidden_states"]
        added = self._of_one(x) if self._one_projection else self._of_several(x, *options["position_embeddings"])
        return output + added.to(output.dtype), *rest

    def _of_several(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        inner: Any = self.model
        prompt = self.adaption_prompt.to(x.dtype)
        q, k, v = self._heads(inner.q_proj(x)), self._heads(inner.k_proj(prompt)), self._heads(inner.v_proj(prompt))
        if "q_norm" in inner._modules:
            q = inner.q_norm(q)
        half = cos.shape[-1] // 2
        q = rope(q, cos[:, None, :, :half], sin[:, None, :, :half])
        out = inner.o_proj(self._joined(q, k, v))
        # The attention's own output has the bias already.
        bias = getattr(inner.o_proj, "bias", None)
        return out if bias is None else out - bias

    def _of_one(self, x: torch.Tensor) -> torch.Tensor:
        inner: Any = self.model
        q, _, _ = inner.c_attn(x).chunk(3, dim=-1)
        _, k, v = inner.c_attn(self.adaption_prompt.to(x.dtype)).chunk(3, dim=-1)
        return self._joined(self._heads(q), self._heads(k), self._heads(v))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        inner: Any = self.model
        return x.reshape(*x.shape[:-1], -1, inner.head_dim).transpose(1, 2)

    def _joined(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        seen = gated_attention(q.to(wide), k.to(wide), v.to(wide), self.adaption_gate.to(wide))
        return seen.transpose(1, 2).flatten(2).to(q.dtype)

    def __getattr__(self, name: str) -> Any:
        """What this module has, or else what the attention has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
