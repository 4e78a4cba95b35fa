"""Folders combined: PEFT loads the result and computes the weighted sum of what it merges the sources to."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    layer_shapes,
    lora_config,
    lora_tensors,
    random_tensors,
    read_tensors,
    targets_of,
    write_adapter,
    write_base,
)

import peftarray as pa

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_oracle import adapt, assert_same_outputs, live_outputs, merged_by_peft, quiet  # noqa: E402
from tiny_models import Bases, outputs  # noqa: E402

CONVOLUTIONS = ["tokens", "line", "plane", "point", "space", "stack.down", "stack.up"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    torch.set_num_threads(1)
    return Bases(tmp_path_factory.mktemp("bases"))


def wanted_model(base, merged, weights):
    """The base with the weighted sum of what each adapter's merged weights differ by, in float64."""
    model = base.fresh().double()
    state = model.state_dict()
    for tensors, weight in zip(merged, weights, strict=True):
        for name, tensor in base.model.state_dict().items():
            if tensor.is_floating_point() and name in tensors:
                state[name] = state[name] + weight * (tensors[name].double() - tensor.double())
    model.load_state_dict(state)
    return model


CASES = {
    # Every kind of layer, other targets, ranks, scales and patterns.
    "convolutions": (
        "convolutions",
        [
            {"r": 3, "lora_alpha": 5, "target_modules": CONVOLUTIONS, "rank_pattern": {"plane": 2, "stack.up": 4}},
            {"r": 2, "target_modules": ["line", "up", "tokens"], "use_rslora": True, "alpha_pattern": {"line": 7}},
        ],
    ),
    "conv1d of transformers": (
        "projections",
        [
            {"r": 3, "target_modules": ["c_fc", "square"], "fan_in_fan_out": True},
            {"r": 2, "target_modules": ["square", "c_proj"], "fan_in_fan_out": True, "lora_alpha": 3},
        ],
    ),
    "attention of torch": (
        "attention",
        [{"r": 3, "target_modules": ["attn"]}, {"r": 2, "target_modules": "attn|final"}],
    ),
    "biases of lora": (
        "convolutions",
        [{"r": rank, "target_modules": ["stack.down", "stack.up"], "lora_bias": True} for rank in (2, 3)],
    ),
    "llama": (
        "llama",
        [{"r": 3, "target_modules": ["q_proj", "lm_head"]}, {"r": 2, "target_modules": ["q_proj", "down_proj"]}],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_peft_loads_the_sum(case, combination, bases, tmp_path):
    name, settings = CASES[case]
    base, weights = bases(name), [0.7, -1.3]
    merged = []
    for place, options in enumerate(settings):
        live = adapt(base, peft.LoraConfig(**options), tmp_path / f"{place}", seed=place + 1)
        merged.append(merged_by_peft(live, tmp_path / f"merged{place}"))
    rank = {"rank": 8} if combination == "svd" else {}
    folders = [tmp_path / "0", tmp_path / "1"]
    report = pa.combine_folders(folders, tmp_path / "out", weights, combination=combination, **rank)
    assert report.error < 1e-5
    with quiet():
        loaded = peft.PeftModel.from_pretrained(base.fresh(), tmp_path / "out").eval()
    wanted = wanted_model(base, merged, weights)
    found = outputs(copy.deepcopy(loaded).double(), base.batch())
    assert_same_outputs(found, outputs(wanted, base.batch()))
    assert (found - outputs(base.fresh().double(), base.batch())).abs().max() > 1e-2
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (config["lora_alpha"], config["alpha_pattern"])
    # And so does this package.
    pa.merge(base.folder, tmp_path / "out", tmp_path / "whole")
    state, ours = wanted.state_dict(), read_tensors(tmp_path / "whole")
    for tensor, array in ours.items():
        np.testing.assert_allclose(array, state[tensor].numpy(), rtol=0, atol=3e-6, err_msg=tensor)


@pytest.mark.parametrize(
    "configs",
    [
        [peft.LoraConfig(r=2, use_dora=True, target_modules=["stack.up", "plane", "tokens"])] * 2,
        [
            peft.LoHaConfig(r=2, target_modules=["stack.down", "plane"]),
            peft.LoraConfig(r=2, target_modules=["stack.down", "tokens"]),
        ],
        [
            peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["stack.up", "plane"]),
            peft.OFTConfig(oft_block_size=2, target_modules=["stack.up", "stack.down"]),
        ],
    ],
    ids=["dora", "loha", "adalora and oft"],
)
def test_any_method_with_the_base(configs, bases, tmp_path):
    base, weights = bases("convolutions"), [0.7, -0.4]
    merged = []
    for place, config in enumerate(configs):
        live = adapt(base, copy.deepcopy(config), tmp_path / f"{place}", seed=place + 1)
        merged.append(merged_by_peft(live, tmp_path / f"merged{place}"))
    folders = [tmp_path / "0", tmp_path / "1"]
    report = pa.combine_folders(folders, tmp_path / "out", weights, energy=1.0, base=base.folder)
    assert report.error < 1e-5
    with quiet():
        loaded = peft.PeftModel.from_pretrained(base.fresh(), tmp_path / "out").eval()
    assert_same_outputs(live_outputs(loaded, base), outputs(wanted_model(base, merged, weights), base.batch()))
    with pytest.raises(pa.UnsupportedError, match="give the base"):
        pa.combine_folders(folders, tmp_path / "none", weights, energy=1.0)
    assert not (tmp_path / "none").exists()


# Written byte by byte.


def two(tmp_path, first=None, second=None, *, more=()):
    """Two adapter folders: their configurations differ from the usual by `first` and `second`."""
    folders = []
    for place, changes in enumerate((first or {}, second or {})):
        extra = dict(more[place]) if place < len(more) else {}
        tensors = lora_tensors(targets_of(), seed=place + 1) | extra
        write_adapter(tmp_path / f"a{place}", tensors, lora_config(**changes))
        folders.append(tmp_path / f"a{place}")
    return folders


def test_merging_both_is_merging_the_combination(tmp_path):
    write_base(tmp_path / "base")
    folders = two(tmp_path, second={"lora_alpha": 1})
    report = pa.combine_folders(folders, tmp_path / "sum", [0.5, -2.0])
    pa.merge(tmp_path / "base", folders, tmp_path / "one", scale=[0.5, -2.0])
    pa.merge(tmp_path / "base", tmp_path / "sum", tmp_path / "two")
    one, other = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert [(kind.name, kind.modules, kind.most_rank) for kind in report.kinds] == [
        ("q_proj", 2, 4),
        ("down_proj", 2, 4),
    ]
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "down_proj"]
    assert (config["base_model_name_or_path"], config["task_type"], config["rank_pattern"]) == ("tiny", "CAUSAL_LM", {})


