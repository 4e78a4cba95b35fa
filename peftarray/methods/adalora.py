"""AdaLoRA: W' = W + s B diag(E) A, a low-rank update in the form of a singular value decomposition that is pruned.

Source: Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, section 3, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Never

from peftarray import random
from peftarray.arrays import Array, Params
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.layers import Kind, Layer
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import LowRank
from peftarray.methods.lora import rows_of, token_indices
from peftarray.settings import Rule, boolean, mapping_of, number, one_of, optional, refused, setting, whole

__all__ = ["AdaLoraConfig"]

_PEFT_IGNORES = "it is a variant of LoRA that AdaLoRA does not have (PEFT passes over it); leave it out"
_init = Rule(lambda value: type(value) in (bool, str), "True, False or the name of an initialisation")
_mask = Rule(
    lambda value: isinstance(value, list) and all(type(keep) is bool for keep in value), "a list of True and False"
)
_masks = Rule(
    # A tuple is what `at` makes of it for one module; no file holds one.
    lambda value: value is None or isinstance(value, tuple) or mapping_of(_mask).allows(value),
    "None or a mapping from names of lora_E to lists of True and False",
)
_share = Rule(lambda value: type(value) is float and 0 < value < 1, "a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LowRank):
    """Singular triples that training prunes: `W' = W + s B diag(E) A`, `s = lora_alpha / (init_r + 1e-5)`.

    Shapes: `lora_A (k, fan_in)`, `lora_E (k, 1)`, `lora_B (out, k)`, also of convolutions. `k` is `init_r`, or the
    number of triples that `rank_pattern` keeps of a module; the divisor stays `init_r`, whatever was pruned. The
    initial state is the identity, since `E = 0`, unless `init_lora_weights=False`. How training spends its budget of
    triples is in `peftarray.methods.adalora_budget`.

    Attributes:
        init_r: triples of every layer at the start.
        target_r: triples of a layer on average at the end.
        tinit: steps before the first pruning.
        tfinal: steps after the last.
        deltaT: steps from one pruning to the next.
        beta1, beta2: how slowly the averages of sensitivity and of its uncertainty move.
        orth_reg_weight: factor of the penalty that keeps A and B orthogonal.
        total_step: steps of the whole training, which the schedule needs.
        rank_pattern: `"<module>.lora_E"` -> which of its `init_r` triples are kept.
        lora_alpha: numerator of the scale; `init_r` stands in for one that is not positive.
        lora_dropout: share of the update's inputs that training leaves out.
        r: not used, as in PEFT; `init_r` is.
        init_lora_weights: start as the identity; from normal values otherwise.

    The other fields are those of `LoraConfig`; its variants are refused.

    Example:
        >>> config = AdaLoraConfig(init_r=3, rank_pattern={"fc.lora_E": [True, False, True]})
        >>> import numpy as np
        >>> config.init(np.ones((5, 4)), name="fc").params["lora_B"].shape
        (5, 2)
    """

    peft_type: ClassVar[str] = "ADALORA"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv")

    init_r: int = setting(12, whole(1))
    target_r: int = setting(8, whole(0))
    tinit: int = setting(0, whole(0))
    tfinal: int = setting(0, whole(0))
    deltaT: int = setting(1, whole(1))
    beta1: float = setting(0.85, _share)
    beta2: float = setting(0.85, _share)
    orth_reg_weight: float = setting(0.5, number(0.0))
    total_step: int | None = setting(None, optional(whole(1)))
    rank_pattern: dict[str, list[bool]] | tuple[bool, ...] | None = setting(None, _masks)
    r: int = 8
    lora_alpha: float = setting(8, number())
    lora_dropout: float = setting(0.0, number(0.0, 1.0))
    bias: str = setting("none", one_of("none", "all", "lora_only"))
    fan_in_fan_out: bool = setting(False, boolean)
    init_lora_weights: bool | str = setting(True, _init)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(None, token_indices)
    ensure_weight_tying: bool = setting(False, boolean)
    megatron_core: str | None = "megatron.core"
    qalora_group_size: int = 16
    use_rslora: bool = refused(False, _PEFT_IGNORES)
    use_dora: bool = refused(False, _PEFT_IGNORES)
    lora_bias: bool = refused(False, _PEFT_IGNORES)
    alpha_pattern: dict[str, float] | None = refused(None, _PEFT_IGNORES)
    target_parameters: list[str] | None = refused(None, _PEFT_IGNORES)
    use_bdlora: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    kasa_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    loftq_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    eva_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    corda_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    lora_ga_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    velora_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    monteclora_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    megatron_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    alora_invocation_tokens: list[int] | None = refused(None, _PEFT_IGNORES)
    use_qalora: bool = refused(False, _PEFT_IGNORES)
    arrow_config: Mapping[str, Any] | None = refused(None, _PEFT_IGNORES)
    layer_replication: list[Any] | None = refused(
        None, "replicated layers share one base weight; write the copies out first"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, mask in (self.rank_pattern or {}).items() if isinstance(self.rank_pattern, Mapping) else ():
            if len(mask) != self.init_r:
                message = (
                    f"AdaLoraConfig.rank_pattern has {len(mask)} entries for {name}; init_r is {self.init_r}, and "
                    "each triple needs one"
                )
                raise ConfigError(message)
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            message = (
                f"AdaLoraConfig has total_step {self.total_step}, tinit {self.tinit} and tfinal {self.tfinal}, which "
                "leaves no step for pruning; raise total_step or lower the others"
            )
            raise ConfigError(message)

    @property
    def scale(self) -> float:
        """`lora_alpha / (init_r + 1e-5)`, where `init_r` stands in for a `lora_alpha` that is not positive."""
        # PEFT takes the pruned rank there instead, but only once such an adapter was loaded from its file.
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    @property
    def starts_as_identity(self) -> bool:
        return self.init_lora_weights is not False

    def resolved(self, name: str) -> dict[str, Any]:
        changes = super().resolved(name) | {"alpha_pattern": None, "loftq_config": None}
        if isinstance(self.rank_pattern, Mapping):
            # Files of older releases have the adapter's name behind.
            keys = [key for key in self.rank_pattern if f"{key}.".startswith(f"{name}.lora_E.")]
            changes["rank_pattern"] = tuple(self.rank_pattern[keys[0]]) if keys else None
        return changes

    def params(self, layer: Layer) -> dict[str, Param]:
        rank = sum(self.rank_pattern) if isinstance(self.rank_pattern, tuple) else self.init_r
        draw = random.normal_of(0.02) if self.init_lora_weights is True else random.normal
        values = random.zeros if self.init_lora_weights is True else random.normal
        if isinstance(self.init_lora_weights, str):
            draw = values = _no_draw
        return {
            "lora_A": Param("r in", (rank, layer.fan_in), draw),
            "lora_E": Param("r one", (rank, 1), values),
            "lora_B": Param("out r", (layer.out, rank), draw),
        }

    def factors(self, p: Params, layer: Layer) -> tuple[Array, Array]:
        return p["lora_B"] * (p["lora_E"].mT * self.scale), p["lora_A"]

    def dropout(self) -> Dropout:
        return Dropout(inputs=self.lora_dropout)

    def stored_in_out(self) -> bool:
        return self.fan_in_fan_out

    def keeps_tied(self) -> bool:
        return self.ensure_weight_tying

    def token_rows(self, name: str, *, is_input: bool) -> tuple[int, ...]:
        return rows_of(self.trainable_token_indices, name, is_input=is_input)


def _no_draw(seed: int, stream: str, shape: tuple[int, ...]) -> Never:
    message = "AdaLoraConfig.init_lora_weights: AdaLoRA starts from True (the identity) or False; give one of them"
    raise UnsupportedError(message)
