"""LoRA: W' = W + s B A, with rsLoRA's scale, DoRA's magnitudes, a trained bias, KaSA and block-diagonal factors.

Sources: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1, arXiv:2106.09685;
Kalajdzievski, Rank-Stabilized LoRA, 2023, arXiv:2312.03732; Liu et al., DoRA, 2024, section 4.1, arXiv:2402.09353;
Wang et al., KaSA, 2024, arXiv:2412.06071; Xu et al., QA-LoRA, 2023, algorithm 1, arXiv:2309.14717.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Never

from peftarray import random
from peftarray.arrays import Array, Params, namespace, row_norms, stop_gradient
from peftarray.errors import ConfigError, UnsupportedError
from peftarray.layers import Kind, Layer, contract, scale_outputs
from peftarray.method import Param
from peftarray.method_dropout import Dropout
from peftarray.method_kinds import LowRank
from peftarray.methods.lora_blocks import SIDES, block_diagonal, block_side
from peftarray.random import Draw
from peftarray.routes import Weight
from peftarray.settings import Rule, boolean, mapping_of, name_list, number, one_of, optional, refused, setting, whole
from peftarray.widened import widened

__all__ = ["LoraConfig", "changes_base", "rows_of", "token_indices"]

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
_rows = Rule(
    lambda value: isinstance(value, (list, tuple)) and all(type(i) is int and i >= 0 for i in value), "a list of rows"
)
token_indices = Rule(
    lambda value: value is None or _rows.allows(value) or mapping_of(_rows).allows(value),
    "None, a list of token numbers, or a mapping from module names to such lists",
)
_blocks = Rule(
    # A tuple is what `at` makes of it for one module; no file holds one.
    lambda value: (
        value is None
        or isinstance(value, tuple)
        or (isinstance(value, Mapping) and all(name_list.allows(value.get(side)) for side in SIDES))
    ),
    f"None or a mapping with {' and '.join(SIDES)} (lists of names), nblocks and match_strict",
)
_init = Rule(
    lambda value: (
        type(value) is bool
        or (type(value) is str and (value in (*_KEEPS_BASE, *_CHANGES_BASE) or value.startswith("pissa_niter_")))
    ),
    f"True, False, or one of {', '.join((*_KEEPS_BASE, *_CHANGES_BASE, 'pissa_niter_[k]'))}",
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LowRank):
    """Low-rank adaptation: `W' = W + s B A`, `s = lora_alpha / r` (`/ sqrt(r)` with rsLoRA).

    Shapes: `A (r, fan_in)`, `B (out, r)`; convolutions store `A (r, in, *kernel)` and `B (out, r, 1, ...)`; embeddings
    are linear maps `(dim, vocab)`. With `use_dora` the rows of the result are rescaled, `W' = m V / |V|`, `V = W + s B
    A`, with `m (out,)` trained and the norm taken over each row. With `lora_bias`, `b' = b + s lora_B.bias`. The
    initial state is the identity unless `init_lora_weights=False`.

    Attributes:
        r: the rank.
        lora_alpha: numerator of the scale.
        use_rslora: divide by the root of the rank instead of the rank.
        use_dora: train the magnitude of each output apart from its direction.
        lora_bias: `lora_B` has a bias.
        bias: which biases of the model an adapter's file replaces: `"none"`, `"all"` or `"lora_only"`.
        fan_in_fan_out: the weight is stored `(in, out)`, where the architecture does not say.
        rank_pattern, alpha_pattern: pattern of module names -> its `r`, `lora_alpha`.
        target_parameters: names of stacked parameters, such as fused experts.
        trainable_token_indices: rows of the embedding that are trained as they are.
        use_bdlora: `{target_modules_bd_a, target_modules_bd_b, nblocks, match_strict}`: factors with `nblocks`
            diagonal blocks.
        use_qalora, qalora_group_size: `A (r, fan_in / group)` acts on sums of groups of inputs, so that the update is
            constant within a group and a merge changes zero points alone: `peftarray.merge_zero_points`.
        kasa_config: drop the base's `r` smallest singular triples, and train a diagonal between the factors.

    The fields of PEFT's class that are not named here have PEFT's meaning; those that change the result and are not
    supported raise `UnsupportedError` when set.

    Example:
        >>> LoraConfig(r=8, lora_alpha=16, use_rslora=True).scale == 16 / 8**0.5
        True
    """

    peft_type: ClassVar[str] = "LORA"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    prepared: ClassVar[Mapping[str, str]] = {"up": "out r", "down": "r in", "magnitude": "out"}
    training_only: ClassVar[tuple[str, ...]] = ("lora_velora_embed", "lora_monteclora_sampler")
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding", "conv")
    embedding_transposed: ClassVar[bool] = True

    r: int = setting(8, whole(1))
    lora_alpha: float = setting(8, number())
    lora_dropout: float = setting(0.0, number(0.0, 1.0))
    use_rslora: bool = setting(False, boolean)
    use_dora: bool = setting(False, boolean)
    lora_bias: bool = setting(False, boolean)
    bias: str = setting("none", one_of("none", "all", "lora_only"))
    fan_in_fan_out: bool = setting(False, boolean)
    init_lora_weights: bool | str = setting(True, _init)
    rank_pattern: dict[str, int] | None = setting({}, optional(mapping_of(whole(1))))
    alpha_pattern: dict[str, float] | None = setting({}, optional(mapping_of(number())))
    target_parameters: list[str] | tuple[str, ...] | None = setting(None, name_list)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(None, token_indices)
    ensure_weight_tying: bool = setting(False, boolean)
    use_bdlora: Mapping[str, Any] | tuple[str, int] | None = setting(None, _blocks)
    kasa_config: Mapping[str, Any] | bool | None = None
    loftq_config: Mapping[str, Any] | None = None
    eva_config: Mapping[str, Any] | None = None
    corda_config: Mapping[str, Any] | None = None
    lora_ga_config: Mapping[str, Any] | None = None
    velora_config: Mapping[str, Any] | None = None
    monteclora_config: Mapping[str, Any] | None = None
    megatron_config: Mapping[str, Any] | None = refused(None, "Megatron's parallel layers split the weights otherwise")
    megatron_core: str | None = "megatron.core"
    qalora_group_size: int = setting(16, whole(1))
    alora_invocation_tokens: list[int] | None = refused(
        None, "activated LoRA depends on the prompt's tokens, so no merged weight exists; serve it unmerged"
    )
    use_qalora: bool = setting(False, boolean)
    arrow_config: Mapping[str, Any] | None = refused(None, "Arrow routes each token, so no merged weight exists")
    layer_replication: list[Any] | None = refused(
        None,
        "replicated layers share one base weight, so an update cannot be merged into it; write the copies out first",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias and self.use_dora:
            message = "LoraConfig.lora_bias and use_dora are both True; choose one"
            raise ConfigError(message)
        if self.use_qalora and (self.use_dora or self.kasa_config or self.use_bdlora):
            message = "LoraConfig.use_qalora goes with none of use_dora, kasa_config and use_bdlora; choose one"
            raise ConfigError(message)

    @property
    def scale(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def product_alone(self) -> bool:
        """Whether the update is the product of two whole factors `lora_B` and `lora_A`, and nothing else."""
        return not (self.use_dora or self.use_bdlora or self.use_qalora or self.kasa_config)

    @property
    def starts_as_identity(self) -> bool:
        return self.init_lora_weights is not False and not self.kasa_config

    @property
    def tiles(self) -> str:
        return "out" if self.use_dora else "out in"

    def resolved(self, name: str) -> dict[str, Any]:
        configs = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config")
        changes: dict[str, Any] = super().resolved(name) | dict.fromkeys(configs)
        changes["kasa_config"] = bool(self.kasa_config) or None
        changes["use_bdlora"] = (
            block_side(self.use_bdlora, name) if isinstance(self.use_bdlora, Mapping) else self.use_bdlora
        )
        return changes

    def params(self, layer: Layer) -> dict[str, Param]:
        ones = tuple(1 for _ in layer.kernel)
        kernel = "".join(f" k{i}" for i in range(len(layer.kernel)))
        side, blocks = self.use_bdlora if isinstance(self.use_bdlora, tuple) else ("", 1)
        if (layer.shape[1] if side == "a" else self.r) % blocks:
            message = (
                f"{layer.name}: LoraConfig.use_bdlora has {blocks} blocks, which must divide the layer's inputs "
                f"({layer.shape[1]}) or, for target_modules_bd_b, r ({self.r})"
            )
            raise ConfigError(message)
        if self.use_qalora:
            self._check_groups(layer)
            blocks, side = self.qalora_group_size, "a"
        fan_in, rank = layer.shape[1] // (blocks if side == "a" else 1), self.r // (blocks if side == "b" else 1)
        down, up = "r cin" + kernel if kernel else "r in", "out r" + kernel
        disk = "lora_embedding_{}" if layer.kind == "embedding" else "lora_{}.weight"
        table = {
            "lora_A": Param(down, (self.r, fan_in, *layer.kernel), self._init_down(layer), disk=disk.format("A")),
            "lora_B": Param(up, (layer.out, rank, *ones), self._init_up(layer), disk=disk.format("B")),
        }
        if self.lora_bias:
            table["lora_B.bias"] = Param("out", (layer.out,), random.zeros)
        if self.use_dora:
            shape = (1, layer.out, *ones) if kernel else (layer.out,)
            table["lora_magnitude_vector"] = Param("one out" + kernel if kernel else "out", shape)
        if self.kasa_config:
            table["lora_diag"] = Param("r", (self.r,), random.normal)
            table["minor_up"] = Param("out r", (layer.out, self.r), frozen=True, stored=False)
            table["minor_down"] = Param("r in", (self.r, layer.fan_in), frozen=True, stored=False)
        return table

    def reads_base(self, layer: Layer) -> bool:
        return bool(self.kasa_config)

    def derive(self, layer: Layer, p: Params, w: Array) -> dict[str, Array]:
        made: dict[str, Array] = {}
        if self.kasa_config:
            made["minor_up"], made["minor_down"] = _smallest_triples(w, self.r)
        if self.use_dora and "lora_magnitude_vector" not in p:
            up, down = self.factors({**p, **made}, layer)
            xp = namespace(w)
            is_packed = isinstance(w, Weight) and w.is_packed
            norm = _sum_norms(widened(w), up, down) if is_packed else xp.linalg.vector_norm(w + up @ down, axis=1)
            made["lora_magnitude_vector"] = (
                xp.reshape(norm, (1, -1, *(1 for _ in layer.kernel))) if layer.kernel else norm
            )
        return made

    def factors(self, p: Params, layer: Layer) -> tuple[Array, Array]:
        down, up = p["lora_A"], p["lora_B"]
        if layer.kernel:
            xp = namespace(down, up)
            down, up = xp.reshape(down, (down.shape[0], -1)), xp.reshape(up, (up.shape[0], -1))
        if isinstance(self.use_bdlora, tuple):
            side, blocks = self.use_bdlora
            down, up = (block_diagonal(down, blocks), up) if side == "a" else (down, block_diagonal(up, blocks))
        up = up * self.scale
        if self.use_qalora:
            # A sees means of groups, times the number of groups (Xu et al., 2023, algorithm 1, as PEFT scales it).
            group = self.qalora_group_size
            down = namespace(down).repeat(down * (down.shape[1] / group), group, axis=1)
        if self.kasa_config:
            xp = namespace(down, up)
            up = xp.concat([up * p["lora_diag"], -p["minor_up"]], axis=1)
            down = xp.concat([down, p["minor_down"]], axis=0)
        return up, down

    def prepare(self, p: Params, layer: Layer) -> dict[str, Array]:
        made = super().prepare(p, layer)
        if self.use_dora:
            magnitude = p["lora_magnitude_vector"]
            made["magnitude"] = namespace(magnitude).reshape(magnitude, (-1,))
        return made

    def needs_base(self) -> bool:
        return self.use_dora

    def product(self, p: Params, layer: Layer) -> tuple[Array, Array] | None:
        return None if self.use_dora else super().product(p, layer)

    def update(self, p: Params, w: Array | None, layer: Layer) -> Array:
        return self.weight(p, w, layer) - w if self.use_dora else super().update(p, w, layer)

    def weight(self, p: Params, w: Array, layer: Layer) -> Array:
        direction = super().weight(p, w, layer)
        if not self.use_dora:
            return direction
        return direction * self._gain(p, row_norms(direction))[:, None]

    def weight_into(self, p: Params, w: Array, layer: Layer) -> None:
        super().weight_into(p, w, layer)
        if self.use_dora:
            w *= self._gain(p, row_norms(w))[:, None]

    def inverse(self, p: Params, w: Array, layer: Layer) -> Array:
        if self.use_dora:
            message = (
                "DoRA keeps the direction of each row and not its length, so it cannot be unmerged; keep a copy "
                "of the base weight"
            )
            raise UnsupportedError(message)
        return super().inverse(p, w, layer)

    def apply(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        y = super().apply(p, x, w, layer)
        if not self.use_dora:
            return y
        # The norm is a constant of the gradient (DoRA, section 4.3), so that nothing of it is kept for backward.
        norm = _sum_norms(*map(stop_gradient, (w, p["up"], p["down"])))
        return scale_outputs(y, self._gain(p, norm), layer)

    def apply_update(self, p: Params, x: Array, w: Array, layer: Layer) -> Array:
        if self.use_dora:
            return self.apply(p, x, w, layer) - contract(x, w, layer)
        return super().apply_update(p, x, w, layer)

    def adds_apart(self) -> bool:
        return not self.use_dora

    def dropout(self) -> Dropout:
        return Dropout(inputs=self.lora_dropout)

    def why_not_trainable(self) -> str | None:
        for name in ("velora_config", "monteclora_config"):
            if getattr(self, name):
                return f"LoraConfig.{name} changes how training goes, and only what it made can be read; leave it out"
        return None

    def touches(self, layer: Layer) -> tuple[str, ...]:
        return ("weight", "bias") if self.lora_bias else ("weight",)

    def effective_bias(self, p: Params, b: Array, w: Array | None, layer: Layer) -> Array:
        return b + self.scale * p["lora_B.bias"] if self.lora_bias else b

    def why_not_mergeable(self) -> str | None:
        if not changes_base(self.init_lora_weights):
            return None
        return (
            f"init_lora_weights is {self.init_lora_weights!r}, which changed the base's weights before training, and "
            "the file does not hold them; save it converted (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge with PEFT where it was trained"
        )

    def stored_in_out(self) -> bool:
        return self.fan_in_fan_out

    def keeps_tied(self) -> bool:
        return self.ensure_weight_tying

    def parameters_adapted(self) -> tuple[str, ...]:
        return tuple(self.target_parameters or ())

    def token_rows(self, name: str, *, is_input: bool) -> tuple[int, ...]:
        return rows_of(self.trainable_token_indices, name, is_input=is_input)

    def applied_twice(self) -> LoraConfig:
        return replace(self, lora_alpha=2 * self.lora_alpha)

    def _check_groups(self, layer: Layer) -> None:
        group = self.qalora_group_size
        if layer.kind != "linear" or layer.fan_in % group:
            message = (
                f"{layer.name}: LoraConfig.use_qalora is for linear layers whose inputs are a multiple of "
                f"qalora_group_size; this is {layer.kind}, and has {layer.fan_in} inputs in groups of {group}"
            )
            raise ConfigError(message)

    @staticmethod
    def _gain(p: Params, norm: Array) -> Array:
        # norm / norm is 1, or NaN where the norm overflowed or is zero: such a row has no direction, and must not be 0.
        return p["magnitude"] / norm * (norm / norm)

    def _init_down(self, layer: Layer) -> Draw:
        if self.init_lora_weights not in (True, False, "gaussian"):
            return _needs_initialiser
        if layer.kind == "embedding":
            return random.zeros if self.init_lora_weights else random.normal
        if self.init_lora_weights == "gaussian":
            return random.normal_of(1 / self.r)
        return random.kaiming_uniform

    def _init_up(self, layer: Layer) -> Draw:
        if layer.kind == "embedding":
            return random.normal
        return random.zeros if self.init_lora_weights else random.kaiming_uniform


def rows_of(
    indices: Sequence[int] | Mapping[str, Sequence[int]] | None, name: str, *, is_input: bool
) -> tuple[int, ...]:
    """The rows that `trainable_token_indices` means in the embedding called `name`: a bare list is the input's."""
    if isinstance(indices, Mapping):
        return next((tuple(found) for end, found in indices.items() if f".{name}".endswith(f".{end}")), ())
    return tuple(indices or ()) if is_input else ()


