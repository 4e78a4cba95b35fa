"""Adapters in PEFT's layout: the bytes that are written, what is refused, and folders that a crash leaves behind."""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import peftarray as pa
from peftarray.stores.safetensors import SafetensorsFile

CONFIG = pa.LoraConfig(r=1, lora_alpha=2, target_modules=["up"])
WEIGHT = np.ones((2, 3), np.float32)


def adapter(config=CONFIG, name="up", **values):
    """An adapter of one layer, with these arrays in place of the first ones."""
    made = config.init(WEIGHT, name=name)
    return replace(made, params={**made.params, **values})


def test_the_bytes_of_a_file(tmp_path):
    a, b = np.array([[1, 2, 3]], np.float32), np.array([[4], [5]], np.float32)
    pa.save_adapters(tmp_path, CONFIG, {"up": adapter(lora_A=a, lora_B=b)})
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"base_model.model.up.lora_A.weight":{"dtype":"F32","shape":[1,3],"data_offsets":[0,12]},'
        b'"base_model.model.up.lora_B.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[12,20]}}'
    )
    header += b" " * (-len(header) % 8)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert written == len(header).to_bytes(8, "little") + header + a.tobytes() + b.tobytes()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["inference_mode"] is True
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (1, 2, ["up"])
    assert list(settings) == sorted(settings)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_without_targets_the_adapted_modules_are_written(tmp_path):
    config = pa.LoraConfig(r=1)
    pa.save_adapters(tmp_path, config, {name: adapter(config, name) for name in ("b.up", "a.up")})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a.up", "b.up"]


def test_arrays_of_any_library_are_written_alike(tmp_path, asarray):
    params = {name: asarray(array) for name, array in adapter().params.items()}
    pa.save_adapters(tmp_path / "there", CONFIG, {"up": replace(adapter(), params=params)})
    pa.save_adapters(tmp_path / "here", CONFIG, {"up": adapter()})
    there, here = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("there", "here"))
    assert there == here


