"""What a merge says it did: figures worked by hand, the gate on quality, JSON, and plans of huge models in seconds."""

from __future__ import annotations

import json
import math
import time

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    lora_config,
    read_tensors,
    tree,
    write_adapter,
    write_base,
    write_index,
    write_sparse,
)
from refusals import CommandLine, one_line

import peftarray as pa

BF16 = ml_dtypes.bfloat16
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


def write_pair(place, weight, up, down, *, dtype=BF16, alpha=1, more=None):
    """A base of one adapted matrix (and others), and an adapter of rank 1 with the scale `alpha`."""
    tensors = {f"{NAME}.weight": np.array(weight).astype(dtype)}
    tensors |= {name: np.array(array).astype(dtype) for name, array in (more or {}).items()}
    write_base(place / "base", tensors, layers=1)
    factors = {"lora_A": np.array([down], np.float32), "lora_B": np.array(up, np.float32)[:, None]}
    write_adapter(
        place / "adapter",
        {f"{PREFIX}{NAME}.{local}.weight": array for local, array in factors.items()},
        lora_config(r=1, lora_alpha=alpha, target_modules=["q_proj"]),
    )
    return place / "base", place / "adapter", place / "out"


# bfloat16 keeps 8 significant bits: its neighbours of 1 are 1 - 1/256 and 1 + 1/128, those of 2 are 2 - 1/128 and
# 2 + 1/64. With D = B A = [1, 2]^T [1/256, 1/128] = [[1/256, 1/128], [1/128, 1/64]]:
#
#     W = [[1, 1], [2, -1]]    W + D = [[1 + 1/256, 1 + 1/128], [2 + 1/128, -1 + 1/64]]
#
#   - 1 + 1/256 is half-way between 1 and 1 + 1/128, and goes to the even one, 1: nothing is left of this entry.
#   - 1 + 1/128 is stored as it is.
#   - 2 + 1/128 is half-way between 2 and 2 + 1/64, and goes to 2: nothing is left of this entry either.
#   - -1 + 1/64 = -252/256 is stored as it is.
#
# In units of 1/256: D = [[1, 2], [2, 4]], |D|^2 = 25, E = W' - W - D = [[-1, 0], [-2, 0]], |E|^2 = 5, <D, E> = -5.
# |W|^2 = 7. So update = 5 / 256 / sqrt 7, error = sqrt(5 / 25), retained = 1 - 5 / 25 = 0.8, unchanged 2 of 4,
# cosine = <D, D + E> / (|D| |D + E|) = 20 / (5 sqrt 20).
WEIGHT, UPS, DOWNS = [[1, 1], [2, -1]], [1, 2], [1 / 256, 1 / 128]


def test_figures_worked_by_hand(tmp_path):
    base, adapter, out = write_pair(tmp_path, WEIGHT, UPS, DOWNS)
    report = pa.merge(base, adapter, out)
    stored = read_tensors(out)[f"{NAME}.weight"].astype(np.float64)
    assert stored.tolist() == [[1, 1 + 1 / 128], [2, -1 + 1 / 64]]
    (tensor,) = report.tensors
    assert (tensor.name, tensor.dtype) == (f"{NAME}.weight", "bfloat16")
    assert tensor.update == pytest.approx(5 / 256 / math.sqrt(7), rel=1e-6)
    assert tensor.error == pytest.approx(math.sqrt(5 / 25), rel=1e-6)
    assert tensor.retained == pytest.approx(0.8, rel=1e-6)
    assert tensor.cosine == pytest.approx(20 / (5 * math.sqrt(20)), rel=1e-6)
    assert tensor.unchanged == 0.5
    assert tensor.nonfinite == 0
    assert report.retained == pytest.approx(0.8, rel=1e-6)
    assert report.flagged == (tensor,)
    assert report.empty == ()
    assert (report.applied, report.given, report.copied) == (2, 2, 0)


