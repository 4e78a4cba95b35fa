"""LLaMA-Adapter: prompts in the upper layers, which queries attend to apart, behind a gate that starts closed.

Source: Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, 2023, sections
3.1 and 3.2, arXiv:2303.16199.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from peftarray.arrays import Array, Params, namespace
from peftarray.autodiff.fused import attention
from peftarray.errors import ConfigError
from peftarray.method import Param
from peftarray.method_dropout import Drop
from peftarray.prompts.host import Host
from peftarray.prompts.prompt import Prompt, without_tasks
from peftarray.random import normal, zeros
from peftarray.settings import optional, setting, text, whole

__all__ = ["GATE", "PROMPT", "AdaptionPromptConfig", "gated_attention"]

PROMPT, GATE = "adaption_prompt", "adaption_gate"
_PREFIX = "base_model.model."
_ATTENTION = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}
"""The attention module in the layers of the models that PEFT knows."""


@dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(Prompt):
    """In the last `adapter_layers` attention modules, S = softmax(q k^T / sqrt(d)) v + g softmax(q a^T / sqrt(d)) b.

    a and b are the keys and values that the layer's own projections make of `adaption_prompt (1, n, width)`, without
    positions; g is `adaption_gate (1,)`. In Llama S goes through the output projection, whose bias counts once (in PEFT
    twice); in GPT-2 the second term is added behind it, as in PEFT. At initialisation g is zero and the model is as it
    was; the prompts are standard normal.

    Attributes:
        target_modules: name of the attention modules; by the model's type if None.
        adapter_len: how many virtual tokens.
        adapter_layers: how many layers, counted from the last.
        modules: the full names of the modules, from `for_model`; no field of PEFT's.
        width: the model's; likewise.

    Example:
        >>> names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
        >>> host = Host("llama", 8, 3, 2, 2, 4, tuple(names))
        >>> config = AdaptionPromptConfig(adapter_len=5, adapter_layers=2).for_model(host)
        >>> config.num_parameters()
        82
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    target_modules: str | None = setting(None, text)
    adapter_len: int | None = setting(None, optional(whole(1)))
    adapter_layers: int | None = setting(None, optional(whole(1)))
    modules: tuple[str, ...] = dataclasses.field(default=(), metadata={"derived": True})
    width: int = dataclasses.field(default=0, metadata={"derived": True})

    def for_model(self, host: Host) -> Self:
        """The same with the modules of a model.

        Raises:
            ConfigError: the model's type is not known, or it has too few such modules.
        """
        target = self.target_modules or _ATTENTION.get(host.model_type)
        if target is None:
            message = (
                f"AdaptionPromptConfig knows no attention modules of {host.model_type or 'this model'}; set "
                f"target_modules, or use one of {', '.join(_ATTENTION)}"
            )
            raise ConfigError(message)
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                message = f"AdaptionPromptConfig.{name} is None; set it to a whole number of at least 1"
                raise ConfigError(message)
        found = dict.fromkeys(
            f"{start}.{target}" for start, mark, _ in (name.rpartition(f".{target}.") for name in host.names) if mark
        )
        wanted = self.adapter_layers or 0
        if len(found) < wanted:
            message = f"AdaptionPromptConfig.adapter_layers is {wanted}; the model has {len(found)} modules {target}"
            raise ConfigError(message)
        modules = sorted(found, key=_numbers)[-wanted:]
        return dataclasses.replace(self, target_modules=target, modules=tuple(modules), width=host.width)

    def params(self) -> dict[str, Param]:
        if not self.modules:
            message = "AdaptionPromptConfig has no modules yet; for_model finds them in a model"
            raise ConfigError(message)
        table = {}
        for module in self.modules:
            table[f"{module}.{GATE}"] = Param("one", (1,), init=zeros, disk=f"{_PREFIX}{module}.{GATE}")
            shape = (1, self.adapter_len, self.width)
            table[f"{module}.{PROMPT}"] = Param("one token dim", shape, init=normal, disk=f"{_PREFIX}{module}.{PROMPT}")
        return table

    def weights(self, p: Params, *, task_ids: Array | None = None, drop: Drop | None = None) -> dict[str, Array]:
        without_tasks(self, task_ids)
        return dict(p)


def gated_attention(queries: Array, keys: Array, values: Array, gate: Array, *, scale: float | None = None) -> Array:
    """What the prompt of a layer adds to its attention, `gate * softmax(q k^T scale) v`.

    Args:
        queries: `(batch, heads, length, width)`, with their positions.
        keys, values: of the prompt, `(1, groups, n, width)`.
        gate: `(1,)`.
        scale: `width ** -0.5` if None.

    Returns:
        `(batch, heads, length, width)`.
    """
    xp = namespace(queries, keys, values, gate)
    batch = (queries.shape[0], *keys.shape[1:])
    keys, values = xp.broadcast_to(keys, batch), xp.broadcast_to(values, batch)
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    return gate * attention(queries, keys, values, None, **options)


def _numbers(name: str) -> tuple[int, ...]:
    """The numbers in a module's name: its layers in their order."""
    return tuple(int(part) for part in name.split(".") if part.isdecimal())
