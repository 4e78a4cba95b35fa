"""Rotary positions: the angle of each pair of channels at each position, and how it is stretched to longer texts.

Source: Su et al., RoFormer, 2021, section 3.2.2, arXiv:2104.09864.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peftarray.errors import ConfigError, UnsupportedError

__all__ = ["Rotary"]

Turns = tuple[np.ndarray, float]


@dataclass(frozen=True)
class Rotary:
    """How fast each pair of channels turns.

    Attributes:
        width: channels of a head; half as many pairs.
        frequencies: radians a position, one for each pair.
        gain: factor of cosines and sines, and so, squared, of the attention scores.
        limit: the longest sequence that these frequencies are for.

    Example:
        >>> rotary = Rotary.read({"rope_theta": 100.0, "max_position_embeddings": 8}, width=4)
        >>> rotary.frequencies, rotary.limit
        ((1.0, 0.1), 8)
    """

    width: int
    frequencies: tuple[float, ...]
    gain: float
    limit: int

    @classmethod
    def read(cls, config: Mapping[str, Any], width: int, *, theta: float = 10000.0) -> Rotary:
        """What a `config.json` says, in the spelling of transformers 5 (`rope_parameters`) or of those before it.

        Args:
            config: what the file holds.
            width: channels of a head.
            theta: the base of the frequencies where the file names none.

        Raises:
            ConfigError: a number is missing or not positive.
            UnsupportedError: a way of stretching that is not known here.
        """
        rule = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rule, Mapping):
            message = f"the rotary positions are described by {rule!r}; they need an object; mend config.json"
            raise ConfigError(message)
        kind = rule.get("rope_type", rule.get("type", "default"))
        if type(kind) is not str or kind not in _STRETCHED:
            message = f"rope_type is {kind!r}, which is not supported; there are {', '.join(_STRETCHED)}"
            raise UnsupportedError(message)
        if rule.get("partial_rotary_factor", 1.0) != 1.0:
            message = f"partial_rotary_factor is {rule['partial_rotary_factor']!r}; only whole heads (1.0) turn here"
            raise UnsupportedError(message)
        if width % 2:
            message = f"heads have {width} channels, which do not make pairs; rotary positions need an even number"
            raise ConfigError(message)
        longest = config.get("max_position_embeddings", 2048)
        facts = {"rope_theta": config.get("rope_theta", theta), "max_position_embeddings": longest}
        facts |= {name: value for name, value in rule.items() if value is not None}
        # Some files keep it beside the other numbers, and some leave it out where nothing was stretched yet.
        facts.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings", longest))
        plain = _number(facts, "rope_theta") ** (-np.arange(0, width, 2) / width)
        turns, gain = _STRETCHED[kind](plain, facts)
        return cls(width, tuple(turns.tolist()), gain, _limit(kind, facts))

    def table(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of the angles at `positions` `(...)`, each `(..., width / 2)`, in float64."""
        angles = positions[..., None] * np.asarray(self.frequencies)
        return np.cos(angles) * self.gain, np.sin(angles) * self.gain


def _number(facts: Mapping[str, Any], name: str, usual: float | None = None) -> float:
    value: Any = facts.get(name, usual)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        message = f"the rotary positions need a positive number {name}, got {value!r}; mend config.json"
        raise ConfigError(message)
    return float(value)


def _limit(kind: str, facts: Mapping[str, Any]) -> int:
    longest, before = (_number(facts, f"{part}max_position_embeddings") for part in ("", "original_"))
    if kind == "linear":  # these files mostly keep the length from before the stretching
        return round(longest * _number(facts, "factor"))
    if kind == "yarn" and "factor" in facts:
        return round(max(longest, before * _number(facts, "factor")))
    # Beyond it, these change their frequencies with the length of the text, and what was kept of it would be wrong.
    return round(before if kind == "longrope" else longest)


def _default(turns: np.ndarray, facts: Mapping[str, Any]) -> Turns:
    return turns, 1.0


def _linear(turns: np.ndarray, facts: Mapping[str, Any]) -> Turns:
    """Positions divided by a factor.

    Source: Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, 2023,
    section 2.3, arXiv:2306.15595.
    """
    return turns / _number(facts, "factor"), 1.0


def _llama3(turns: np.ndarray, facts: Mapping[str, Any]) -> Turns:
    """Slow pairs divided by a factor, quick ones left, a ramp between. Source: Llama 3.1's reference code."""
    low, high = _number(facts, "low_freq_factor"), _number(facts, "high_freq_factor")
    if not low < high:
        message = f"low_freq_factor is {low:g} and high_freq_factor {high:g}; the first must be less; mend config.json"
        raise ConfigError(message)
    rounds = _number(facts, "original_max_position_embeddings") * turns / (2 * math.pi)
    kept = np.clip((rounds - low) / (high - low), 0.0, 1.0)
    return turns * (kept + (1 - kept) / _number(facts, "factor")), 1.0


def _yarn(turns: np.ndarray, facts: Mapping[str, Any]) -> Turns:
    """By the rounds that a pair makes in the original length: many, left; few, divided; and a gain for the scores.

    Source: Peng et al., YaRN, 2023, section 3.2 to 3.4, arXiv:2309.00071.
    """
    before = _number(facts, "original_max_position_embeddings")
    factor = _number(facts, "factor", _number(facts, "max_position_embeddings") / before)
    theta, width = _number(facts, "rope_theta"), 2 * len(turns)
    many, few = _number(facts, "beta_fast", 32), _number(facts, "beta_slow", 1)

    # The pair, as a number with a fraction, that makes so many rounds.
    first, last = (width * math.log(before / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (many, few))
    if facts.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    divided = np.clip((np.arange(len(turns)) - first) / max(last - first, 0.001), 0.0, 1.0)

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    usual = gain(1.0)
    if facts.get("mscale") and facts.get("mscale_all_dim"):
        usual = gain(_number(facts, "mscale")) / gain(_number(facts, "mscale_all_dim"))
    return turns * (1 - divided + divided / factor), _number(facts, "attention_factor", usual)


def _longrope(turns: np.ndarray, facts: Mapping[str, Any]) -> Turns:
    """A factor for each pair, those for short texts. Source: Ding et al., LongRoPE, 2024, arXiv:2402.13753."""
    factors, before = facts.get("short_factor"), _number(facts, "original_max_position_embeddings")
    if not isinstance(factors, list) or len(factors) != len(turns):
        message = (
            f"short_factor must be a list of {len(turns)} numbers, one for each pair of channels; mend config.json"
        )
        raise ConfigError(message)
    each = [_number({"short_factor": value}, "short_factor") for value in factors]
    factor = _number(facts, "factor", _number(facts, "max_position_embeddings") / before)
    usual = math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
    return turns / np.asarray(each), _number(facts, "attention_factor", usual)


_STRETCHED: dict[str, Callable[[np.ndarray, Mapping[str, Any]], Turns]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