def test_the_same_seed_gives_the_same_bytes_wherever_the_folders_lie(tmp_path):
    files = []
    for place in ("x", "y"):
        folders = two(tmp_path / place)
        pa.combine_folders(folders, tmp_path / place / "out", combination="dare_ties_svd", density=0.5, seed=3)
        files.append((tmp_path / place / "out" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    pa.combine_folders(folders, tmp_path / "z", combination="dare_ties_svd", density=0.5, seed=4)
    assert (tmp_path / "z" / "adapter_model.safetensors").read_bytes() != files[0]


def test_a_layer_alone_gets_the_rank_that_a_pattern_gives_it_alone(tmp_path):
    """`proj` is the end of other names, so that a plain pattern would mean those as well."""
    weights = {name: np.ones((6, 5), np.float32) for name in ("proj.weight", "block.proj.weight", "block.a+b.weight")}
    for place, (rank, names) in enumerate([(2, ["proj", "block.proj"]), (3, ["block.proj"]), (1, ["block.a+b"])]):
        config = pa.LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
        made = {name: config.init(weights[f"{name}.weight"], name=name, seed=place) for name in names}
        if place == 1:
            made = {"block.proj": made["block.proj"]}
        pa.save_adapters(tmp_path / f"{place}", config, made)
    pa.combine_folders([tmp_path / f"{place}" for place in range(3)], tmp_path / "out")
    found = pa.load_adapters(tmp_path / "out", weights)
    assert {name: adapter.config.r for name, adapter in found.adapters.items()} == {
        "proj": 2,
        "block.proj": 5,
        "block.a+b": 1,
    }
    assert all(adapter.config.scale == 1 for adapter in found.adapters.values())


# What adapters hold besides.

NORM = "model.layers.0.input_layernorm"


def test_heads_and_rows_of_one_adapter_stay_as_they_are(tmp_path):
    head = random_tensors({f"{PREFIX}lm_head.weight": (16, 8)}, np.float32, 5)
    rows = random_tensors({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}, np.float32, 6)
    base = write_base(tmp_path / "base")
    folders = two(tmp_path, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 11]}, more=(head, rows))
    report = pa.combine_folders(folders, tmp_path / "out", [2.0, 3.0])
    assert len(report.notes) == 2
    assert report.notes[0].startswith("lm_head.weight is that of ")
    pa.merge(tmp_path / "base", tmp_path / "out", tmp_path / "whole")
    found = read_tensors(tmp_path / "whole")
    np.testing.assert_array_equal(found["lm_head.weight"], head[f"{PREFIX}lm_head.weight"])
    np.testing.assert_allclose(found["model.embed_tokens.weight"][[3, 11]], next(iter(rows.values())), rtol=1e-6)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"][:3], base["model.embed_tokens.weight"][:3])
    again = pa.combine_folders([folders[0], tmp_path / "out"], tmp_path / "again")  # both have the same head
    assert any(note.startswith("lm_head.weight") for note in again.notes)


