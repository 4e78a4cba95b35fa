"""Adapters leave memory and come back as they were: least recently used first, never a changed one lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import FormatError, LoraConfig, MatchError
from peftarray.model import PeftModel, verbs

from ..model.cases import CONFIGS, base_weights, moved, run

IDS = np.asarray([[1, 7, 3], [0, 1, 10]])


@pytest.fixture
def base(asarray) -> dict[str, Any]:
    return {name: asarray(array) for name, array in base_weights().items()}


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Adapters of several methods on the disk."""
    names = {"a": "lora", "b": "dora", "c": "vera", "d": "lora-saved"}
    model = PeftModel(base_weights())
    for name, kind in names.items():
        model.add_adapter(name, CONFIGS[kind])
        model.set_adapter(name)
        model.params = moved(model.params, np.asarray, np.asarray)
    model.save_pretrained(tmp_path / "saved")
    return {name: tmp_path / "saved" / name for name in names}


def inside(model: PeftModel) -> str:
    return "".join(name for name, entry in model.registry.entries.items() if entry.in_memory)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_least_recently_used_leaves_first(base, folders, asarray, to_numpy):
    model, whole = PeftModel(base), PeftModel(base)
    for name, folder in folders.items():
        model.load_adapter(folder, name)
        whole.load_adapter(folder, name)
    model.set_capacity(2)
    assert inside(model) == "ad"  # a is active
    for name, now in (("b", "bd"), ("c", "bc"), ("b", "bc"), ("a", "ab"), ("d", "ad")):
        model.set_adapter(name)
        assert inside(model) == now
        whole.set_adapter(name)
        np.testing.assert_array_equal(
            to_numpy(run(model.weights, asarray(IDS))), to_numpy(run(whole.weights, asarray(IDS)))
        )
    model.weights_for(["a", "b"])
    assert inside(model) == "abd"  # a batch has what it needs, and the active one stays
    model.set_adapter(["b", "c"])
    assert inside(model) == "bc"
    model.set_capacity(None)
    model.set_adapter("d")
    assert inside(model) == "bcd"


def test_files_are_read_when_they_are_used(base, folders, monkeypatch, asarray, to_numpy):
    model = PeftModel(base)
    model.load_adapter(folders["a"], "a")
    read: list[Path] = []
    original = verbs.load_adapter

    def load(base: Any, folder: Path, **options: Any) -> Any:
        read.append(folder)
        return original(base, folder, **options)

    again = PeftModel.from_pretrained(base, folders["c"], adapter_name="c")
    monkeypatch.setattr(verbs, "load_adapter", load)
    for name in "bcd":
        model.load_adapter(folders[name], name, lazy=True)
    assert (read, inside(model)) == ([], "a")
    assert [type(config).__name__ for config in model.peft_config.values()] == [
        "LoraConfig",
        "LoraConfig",
        "VeraConfig",
        "LoraConfig",
    ]
    assert {item.adapter: item.dtype for item in model.status()}["c"] == ""
    model.set_adapter("c")
    assert read == [folders["c"]]
    np.testing.assert_array_equal(
        to_numpy(run(model.weights, asarray(IDS))), to_numpy(run(again.weights, asarray(IDS)))
    )
    model.weights_for(["b", None, "c", "b"])
    assert read == [folders["c"], folders["b"]]
    assert inside(model) == "abc"


