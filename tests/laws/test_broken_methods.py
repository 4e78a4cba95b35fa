"""The suite itself: a sound method of one's own passes, and one that breaks a law fails by that law's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from peftarray import ConfigError, LowRank, Param, random
from peftarray.testing import LAWS, LawError, check_method


@dataclass(frozen=True, kw_only=True)
class Sound(LowRank):
    """LoRA with a bias, as somebody may write it."""

    peft_type: ClassVar[str] = "SOUND"

    r: int = 2
    alpha: float = 3.0
    names: list[str] | tuple[str, ...] = ("proj",)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def resolved(self, name):
        return super().resolved(name) | {"names": tuple(self.names)}

    def params(self, layer):
        return {
            "down": Param("r in", (self.r, layer.fan_in), random.kaiming_uniform, disk="down.weight"),
            "up": Param("out r", (layer.out, self.r), random.zeros, disk="up.weight"),
            "shift": Param("out", (layer.out,), random.zeros),
        }

    def factors(self, p, layer):
        return p["up"] * self.scale, p["down"]

    def touches(self, layer):
        return ("weight", "bias") if layer.bias else ("weight",)

    def effective_bias(self, p, b, w, layer):
        return b + p["shift"]


_unseeded = np.random.default_rng()


def _table(layer: Any, **changes: Any) -> dict[str, Param]:
    """The sound table with other values in the row `up`."""
    table = Sound().params(layer)
    return table | {"up": replace(table["up"], **changes)}


# A law, and what breaks it: members of the class in place of the sound ones.
BROKEN: dict[str, list[dict[str, Callable[..., Any]]]] = {
    "the_configuration_is_a_value": [
        {"resolved": lambda self, name: {"names": list(self.names)}},
        {"resolved": lambda self, name: {"names": (*self.names, name)}},
    ],
    "a_file_of_other_shapes_is_refused": [{"check_shapes": lambda self, shapes, layer: None}],
    "nothing_is_allocated_to_count": [
        {"num_parameters": lambda self, layer: len(np.zeros(layer.out)) * self.r + layer.fan_in * self.r + layer.out}
    ],
    "an_axis_that_is_not_declared_cannot_be_cut": [{"tiles": property(lambda self: "out")}],
    "cut_and_concatenated_equals_whole": [
        {"weight": lambda self, p, w, layer: w + (p["up"] @ p["down"]) / w.shape[0]},
        {"prepared": {"up": "n r", "down": "r in"}},
    ],
    "init_makes_what_the_table_says": [
        {"init_params": lambda self, *given, **named: Sound().init_params(*given, **named) | {"more": given[1]}},
        {"params": lambda self, layer: _table(layer, axes="out")},
        {"num_parameters": lambda self, layer: self.r * layer.out},
    ],
    "the_first_state_is_the_one_it_names": [
        {"params": lambda self, layer: _table(layer, init=random.normal)},
        {"starts_as_identity": property(lambda self: False)},
    ],
    "a_seed_gives_the_same_bits_everywhere": [
        {"params": lambda self, layer: _table(layer, init=lambda seed, name, shape: _unseeded.random(shape) * 1e-20)}
    ],
    "apply_equals_the_weight": [
        {"apply": lambda self, p, x, w, layer: x @ w.mT + (x @ p["down"].mT) @ p["up"].mT / self.scale}
    ],
    "the_update_is_the_difference": [
        {"update": lambda self, p, w, layer: 2 * (p["up"] @ p["down"])},
        {"touches": lambda self, layer: ("weight",)},
        {"touches": lambda self, layer: ("bias",)},
        {"effective_bias": lambda self, p, b, w, layer: b},
    ],
    "unmerge_restores_or_says_to_keep_the_base": [{"inverse": lambda self, p, w, layer: w}],
    "merging_in_place_is_merging": [{"weight_into": lambda self, p, w, layer: None}],
    "the_scale_is_linear": [{"factors": lambda self, p, layer: (p["up"] * self.scale**2, p["down"])}],
    "library_dtype_and_device_stay": [
        {"factors": lambda self, p, layer: (p["up"] * np.float64(self.scale), p["down"])},
    ],
    "libraries_agree_with_numpy": [
        {
            "factors": lambda self, p, layer: (
                p["up"] * (self.scale if isinstance(p["up"], np.ndarray) else 2 * self.scale),
                p["down"],
            )
        }
    ],
    "what_is_written_is_read_back": [
        {"params": lambda self, layer: _table(layer, disk="over")},
        {"params": lambda self, layer: _table(layer, disk="down.weight")},
    ],
}


def _class(members: dict[str, Any]) -> type[Sound]:
    return dataclass(frozen=True, kw_only=True)(type("Broken", (Sound,), dict(members)))


@pytest.mark.parametrize("libraries", [["numpy"], ["array_api_strict"], None], ids=str)
def test_a_sound_method_passes(libraries):
    pytest.importorskip("array_api_strict") if libraries == ["array_api_strict"] else None
    assert len(check_method(Sound(names=["a", "b"]), libraries=libraries)) == 3


@pytest.mark.parametrize(("law", "members"), [(law, members) for law, each in BROKEN.items() for members in each])
def test_a_broken_method_fails_by_name(law, members):
    libraries = ["numpy", "array_api_strict"] if law == "libraries_agree_with_numpy" else ["numpy"]
    with pytest.raises(LawError, match=rf'^"{law.replace("_", " ")}" does not hold for Broken, sound-linear'):
        check_method(_class(members)(), libraries=libraries)


def test_computing_in_half_precision_fails_by_name(monkeypatch):
    monkeypatch.setattr("peftarray.adapter._widened", lambda array: array)
    with pytest.raises(LawError, match=r'^"half precision is storage alone" does not hold for Sound'):
        check_method(Sound(), libraries=["numpy"])


def test_every_law_can_fail():
    # One cuts as another does, in fewer tiles; one is broken above by the adapter, since no method alone can.
    rest = {"halves_make_the_whole", "half_precision_is_storage_alone"}
    assert {law.__name__ for law in LAWS} == set(BROKEN) | rest


def test_a_kind_without_a_shape_is_an_error():
    with pytest.raises(LawError, match="names the kind 'linear' and takes none of"):
        check_method(_class({"params": _refuses})(), libraries=["numpy"])


def test_an_unknown_library_is_an_error():
    with pytest.raises(ConfigError, match="there is no backend for 'nunpy'; there are"):
        check_method(Sound(), libraries=["nunpy"])


def _refuses(self: Any, layer: Any) -> Any:
    message = "no block fits"
    raise ConfigError(message)