def changes_base(init: bool | str) -> bool:
    """Whether an initialisation leaves a residual base behind, which an adapter's file does not hold."""
    return isinstance(init, str) and init.startswith(_CHANGES_BASE)


def _sum_norms(w: Array, up: Array, down: Array) -> Array:
    """The norm of each row of `w + up @ down`, from the factors' products: the sum itself is never formed.

    `|w + u D|^2 = |w|^2 + (2 w D^T + u D D^T) . u` for a row `w` and its row `u` of `up`. Rounding is that of `|w|^2`,
    which shows only where an update takes nearly all of a row away.
    """
    xp = namespace(w, up, down)
    return xp.sqrt(row_norms(w) ** 2 + xp.vecdot(2 * (w @ down.mT) + up @ (down @ down.mT), up))


def _needs_initialiser(seed: int, stream: str, shape: tuple[int, ...]) -> Never:
    message = (
        "LoraConfig.init_lora_weights: only True, False and 'gaussian' can be drawn from a seed; this one needs "
        "data or the base ('loftq' is what peftarray.loftq makes of the base)"
    )
    raise UnsupportedError(message)


def _smallest_triples(w: Array, r: int) -> tuple[Array, Array]:
    """The part of `w` on its `r` smallest singular values, as `up (out, r)` and `down (r, fan_in)`."""
    u, s, vh = namespace(w).linalg.svd(w, full_matrices=False)
    keep = s.shape[0] - r
    return u[:, keep:] * s[keep:], vh[keep:, :]