def test_trained_biases_of_one_adapter_stay_as_they_are(tmp_path):
    bias = {f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": np.arange(8, dtype=np.float32)}
    folders = two(tmp_path, {"bias": "lora_only"}, more=(bias,))
    pa.combine_folders(folders, tmp_path / "out")  # the other one adds to the weight of this module
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] == "lora_only"
    found = read_tensors(tmp_path / "out")
    for key, array in bias.items():
        np.testing.assert_array_equal(found[key], array)


def other_prefix(tensors):
    return {key.replace(f"{PREFIX}model.", PREFIX): array for key, array in tensors.items()}


REFUSED = {
    "two heads": (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        [random_tensors({f"{PREFIX}lm_head.weight": (16, 8)}, np.float32, seed) for seed in (1, 2)],
        pa.MatchError,
        r"lm_head\.weight differs between .*a0 and .*a1; .* leave it out of all but one",
    ),
    "a head that another adapts": (
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
        [
            random_tensors({f"{PREFIX}lm_head.weight": (16, 8)}, np.float32, 1),
            lora_tensors({"lm_head": (16, 8)}),
        ],
        pa.MatchError,
        "replaces the model's own, and .*a1 adds to it as it was before",
    ),
    "other rows": (
        {"trainable_token_indices": [3]},
        {"trainable_token_indices": [4]},
        [{f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 8), np.float32)}] * 2,
        pa.MatchError,
        "train other rows of the embedding",
    ),
    "storage": ({"fan_in_fan_out": True}, {}, [], pa.ConfigError, "fan_in_fan_out is True in one adapter and False"),
    "tied": ({"ensure_weight_tying": True}, {}, [], pa.UnsupportedError, "a0 cannot be combined: ensure_weight_tying"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, [], pa.UnsupportedError, "changed the base's weights before"),
    "dora": (
        {"use_dora": True},
        {},
        [
            {
                f"{PREFIX}{module}.lora_magnitude_vector": np.ones(shape[0], np.float32)
                for module, shape in targets_of().items()
            }
        ],
        pa.UnsupportedError,
        "DoRA adds depends on the weight that it is added to; give the base",
    ),
    "rank": ({"r": 3}, {}, [], pa.ShapeError, r"lora_A is \(2, 8\); this layer .* wants \(r=3"),
    "blocks": (
        {"use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 2}},
        {},
        [],
        pa.UnsupportedError,
        "do not tell the shapes of the layers; give the base",
    ),
    "a tensor of no method": (
        {},
        {},
        [{f"{PREFIX}model.layers.0.self_attn.q_proj.lora_C.weight": np.ones((2, 2), np.float32)}],
        pa.MatchError,
        "lora_C has no place in LoraConfig",
    ),
    "no entries": (
        {},
        {},
        [{f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight": np.ones((0, 2), np.float32)}],
        pa.ShapeError,
        r"q_proj is \(0, 8\), which has no entries",
    ),
    "half an embedding": (
        {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        {},
        [{f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 16), np.float32)}],
        pa.MatchError,
        "embed_tokens: the adapter lacks lora_B",
    ),
    "a scale that overflows": ({"lora_alpha": 1e300}, {}, [], pa.NumberError, "NaN or infinity"),
    "numbers": (
        {},
        {},
        [{f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": np.full((2, 8), np.nan, np.float32)}],
        pa.NumberError,
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing_behind(case, tmp_path):
    first, second, more, error, words = REFUSED[case]
    folders = two(tmp_path, first, second, more=more)
    with pytest.raises(error, match=words):
        pa.combine_folders(folders, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1"]


def test_layers_of_other_shapes_and_names(tmp_path):
    shapes = layer_shapes(0, hidden=10)
    wider = {name: shapes[name] for name in shapes if name.endswith(("q_proj", "down_proj"))}
    write_adapter(tmp_path / "a", lora_tensors(targets_of(1)))
    write_adapter(tmp_path / "b", lora_tensors(wider))
    write_adapter(tmp_path / "c", other_prefix(lora_tensors(targets_of(1))))
    with pytest.raises(pa.ShapeError, match=r"is linear \(8, 8\) in one adapter and linear \(10, 10\) in another"):
        pa.combine_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(pa.MatchError, match="call their layers by names with another beginning"):
        pa.combine_folders([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    write_base(tmp_path / "base", layers=1)
    with pytest.raises(pa.MatchError, match=r"call one layer model\.layers\.0\.\S+ and layers\.0"):
        pa.combine_folders([tmp_path / "a", tmp_path / "c"], tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