def test_whole_is_weighted_by_size(tmp_path):
    """A second tensor, whose update is held, counts by the energy of its update."""
    base, adapter, out = write_pair(tmp_path, WEIGHT, UPS, DOWNS, more={"model.norm.weight": [1, 1]})
    tensors = read_tensors(adapter)
    second = NAME.replace("q_proj", "v_proj")
    for local, array in (("lora_A", [[1, 0]]), ("lora_B", [[5 / 256], [0]])):
        tensors[f"{PREFIX}{second}.{local}.weight"] = np.array(array, np.float32)
    write_adapter(adapter, tensors, lora_config(r=1, lora_alpha=1, target_modules=["q_proj", "v_proj"]))
    write_base(base, read_tensors(base) | {f"{second}.weight": np.zeros((2, 2), BF16)}, layers=1)
    report = pa.merge(base, adapter, out)
    found = {tensor.name: tensor for tensor in report.tensors}
    assert found[f"{second}.weight"].retained == 1
    assert found[f"{second}.weight"].update == math.inf  # nothing was there
    # |D|^2 is 25 in both, |E|^2 is 5 and 0: 1 - 5 / 50.
    assert report.retained == pytest.approx(0.9, rel=1e-6)
    assert report.copied == 1


def test_float32_holds_it_all(tmp_path):
    base, adapter, out = write_pair(tmp_path, WEIGHT, UPS, DOWNS)
    report = pa.merge(base, adapter, out, dtype="float32")
    (tensor,) = report.tensors
    assert (tensor.dtype, tensor.retained, tensor.error, tensor.cosine) == ("float32", 1.0, 0.0, pytest.approx(1.0))
    assert tensor.unchanged == 0.0
    assert report.flagged == ()
    delta = np.outer(UPS, DOWNS)
    np.testing.assert_array_equal(read_tensors(out)[f"{NAME}.weight"], np.array(WEIGHT) + delta)


def test_update_of_zero_is_called_empty(tmp_path, cli):
    base, adapter, out = write_pair(tmp_path, WEIGHT, [0, 0], DOWNS)
    assert cli("merge", base, adapter, "-o", out) == 0, cli.err
    assert "update is zero         in 1 of 1 tensors" in cli.out
    (tensor,) = pa.merge(base, adapter, tmp_path / "again").empty
    assert (tensor.name, tensor.update, tensor.unchanged, tensor.retained) == (f"{NAME}.weight", 0.0, 1.0, 1.0)
    assert read_tensors(out)[f"{NAME}.weight"].tobytes() == np.array(WEIGHT).astype(BF16).tobytes()


def test_scale_of_zero_is_said_to_change_nothing(tmp_path):
    base, adapter, out = write_pair(tmp_path, WEIGHT, UPS, DOWNS)
    report = pa.merge(base, adapter, out, scale=0)
    assert report.tensors == ()
    assert any("has the scale 0 and changes nothing" in note for note in report.notes)
    assert read_tensors(out)[f"{NAME}.weight"].tobytes() == np.array(WEIGHT).astype(BF16).tobytes()


def test_infinite_entries_of_the_base_are_counted(tmp_path):
    base, adapter, out = write_pair(tmp_path, [[1, math.inf], [math.nan, -1]], UPS, DOWNS)
    report = pa.merge(base, adapter, out, verify=True)
    (tensor,) = report.tensors
    assert tensor.nonfinite == 2
    stored = read_tensors(out)[f"{NAME}.weight"].astype(np.float64)
    np.testing.assert_array_equal(stored, [[1, math.inf], [math.nan, -1 + 1 / 64]])
    # What is left: D = [1, 4], E = [-1, 0] in units of 1/256.
    assert tensor.retained == pytest.approx(1 - 1 / 17, rel=1e-6)


@pytest.fixture
def lost(tmp_path):
    """An update of a thousandth of what bfloat16 can tell apart."""
    rng = np.random.default_rng(0)
    weight = 1 + rng.random((64, 64))
    return write_pair(tmp_path, weight, 1e-5 * rng.standard_normal(64), rng.random(64))


def test_update_that_bfloat16_cannot_hold_is_flagged(lost, cli):
    base, adapter, out = lost
    assert cli("merge", base, adapter, "-o", out) == 0, cli.err
    assert "LOST IN ROUNDING" in cli.out
    assert "--dtype float32 keeps it" in cli.out
    assert NAME in cli.out
    report = pa.merge(base, adapter, out.with_name("again"))
    assert report.flagged[0].unchanged > 0.99
    assert report.retained < 0.1
    assert read_tensors(out)[f"{NAME}.weight"].tobytes() == read_tensors(base)[f"{NAME}.weight"].tobytes()


