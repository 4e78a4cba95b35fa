"""`peftarray combine`: what it prints and writes, and that bad input is refused in one line with nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import lora_config, lora_tensors, targets_of, tree, write_adapter, write_base
from refusals import ENVIRONMENT, CommandLine, one_line

import peftarray as pa


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def adapters(tmp_path):
    for place in range(2):
        write_adapter(tmp_path / f"a{place}", lora_tensors(targets_of(), seed=place), lora_config())
    return [tmp_path / "a0", tmp_path / "a1"]


def test_the_table(cli, adapters, tmp_path):
    options = ("--weight", 1, "--weight", -0.5, "--type", "svd", "--rank", 3)
    assert cli("combine", *adapters, "-o", tmp_path / "out", *options) == 0, cli.err
    assert not cli.err
    lines = cli.out.splitlines()
    assert lines[0].startswith("svd: 1 x ")
    assert "-0.5 x" in lines[0]
    assert lines[1].split() == ["modules", "rank", "norm", "energy", "error", "worst", "kind"]
    assert [(line.split()[0], line.split()[1], line.split()[-1]) for line in lines[2:4]] == [
        ("2", "3", "q_proj"),
        ("2", "3", "down_proj"),
    ]
    assert lines[-1].startswith("kept 9")
    assert lines[-1].endswith(f"r=3, to {tmp_path / 'out'}")


def test_json_says_what_python_says(cli, adapters, tmp_path):
    options = ("--type", "della_svd", "--density", 0.5, "--epsilon", 0.2, "--seed", 7, "--majority-sign", "frequency")
    assert cli("combine", *adapters, "-o", tmp_path / "out", *options, "--energy", 0.9, "--json") == 0, cli.err
    found = json.loads(cli.out)
    report = pa.combine_folders(
        adapters,
        tmp_path / "other",
        combination="della_svd",
        density=0.5,
        epsilon=0.2,
        seed=7,
        majority_sign="frequency",
        energy=0.9,
    )
    wanted = json.loads(json.dumps(report.to_dict() | {"out": str(tmp_path / "out")}))
    assert found == wanted
    assert 0.9 <= found["energy"] < 1
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


REFUSED = {
    "type": (("--type", "average"), ("combination is 'average'", "cat", "ties_svd")),
    "density is missing": (("--type", "ties"), ("ties needs density",)),
    "density is too much": (("--density", 0.5), ("cat leaves no entries out",)),
    "density out of range": (("--type", "ties", "--density", 1.5), ("density is 1.5", "from 0 to 1")),
    "rank": (("--rank", 0), ("rank is 0", "at least 1")),
    "energy": (("--energy", 0), ("energy is 0", "above 0")),
    "weights": (("--weight", 1), ("1 weights are given for 2 adapters",)),
    "no number": (("--weight", "nan", "--weight", 1), ("a weight is nan",)),
    "all zero": (("--weight", 0, "--weight", 0), ("all weights are 0",)),
    "slerp": (("--type", "slerp", "--weight", 1, "--weight", 1), ("slerp", "1 - t and t")),
    "majority": (("--type", "ties", "--density", 0.5, "--majority-sign", "all"), ("majority_sign is 'all'",)),
    "epsilon": (("--type", "della_svd", "--density", 0.9, "--epsilon", 0.3), ("epsilon is 0.3", "at most 0.2")),
    "gamma": (("--type", "breadcrumbs_svd", "--density", 0.9, "--gamma", 0.3), ("gamma 0.3", "at most 0.7")),
    "seed": (("--seed", -1), ("seed is -1",)),
    "base": (("--base", "nowhere"), ("nowhere does not exist",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case, cli, adapters, tmp_path):
    options, words = REFUSED[case]
    before = tree(tmp_path)
    assert cli("combine", *adapters, "-o", tmp_path / "out", *options) == 1, (cli.out, cli.err)
    one_line(cli.err, words)
    assert not cli.out
    assert tree(tmp_path) == before


def test_places_that_are_refused(cli, adapters, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    write_base(tmp_path / "base")
    for places, words in (
        ((*adapters, "-o", tmp_path / "there"), ("exists",)),
        ((*adapters, "-o", tmp_path / "link"), ("exists",)),
        ((*adapters, "-o", tmp_path / ("o" * 300)), ("cannot be a folder",)),
        ((*adapters, "-o", tmp_path / "no" / "out"), ("does not exist; make it first",)),
        ((adapters[0], tmp_path / "empty", "-o", tmp_path / "out"), ("has no adapter_config.json",)),
        ((adapters[0], tmp_path / "gone", "-o", tmp_path / "out"), ("has no adapter_config.json",)),
        ((adapters[0], tmp_path / "base", "-o", tmp_path / "out"), ("has no adapter_config.json",)),
    ):
        before = tree(tmp_path)
        assert cli("combine", *places) == 1
        one_line(cli.err, words)
        assert tree(tmp_path) == before
    assert cli("combine", "-o", tmp_path / "out") == 2


def test_a_disk_that_fails_leaves_nothing(cli, adapters, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    before = tree(tmp_path)
    assert cli("combine", *adapters, "-o", tmp_path / "out") == 1
    one_line(cli.err, ("cannot be written", "No space left"))
    assert tree(tmp_path) == before


def test_no_other_library_is_loaded(adapters, tmp_path):
    arguments = ["peftarray", "combine", *map(str, adapters), "-o", str(tmp_path / "out"), "--type", "svd"]
    probe = f"""
import sys
sys.argv = {arguments!r}
import peftarray.cli
try:
    peftarray.cli.main()
except SystemExit as end:
    assert not end.code, end.code
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"torch", "jax", "cupy", "transformers", "peft"}}))
"""
    run = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    assert np.isfinite(pa.inspect(tmp_path / "out").modules[0].norm)
