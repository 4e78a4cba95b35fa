"""Draws of LoRA configurations that PEFT accepts on a given model, over the product of its options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import peft
import torch
from hypothesis import assume
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from tiny_models import TINY, Base
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Target:
    """A module that LoRA can adapt."""

    name: str
    kind: str
    biased: bool

    @property
    def suffix(self) -> str:
        """The end of the name; with one word more where a bare number would name a whole block too."""
        words = self.name.split(".")
        return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


def targets(model: torch.nn.Module) -> list[Target]:
    """Every adaptable module, without those whose weight another module shares: what is tied has tests of its own."""
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        owners[id(weight)] = owners.get(id(weight), 0) + 1
    found = []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind and owners[id(module.weight)] == 1:
            found.append(Target(name, kind, getattr(module, "bias", None) is not None))
    return found


def _kind(module: torch.nn.Module) -> str | None:
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, _CONVOLUTIONS) else None


@st.composite
def lora_settings(draw: st.DrawFn, base: Base) -> dict[str, Any]:
    """Arguments of `peft.LoraConfig` for this base: which layers by any of the ways to say it, and how."""
    pool = targets(base.model)
    variant = draw(st.sampled_from(["plain", "plain", "dora", "lora_bias"]))
    if variant == "lora_bias":
        unbiased = {target.suffix for target in pool if not target.biased or target.kind == "embedding"}
        pool = [target for target in pool if target.suffix not in unbiased]
        assume(pool)
    chosen = {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 20)),
        "use_rslora": draw(st.booleans()),
        "use_dora": variant == "dora",
        "lora_bias": variant == "lora_bias",
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        "task_type": draw(st.sampled_from([None, TASKS.get(base.name)])),
        "init_lora_weights": True if variant == "lora_bias" else draw(st.sampled_from([True, True, "gaussian", False])),
    }
    chosen |= draw(_where(base, pool, everything=variant != "lora_bias"))
    names = st.sampled_from([target.name for target in pool])
    patterns = names.flatmap(_patterns)
    alphas = st.integers(1, 20) | st.sampled_from([0.5, 2.5])
    for field, values in (("rank_pattern", st.integers(1, 5)), ("alpha_pattern", alphas)):
        # The first match counts, and the file is written with its keys sorted: in any other order, what PEFT reads
        # is not what PEFT wrote.
        chosen[field] = dict(sorted(draw(st.dictionaries(patterns, values, max_size=2)).items()))
    assume(hits(base, chosen))
    return chosen


@st.composite
def _where(draw: st.DrawFn, base: Base, pool: list[Target], everything: bool) -> dict[str, Any]:
    names = st.lists(st.sampled_from([target.name for target in pool]), min_size=1, max_size=4, unique=True)
    suffixes = st.lists(
        st.sampled_from(sorted({target.suffix for target in pool})), min_size=1, max_size=3, unique=True
    )
    ways = ["suffixes", "names"]
    if everything:
        # PEFT looks for all linear layers in models of transformers only.
        ways += ["pattern", "all-linear"] if base.name in TINY else ["pattern"]
    way = draw(st.sampled_from(ways))
    found: dict[str, Any] = {}
    if way == "all-linear":
        found["target_modules"] = draw(st.sampled_from(["all-linear", "ALL-LINEAR"]))
    elif way == "pattern":
        found["target_modules"] = "|".join(_generalised(name) for name in draw(names))
    else:
        found["target_modules"] = draw(suffixes if way == "suffixes" else names)
        layers = draw(st.sampled_from([None, None, 0, 1, [1], [0, 1]]))
        if layers is not None and base.name in TINY:
            found["layers_to_transform"] = layers
            found["layers_pattern"] = draw(st.sampled_from([None, TINY[base.name].layers, [TINY[base.name].layers]]))
    excluded = draw(st.sampled_from(["none", "none", "names", "suffixes", "pattern"]))
    if excluded != "none":
        some = draw(suffixes if excluded == "suffixes" else names)
        found["exclude_modules"] = some if excluded != "pattern" else "|".join(re.escape(name) for name in some)
    save = TINY[base.name].save if base.name in TINY else ()
    if save and draw(st.booleans()):
        found["modules_to_save"] = draw(st.lists(st.sampled_from(save), min_size=1, max_size=2, unique=True))
    return found


def _generalised(name: str) -> str:
    """A pattern for this module in every layer."""
    return re.sub(r"\d+(?=\\)", r"\\d+", re.escape(name))


def _patterns(name: str) -> st.SearchStrategy[str]:
    """Keys of rank and alpha patterns that match a module: its end, its whole name, a part with a layer's number."""
    words = name.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    ends = [words[-1], re.escape(name), "^" + re.escape(name), _generalised(name), ".*" + words[-1]]
    ends += [r"\.".join(words[i:]) for i in numbers] + [rf".*{words[i]}\..*{words[-1]}" for i in numbers]
    return st.sampled_from(ends)


def hits(base: Base, chosen: dict[str, Any]) -> bool:
    """Whether PEFT finds a target for these settings (it refuses a configuration without one)."""
    if chosen["target_modules"] in ("all-linear", "ALL-LINEAR"):
        linear = {target.name for target in targets(base.model) if target.kind == "linear"}
        chosen = chosen | {"target_modules": sorted(linear)}
    config = peft.LoraConfig(**chosen)
    if chosen.get("task_type") == "SEQ_CLS":
        config.modules_to_save = {*(config.modules_to_save or ()), "classifier", "score"}
    return any(check_target_module_exists(config, name) for name, _ in base.model.named_modules())