def test_loaded_arrays_lie_beside_their_weights(tmp_path, asarray, xp, device, to_numpy):
    pa.save_adapters(tmp_path, CONFIG, {"up": adapter()})
    weight = asarray(WEIGHT)
    loaded = pa.load_adapters(tmp_path, {"up.weight": weight}).adapters["up"]
    for name, array in loaded.params.items():
        assert type(array) is type(weight)
        assert array.dtype == weight.dtype
        assert str(array.device) == str(weight.device)
        np.testing.assert_array_equal(to_numpy(array), adapter().params[name])
    shaped = pa.load_adapters(tmp_path, {"up.weight": (2, 3)}).adapters["up"]
    assert all(type(array) is np.ndarray and array.dtype == np.float32 for array in shaped.params.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_written_as_they_are_and_read_as_float32(tmp_path, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    short = {name: array.astype(half) for name, array in adapter().params.items()}
    pa.save_adapters(tmp_path, CONFIG, {"up": replace(adapter(), params=short)})
    file = SafetensorsFile(tmp_path / "adapter_model.safetensors")
    assert {info.code for info in file.tensors.values()} == {"F16" if dtype == "float16" else "BF16"}
    for name, array in pa.load_adapters(tmp_path, {"up.weight": WEIGHT}).adapters["up"].params.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, short[name].astype(np.float32))


def test_what_layers_share_is_written_once_and_read_as_one(tmp_path):
    config = pa.VeraConfig(r=2)
    shared = {name: config.init(WEIGHT).params[name] for name in ("vera_A", "vera_B")}
    both = {name: adapter(config, name, **shared) for name in ("a.up", "b.up")}
    pa.save_adapters(tmp_path, config, both)
    tensors = SafetensorsFile(tmp_path / "adapter_model.safetensors").tensors
    assert [name for name in tensors if name.endswith(("vera_A", "vera_B"))] == [
        "base_model.vera_A",
        "base_model.vera_B",
    ]
    loaded = pa.load_adapters(tmp_path, {f"{name}.weight": WEIGHT for name in both}).adapters
    assert loaded["a.up"].params["vera_A"] is loaded["b.up"].params["vera_A"]

    both["b.up"] = adapter(config, "b.up", **{**shared, "vera_B": shared["vera_B"] + 1})
    with pytest.raises(pa.MatchError, match=r"b.up: base_model.vera_B differs from that of another layer"):
        pa.save_adapters(tmp_path, config, both)


def test_what_a_seed_gives_is_not_written(tmp_path):
    config = pa.VeraConfig(r=2, save_projection=False)
    pa.save_adapters(tmp_path, config, {"up": adapter(config)})
    names = SafetensorsFile(tmp_path / "adapter_model.safetensors").tensors
    assert set(names) == {"base_model.model.up.vera_lambda_b", "base_model.model.up.vera_lambda_d"}
    loaded = pa.load_adapters(tmp_path, {"up.weight": WEIGHT}).adapters["up"]
    np.testing.assert_array_equal(loaded.params["vera_A"], adapter(config).params["vera_A"])


REFUSED = {
    "no adapter": (CONFIG, {}, pa.ConfigError, "no adapters to save"),
    "not a target": (
        CONFIG,
        {"down": adapter()},
        pa.ConfigError,
        r"down has an adapter, and target_modules is \['up'\]",
    ),
    "another rank": (
        pa.LoraConfig(r=1, rank_pattern={"up": 2}),
        {"up": adapter(pa.LoraConfig(r=1))},
        pa.ConfigError,
        r"up: r is 1 in the adapter and 2 in the configuration for this name; make it with .*name='up'",
    ),
    "another method": (CONFIG, {"up": adapter(pa.LoHaConfig(r=1))}, pa.ConfigError, "up: the adapter is of LoHaConfig"),
    "an array is missing": (
        CONFIG,
        {"up": replace(adapter(), params={"lora_A": adapter().params["lora_A"]})},
        pa.MatchError,
        "up: the adapter lacks lora_B",
    ),
    "another shape": (CONFIG, {"up": adapter(lora_B=np.ones((3, 1)))}, pa.ShapeError, r"lora_B is \(3, 1\)"),
}


@pytest.mark.parametrize(("config", "adapters", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_read_otherwise_is_refused(tmp_path, config, adapters, kind, message):
    with pytest.raises(kind, match=message):
        pa.save_adapters(tmp_path / "out", config, adapters)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pa.OutputError, match=r"file/out cannot be written \(Not a directory\)"):
        pa.save_adapters(tmp_path / "file" / "out", CONFIG, {"up": adapter()})


def test_a_weight_that_a_method_reads_is_needed(tmp_path):
    config = pa.LoraConfig(r=1, kasa_config={"beta": 1e-4})
    pa.save_adapters(tmp_path, config, {"up": adapter(config)})
    with pytest.raises(pa.ConfigError, match="up: LoraConfig needs the weight itself, and got its shape"):
        pa.load_adapters(tmp_path, {"up.weight": (2, 3)})


class Stop(BaseException):
    """The process ends here: nothing after it runs, not even what catches errors."""


@pytest.mark.parametrize("steps", range(9))
def test_a_crash_never_mixes_two_adapters(tmp_path, monkeypatch, steps):
    old, new = pa.LoraConfig(r=1, lora_alpha=2), pa.LoraConfig(r=1, lora_alpha=64)
    pa.save_adapters(tmp_path, old, {"up": adapter(old, lora_A=np.full((1, 3), 2, np.float32))})
    left = iter(range(steps))

    def guarded(act):
        def step(*given, **named):
            if next(left, None) is None:
                raise Stop
            return act(*given, **named)

        return step

    for home, name in ((Path, "replace"), (Path, "unlink"), (Path, "open"), (os, "fsync")):
        monkeypatch.setattr(home, name, guarded(getattr(home, name)))
    try:
        pa.save_adapters(tmp_path, new, {"up": adapter(new, lora_A=np.full((1, 3), 64, np.float32))})
    except Stop:
        pass
    monkeypatch.undo()
    if (tmp_path / "adapter_config.json").exists():
        loaded = pa.load_adapters(tmp_path, {"up.weight": WEIGHT})
        assert loaded.config.lora_alpha == loaded.adapters["up"].params["lora_A"][0, 0]
    else:
        assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json.new"}
    pa.save_adapters(tmp_path, new, {"up": adapter(new)})  # over what was left
    assert pa.load_adapters(tmp_path, {"up.weight": WEIGHT}).config.lora_alpha == 64
    assert len(list(tmp_path.iterdir())) == 2


class TestWithPeft:
    """What lies beside the methods' own arrays, both ways."""

    @pytest.fixture
    def model(self):
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        parts = {"tokens": torch.nn.Embedding(12, 6), "up": torch.nn.Linear(6, 8), "head": torch.nn.Linear(8, 3)}

        class Reader(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.body = torch.nn.ModuleDict(copy.deepcopy(parts))

            def forward(self, rows):
                return self.body["head"](self.body["up"](self.body["tokens"](rows)).relu())

        return Reader()

    def test_attention_of_torch(self, tmp_path):
        """Its output projection has an adapter of its own, in the wrapper of a wrapper, which counts twice."""
        torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
        torch.manual_seed(0)

        class Attending(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = torch.nn.MultiheadAttention(6, 2)

            def forward(self, x):
                return self.attention(x, x, x)[0]

        model, x = Attending().eval(), torch.randn(3, 2, 6)
        live = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["attention"]))
        for parameter in live.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        live.save_pretrained(tmp_path / "peft")
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        loaded = pa.load_adapters(tmp_path / "peft", weights)
        pa.save_adapters(tmp_path / "ours", loaded.config, loaded.adapters)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert torch.equal(again(x), live.eval()(x))

    @pytest.mark.parametrize(
        "settings",
        [
            {"bias": "lora_only"},
            {"bias": "all"},
            {"modules_to_save": ["head"]},
            {"modules_to_save": ["head"], "bias": "all", "target_modules": ["tokens", "up"]},
            {"trainable_token_indices": {"tokens": [1, 5, 11]}},
            {"lora_bias": True},
        ],
        ids=str,
    )
    def test_folders_are_the_same_both_ways(self, tmp_path, model, settings):
        torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
        load_file = pytest.importorskip("safetensors.torch").load_file
        rows = torch.randint(12, (4, 5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            live = peft.get_peft_model(
                copy.deepcopy(model), peft.LoraConfig(**{"r": 2, "target_modules": ["up"]} | settings)
            )
            for parameter in live.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter)
            live.save_pretrained(tmp_path / "peft")
            weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
            loaded = pa.load_adapters(tmp_path / "peft", weights)
            pa.save_adapters(tmp_path / "ours", loaded.config, loaded.adapters, replace=loaded.replace)
            theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
            again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
        # With `bias="all"` PEFT adds the old values of modules that it saves whole, and a copy of the new ones.
        needed = {key for key in theirs if "original_module" not in key and "modules_to_save" not in key}
        assert set(ours) == needed
        assert all(torch.equal(ours[key], theirs[key]) for key in needed)
        assert torch.equal(again(rows), live(rows))
