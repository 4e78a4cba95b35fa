"""Folders with several adapters, between PEFT and this package: the same files, and the same outputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import ConfigError
from peftarray.model import PeftModel

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("LoraConfig", {"r": 4, "rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj", "v_proj"]}),
    "second": ("LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "third": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "fourth": ("OFTConfig", {"oft_block_size": 4, "target_modules": ["o_proj"]}),
    "fifth": ("LoHaConfig", {"r": 2, "target_modules": ["up_proj"]}),
}
IDS = np.asarray([[1, 7, 3, 2], [0, 1, 10, 5]])


@pytest.fixture(scope="module")
def live() -> Any:
    """PEFT's model with five adapters that are away from their first state."""
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    configs = {name: getattr(peft, kind)(**fields) for name, (kind, fields) in SETTINGS.items()}
    # PEFT wants one method for all that a model is made with, or its mixed model.
    models = {}
    for name, peft_config in configs.items():
        model = peft.get_peft_model(copy.deepcopy(base), peft_config, adapter_name=name)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                draw = torch.Generator().manual_seed(len(key))
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
        models[name] = model.eval()
    return base, models


@pytest.fixture
def folder(live, tmp_path) -> Path:
    for model in live[1].values():
        model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def ours(live: Any) -> PeftModel:
    base, _ = live
    made = pa.models.create(base.config.to_dict())
    weights = {name: array.detach().numpy() for name, array in base.state_dict().items()}
    return PeftModel(type(made)(made.config, weights, made.prefix))


def place(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def test_a_folder_of_peft_is_read_and_written_as_it_was(live, folder, tmp_path):
    model = ours(live)
    for name in SETTINGS:
        model.load_adapter(place(folder, name), name, lazy=True)
    for name, theirs in live[1].items():
        model.set_adapter(name)
        with torch.no_grad():
            wanted = theirs(torch.as_tensor(IDS)).logits.numpy()
        np.testing.assert_allclose(model(IDS), wanted, atol=2e-5)
    rows = ["second", "fourth"]
    mixed = model(IDS, adapter_names=rows)
    for i, name in enumerate(rows):
        with torch.no_grad():
            wanted = live[1][name](torch.as_tensor(IDS[i : i + 1])).logits.numpy()
        np.testing.assert_allclose(mixed[i : i + 1], wanted, atol=2e-5)

    model.save_pretrained(tmp_path / "ours")
    for name in SETTINGS:
        theirs, mine = place(folder, name), place(tmp_path / "ours", name)
        assert {path.name for path in mine.iterdir() if path.is_file()} <= {path.name for path in theirs.iterdir()}
        own, other = (safetensors.load_file(path / "adapter_model.safetensors") for path in (mine, theirs))
        assert own.keys() == other.keys()
        assert all(own[key].dtype == other[key].dtype and own[key].tobytes() == other[key].tobytes() for key in own)
        own, other = (json.loads((path / "adapter_config.json").read_text()) for path in (mine, theirs))
        for field in ("target_modules", "feedforward_modules", "exclude_modules"):
            for data in (own, other):
                data[field] = sorted(data[field]) if isinstance(data.get(field), list) else data.get(field)
        assert {field: own[field] for field in other} == other


def test_peft_reads_what_is_written(live, tmp_path):
    model = ours(live)
    for seed, (name, (kind, fields)) in enumerate(SETTINGS.items()):
        model.add_adapter(name, getattr(pa, kind)(**fields), seed=seed)
        model.set_adapter(name)
        draw = np.random.default_rng(seed)
        model.params = {
            key: array + 0.1 * draw.standard_normal(array.shape, np.float32) for key, array in model.params.items()
        }
    model.save_pretrained(tmp_path)
    for name in SETTINGS:
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(live[0]), place(tmp_path, name)).eval()
        model.set_adapter(name)
        with torch.no_grad():
            wanted = theirs(torch.as_tensor(IDS)).logits.numpy()
        np.testing.assert_allclose(model(IDS), wanted, atol=2e-5)


def test_fields_that_are_not_known_are_kept(live, folder, tmp_path):
    file = folder / "adapter_config.json"
    data = json.loads(file.read_text()) | {"runtime_config": {"ephemeral": 1}, "a_later_field": None, "another": []}
    file.write_text(json.dumps(data))
    model = ours(live)
    model.load_adapter(folder, "default")
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {field: again[field] for field in data if field not in ("target_modules", "inference_mode")} == {
        field: value for field, value in data.items() if field not in ("target_modules", "inference_mode")
    }

    file.write_text(json.dumps(data | {"trained_by": "me"}))
    with pytest.raises(ConfigError, match=r"no field 'trained_by' here.*may change the result"):
        model.load_adapter(folder, "set")
    for lazy in (False, True):
        name = f"allowed-{lazy}"
        model.load_adapter(folder, name, allow_unknown=True, lazy=lazy)
        model.save_pretrained(tmp_path / "allowed", [name])
        kept = json.loads((tmp_path / "allowed" / name / "adapter_config.json").read_text())
        assert kept["trained_by"] == "me"
    assert list(model.peft_config) == ["default", "allowed-False", "allowed-True"]
