"""Folders that are not what they should be: indexes that lie, shards that are missing, pipes and pickles."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
from checkpoints import (
    base_shapes,
    lora_tensors,
    random_tensors,
    targets_of,
    write_adapter,
    write_base,
    write_index,
    write_tensors,
)
from refusals import CommandLine, run_process

TENSORS = random_tensors(base_shapes(), np.float32, 0)
NAMES = list(TENSORS)
FIRST, LAST = NAMES[0], NAMES[-1]
ADAPTER = lora_tensors(targets_of())


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def refused(cli, tmp_path):
    """`refused(*words)`: whatever lies in base and adapter by now, their merge is refused with these words."""

    def check(*words):
        places = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
        return cli.refuses(tmp_path, *places, words=words)

    return check


@pytest.fixture
def sharded(tmp_path):
    """A base of three shards, and an adapter for it. Returns the folder of the base and its index."""
    write_base(tmp_path / "base", TENSORS, shards=3)
    write_adapter(tmp_path / "adapter", ADAPTER)
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    return tmp_path / "base", index["weight_map"]


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "{place}/outside.safetensors", "..\\outside.safetensors", "..", "/", "../base"),
        *("sub/inside.safetensors", "sub\\inside.safetensors", "./model-00001-of-00003.safetensors", ".", ""),
        *("model-00001-of-00003.safetensors/", "model.bin", "config.json", "a\0.safetensors"),
    ],
)
def test_index_that_points_elsewhere(sharded, refused, tmp_path, name):
    folder, weight_map = sharded
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        write_tensors(place, {FIRST: TENSORS[FIRST]})
    write_index(folder, weight_map | {FIRST: name.format(place=tmp_path)})
    refused("index.json", "names the shard", "in the same folder")


@pytest.mark.parametrize("name", ["absent.safetensors", "x" * 300 + ".safetensors"])
def test_index_with_a_missing_shard(sharded, refused, name):
    folder, weight_map = sharded
    write_index(folder, weight_map | {FIRST: name})
    if name.startswith("absent"):
        refused("names the shard absent", "download the missing file")
    else:
        refused("cannot be read", "name too long")


def test_shard_that_was_not_downloaded(sharded, refused):
    folder, _ = sharded
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused("model-00002-of-00003.safetensors", "download the missing file")


def test_shard_that_lacks_a_tensor_of_the_index(sharded, refused):
    folder, weight_map = sharded
    write_index(folder, weight_map | {FIRST: weight_map[LAST]})
    refused(FIRST, weight_map[LAST], "does not hold it", "other files")


def test_same_tensor_in_two_shards(sharded, refused):
    folder, weight_map = sharded
    names = [name for name, file in weight_map.items() if file == weight_map[LAST]]
    write_tensors(folder / weight_map[LAST], {name: TENSORS[name] for name in [*names, FIRST]})
    refused(FIRST, weight_map[FIRST], weight_map[LAST], "remove it")


@pytest.mark.parametrize("weight_map", [None, 5, [], "model.safetensors", {FIRST: 5}, {FIRST: None}, {FIRST: ["a"]}])
def test_index_that_maps_to_no_names(sharded, refused, weight_map):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused("weight_map must map", "save the index again")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000])
def test_index_that_is_no_index(sharded, refused, text):
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(text)
    refused("model.safetensors.index.json")


def test_index_without_tensors(sharded, refused):
    folder, _ = sharded
    write_index(folder, {})
    refused("none of the adapter's 8 tensors")


def test_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    """Opening a pipe waits for a writer who never comes."""
    write_adapter(tmp_path / "adapter", ADAPTER)
    (tmp_path / "base").mkdir()
    os.mkfifo(tmp_path / "base" / "model.safetensors")
    os.mkfifo(tmp_path / "base" / "config.json")
    done = run_process("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", limit=20)
    assert done.returncode == 1
    assert "no .safetensors file" in done.stderr


def test_pickles_are_never_loaded(tmp_path, refused):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    write_base(tmp_path / "base", TENSORS)
    write_adapter(tmp_path / "adapter", ADAPTER)
    trap = pickle.dumps(Trap())
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "kept")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(trap)
    refused("adapter_model.bin", "never loaded", "convert it", "weights_only=True")
    (tmp_path / "kept").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(trap)
    refused("pytorch_model.bin", "never loaded", "safe_serialization=True")


@pytest.mark.parametrize("config", ["{", "[]", '{"a": 1, "a": 2}', "null"])
def test_broken_configuration_of_the_base(tmp_path, refused, config):
    write_base(tmp_path / "base", TENSORS)
    write_adapter(tmp_path / "adapter", ADAPTER)
    (tmp_path / "base" / "config.json").write_text(config)
    refused("config.json")


def test_nothing_where_the_base_or_the_adapter_should_be(tmp_path, cli):
    write_base(tmp_path / "base", TENSORS)
    write_adapter(tmp_path / "adapter", ADAPTER)
    (tmp_path / "empty").mkdir()
    base, adapter, empty, absent = (tmp_path / name for name in ("base", "adapter", "empty", "absent"))
    out = ("-o", tmp_path / "out")
    cli.refuses(tmp_path, absent, adapter, *out, words=("absent does not exist", "checkpoint folder"))
    cli.refuses(tmp_path, empty, adapter, *out, words=("no .safetensors file",))
    cli.refuses(tmp_path, base, absent, *out, words=("no adapter_config.json",))
    cli.refuses(tmp_path, base, empty, *out, words=("no adapter_config.json",))
    cli.refuses(tmp_path, base / "config.json", adapter, *out, words=("not a safetensors file",))
    (adapter / "adapter_model.safetensors").unlink()
    cli.refuses(tmp_path, base, adapter, *out, words=("no adapter_model.safetensors",))