@pytest.mark.parametrize("to_disk", [True, False], ids=["disk", "host"])
def test_a_changed_adapter_is_never_lost(to_disk, base, folders, tmp_path, asarray, to_numpy):
    model = PeftModel(base)
    for name in "abcd":
        model.load_adapter(folders[name], name, is_trainable=name != "b")
    model.add_adapter("new", CONFIGS["oft"], seed=4)
    before = {name: files(folder) for name, folder in folders.items()}
    wanted = {}
    for name in ("a", "c", "d", "new"):
        model.set_adapter(name)
        model.params = {key: asarray(to_numpy(array) + 0.25) for key, array in model.params.items()}
        wanted[name] = {key: to_numpy(array) for key, array in model.params.items()}
    model.set_capacity(1, tmp_path / "spill" if to_disk else None)
    assert inside(model) == "new"
    assert (tmp_path / "spill").is_dir() == to_disk
    for name, params in wanted.items():
        model.set_adapter(name)
        assert inside(model) == name
        assert list(model.params) == list(params)
        for key, array in model.params.items():
            assert type(array) is type(base["lm_head.weight"])
            np.testing.assert_array_equal(to_numpy(array), params[key])
    assert {name: files(folder) for name, folder in folders.items()} == before


def test_what_is_loaded_is_saved_bit_for_bit(folders, tmp_path):
    model = PeftModel(base_weights())
    for name, folder in folders.items():
        model.load_adapter(folder, name, lazy=True)
    model.set_capacity(1)
    model.save_pretrained(tmp_path / "again")
    for name, folder in folders.items():
        assert files(tmp_path / "again" / name) == files(folder)
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["b"]
    with pytest.raises(MatchError, match="there is no adapter 'e'"):
        model.save_pretrained(tmp_path / "two", selected_adapters=["b", "e"])
    assert not (tmp_path / "two").exists()


def test_a_folder_without_an_adapter_is_refused_when_it_is_named(folders):
    model = PeftModel(base_weights())
    model.load_adapter(folders["a"], "a")
    (folders["b"] / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(FormatError):
        model.load_adapter(folders["b"], "b", lazy=True)
    assert list(model.peft_config) == ["a"]


def test_a_prompt_whose_encoder_no_file_holds_stays(tmp_path):
    base = pa.models.create({"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2})
    model = PeftModel(base)
    model.add_adapter("p", pa.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=4))
    model.add_adapter("q", pa.PromptTuningConfig(num_virtual_tokens=3))
    model.add_adapter("r", LoraConfig(r=2, target_modules=["c_attn"]))
    values = dict(model.get_adapter("p").values)
    model.set_adapter("r")
    model.set_capacity(1, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]
    model.set_adapter("p")
    assert {name: array.tobytes() for name, array in model.params.items()} == {
        name: array.tobytes() for name, array in values.items()
    }


def test_a_name_that_was_another_adapters_loses_nothing(tmp_path):
    """What lies in the spill folder under a name stays, though its adapter was renamed and the name taken again."""
    model = PeftModel(base_weights())
    model.set_capacity(1, tmp_path)
    for seed, name in enumerate(("a", "z")):
        model.add_adapter(name, CONFIGS["lora"], seed=seed)
    model.set_adapter("z")
    model.rename_adapter("a", "b")
    model.add_adapter("a", CONFIGS["lora"], seed=2)
    model.load_adapter(tmp_path / "a", "copy", lazy=True)
    model.set_adapter("copy")
    seeds = {"b": 0, "a": 2, "z": 1}
    for name, seed in seeds.items():
        model.set_adapter(name)
        fresh = PeftModel(base_weights())
        fresh.add_adapter("own", CONFIGS["lora"], seed=seed)
        assert {key: array.tobytes() for key, array in model.params.items()} == {
            key: array.tobytes() for key, array in fresh.params.items()
        }


def test_what_was_trained_in_place_is_written(folders, tmp_path):
    model = PeftModel(base_weights())
    model.load_adapter(folders["a"], "a", is_trainable=True)
    model.load_adapter(folders["c"], "c")
    key, array = next(iter(model.params.items()))
    array += 1.0  # as an optimiser of torch's does
    wanted = array.copy()
    model = model.freeze()
    model.set_capacity(1, tmp_path / "spill")
    model.set_adapter("c")
    assert inside(model) == "c"
    model.set_adapter("a")
    np.testing.assert_array_equal(model.unfreeze().params[key], wanted)
