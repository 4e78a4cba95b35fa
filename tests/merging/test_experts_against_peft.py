"""LoRA on mixtures of experts: stacked in memory, an expert a tensor in most files."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    tensors_of,
)
from safetensors.torch import save_file

import peftarray as pa

MIXTURES = ["qwen3-moe", "mixtral", "gpt-oss"]
ROUTERS = {"qwen3-moe": "mlp.gate.weight", "mixtral": "gate.weight", "gpt-oss": "mlp.router.weight"}


@st.composite
def mixture_settings(draw: st.DrawFn, name: str) -> dict:
    """LoRA on any of a mixture's parameters, under long names and short, and on its plain layers too."""
    ends = ["gate_up_proj", "mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj", ROUTERS[name]]
    if name == "gpt-oss":
        ends += ["gate_up_proj_bias", "experts.down_proj_bias"]
    parameters = draw(st.lists(st.sampled_from(ends), min_size=1, unique=True))
    patterns = st.sampled_from(
        [r".*\.gate_up_proj", "down_proj", r"layers\.0\..*", "mlp.experts.gate_up_proj", "q_proj"]
    )
    return {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.integers(1, 12)),
        "use_rslora": draw(st.booleans()),
        "target_parameters": parameters,
        "target_modules": draw(st.sampled_from([[], ["q_proj"], ["o_proj", "v_proj"]])),
        "rank_pattern": dict(sorted(draw(st.dictionaries(patterns, st.integers(1, 4), max_size=2)).items())),
        "alpha_pattern": dict(sorted(draw(st.dictionaries(patterns, st.integers(1, 9), max_size=2)).items())),
        "modules_to_save": draw(st.sampled_from([None, ["norm"], ["lm_head"]])),
    }


@pytest.mark.parametrize("name", MIXTURES)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_stacked_parameters(bases, name, data):
    base = bases(name, sharded=data.draw(st.booleans(), label="sharded"))
    config = peft.LoraConfig(**data.draw(mixture_settings(name), label="config"))
    with tempfile.TemporaryDirectory() as temporary:
        check(base, config, Path(temporary))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("dora", [False, True])
def test_all_linear_layers(bases, tmp_path, name, dora):
    """Without stacked parameters in its configuration, PEFT puts them there itself where transformers fuses experts."""
    if dora and name != "gpt-oss":
        return  # PEFT has no DoRA for stacked parameters
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", use_dora=dora)
    check(bases(name), config, tmp_path)


def check(base, config: peft.LoraConfig, folder: Path) -> None:
    live = adapt(base, config, folder / "adapter")
    wanted = live_outputs(live, base)
    report = pa.merge(base.folder, folder / "adapter", folder / "out")
    assert_same_weights(report, base.folder, folder / "out", merged_by_peft(live, folder / "reference"))
    assert_same_outputs(loaded_outputs(base, folder / "out"), wanted)
    assert_config(base.folder, folder / "out")
    assert report.applied == report.given


# name of the mixture: what the experts' module and their layers were called when each was a module of its own
OLD = {
    "mixtral": ("block_sparse_moe", {"w1": (40, 24), "w3": (40, 24), "w2": (24, 40)}),
    "qwen3-moe": ("mlp", {"gate_proj": (20, 24), "up_proj": (20, 24), "down_proj": (24, 20)}),
}


@pytest.mark.parametrize("name", OLD)
def test_an_adapter_from_before_the_experts_were_stacked(bases, tmp_path, name):
    base = bases(name)
    block, layers = OLD[name]
    draw = torch.Generator().manual_seed(3)
    shapes = {f"{block}.experts.{e}.{layer}": shape for e in range(5) for layer, shape in layers.items()}
    shapes |= {f"{block}.gate": (5, 24), "self_attn.q_proj": (32, 24)}
    tensors = {}
    for number in range(2):
        for module, (out, fan_in) in shapes.items():
            path = f"base_model.model.model.layers.{number}.{module}"
            tensors[f"{path}.lora_A.weight"] = 0.3 * torch.randn(3, fan_in, generator=draw)
            tensors[f"{path}.lora_B.weight"] = 0.3 * torch.randn(out, 3, generator=draw)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": [*layers, "gate", "q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with quiet():
        live = peft.PeftModel.from_pretrained(base.fresh(), adapter).eval()

    report = pa.merge(base.folder, adapter, tmp_path / "out")

    reference = merged_by_peft(live, tmp_path / "reference")
    assert_same_weights(report, base.folder, tmp_path / "out", reference)
    assert report.applied == report.given == len(tensors)
    assert len(report.tensors) == len(tensors) // 2
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base.folder).keys()


def test_which_parameter_is_which_cannot_be_guessed(bases, tmp_path):
    """The keys of stacked parameters do not name them, so an unknown architecture with two is refused."""
    base = bases("qwen3-moe")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapt(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters), tmp_path / "adapter")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    names = {"experts.gate_up_proj": "experts.wide", "experts.down_proj": "experts.narrow"}
    state = base.model.state_dict()
    state = {re.sub("|".join(names), lambda found: names[found[0]], name): state[name] for name in state}
    save_file(state, stranger / "model.safetensors")
    (stranger / "config.json").write_text(json.dumps({"model_type": "stranger"}))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["target_parameters"] = list(names.values())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(pa.MatchError, match="which is which cannot be told"):
        pa.merge(stranger, tmp_path / "adapter", tmp_path / "out")