def test_gate_on_quality(lost, cli):
    base, adapter, out = lost
    arguments = ("merge", base, adapter, "-o", out)
    before = tree(base) | tree(adapter)
    assert cli(*arguments, "--fail-if-retained-below", "0.9") == 3
    one_line(cli.err, ("0.9 was asked", NAME, "--dtype float32", "run again without the gate"))
    assert not cli.out
    assert not out.exists()
    assert tree(base) | tree(adapter) == before
    # Both ways out that the message names.
    assert cli(*arguments) == 0, cli.err
    assert out.exists()
    again = out.with_name("again")
    wide = ("--dtype", "float32", "--fail-if-retained-below", "0.99", "--verify")
    assert cli("merge", base, adapter, "-o", again, *wide) == 0, cli.err
    assert pa.verify(base, adapter, again).passed


def strictly(text: str):
    """JSON as the standard has it, which knows no NaN and no infinity."""

    def refuse(name: str):
        pytest.fail(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("weight", [WEIGHT, [[0, 0], [0, 0]]], ids=["usual", "zeros"])
def test_json(tmp_path, cli, weight):
    base, adapter, out = write_pair(tmp_path, weight, UPS, DOWNS)
    assert cli("merge", base, adapter, "-o", out, "--json") == 0, cli.err
    found = strictly(cli.out)
    assert found["out"] == str(out)
    assert (found["applied"], found["given"], found["dry_run"]) == (2, 2, False)
    (tensor,) = found["tensors"]
    assert tensor["name"] == f"{NAME}.weight"
    assert tensor["retained"] == found["whole"]["retained"] == pytest.approx(0.8 if weight is WEIGHT else 1.0)
    assert not cli.err


def test_dry_run_writes_nothing_and_states_the_memory(tmp_path, cli):
    base, adapter, out = write_pair(tmp_path, WEIGHT, UPS, DOWNS)
    before = tree(tmp_path)
    assert cli("merge", base, adapter, "-o", out, "--dry-run") == 0, cli.err
    assert "would apply 2 of 2 adapter tensors" in cli.out
    assert "of weights at once" in cli.out
    assert cli("merge", base, adapter, "-o", out, "--dry-run", "--json") == 0, cli.err
    found = strictly(cli.out)
    assert found["dry_run"]
    assert found["memory"] > 0
    assert found["tensors"] == []
    assert tree(tmp_path) == before


# Plans of models that no test could hold: files that are holes, with headers that are whole.


def write_huge(place, layers, hidden, inner, shards):
    """A bfloat16 Llama of these dimensions and an adapter for all of its linear layers. Returns its bytes."""
    (place / "base").mkdir()
    (place / "adapter").mkdir()
    linear = {
        **dict.fromkeys(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (hidden, hidden)
        ),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)),
        "mlp.down_proj": (hidden, inner),
    }
    groups = [{} for _ in range(shards)]
    factors = {}
    for layer in range(layers):
        for name, shape in linear.items():
            module = f"model.layers.{layer}.{name}"
            groups[layer * shards // layers][f"{module}.weight"] = shape
            factors[f"{PREFIX}{module}.lora_A.weight"] = (8, shape[1])
            factors[f"{PREFIX}{module}.lora_B.weight"] = (shape[0], 8)
        groups[layer * shards // layers][f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    groups[0]["model.embed_tokens.weight"] = groups[-1]["lm_head.weight"] = (128_256, hidden)
    total, weight_map = 0, {}
    for i, shapes in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        total += write_sparse(place / "base" / file, shapes)
        weight_map |= dict.fromkeys(shapes, file)
    write_index(place / "base", weight_map)
    (place / "base" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    write_sparse(place / "adapter" / "adapter_model.safetensors", factors)
    names = [name.rpartition(".")[2] for name in linear]
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(lora_config(r=8, target_modules=names)))
    return total


def test_plan_of_400_gigabytes_takes_seconds(tmp_path, record_property):
    try:
        total = write_huge(tmp_path, layers=110, hidden=12_288, inner=32_768, shards=90)
    except OSError as error:
        pytest.skip(f"no files with holes here: {error}")
    assert total > 400e9
    merge = pa.merge  # imported now
    began = time.perf_counter()
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dry_run=True)
    seconds = time.perf_counter() - began
    record_property("seconds", seconds)
    print(f"\nplan of {total / 1e9:.0f} GB: {seconds:.2f} s")
    assert (report.applied, report.given, report.copied) == (1540, 1540, 112)
    assert report.nbytes > total
    assert report.memory < 1 << 30
    assert seconds < 3 * 2  # two seconds are the aim; machines that test are shared
    assert not (tmp_path / "out").exists()
