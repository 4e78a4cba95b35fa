"""Damage at random, thousands of times: only a `PeftError` comes out, or a merge that holds up.

Every case has a seed in its message. Nothing may stand at OUT after a refusal, and what is merged is verified.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import warnings

import numpy as np
import pytest
from checkpoints import tree
from mutations import ODD, WORLDS, damage_bytes, damage_json, damage_tensors

import peftarray as pa

CASES = 40
"""Of each kind of damage, for each world."""
DAMAGE = {
    "bytes of the base": lambda place, tensors, rng: damage_bytes(any_file(place / "base", "*.safetensors", rng), rng),
    "bytes of the adapter": lambda place, tensors, rng: damage_bytes(any_file(place / "adapter", "*", rng), rng),
    "header of the base": lambda place, tensors, rng: damage_json(any_file(place / "base", "*.safetensors", rng), rng),
    "header of the adapter": lambda place, tensors, rng: damage_json(any_file(place / "adapter", "*s", rng), rng),
    "configurations": lambda place, tensors, rng: damage_json(any_file(place, "*/*config.json", rng), rng),
    "index and config": lambda place, tensors, rng: damage_json(any_file(place / "base", "[cm]*.json", rng), rng),
    "tensors": lambda place, tensors, rng: damage_tensors(place / "adapter", tensors, rng),
}
FIELDS = sorted({field.name for method in pa.METHODS.values() for field in dataclasses.fields(method)} | {"peft_type"})


def any_file(folder, pattern, rng):
    files = sorted(folder.glob(pattern))
    return files[rng.integers(len(files))]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Nothing here needs to survive a power cut, and no core is to be had twice."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})


@pytest.fixture
def worlds(tmp_path):
    """`worlds(name)`: a folder with a fresh copy of that world, and the adapter's tensors."""
    sound = {name: (tmp_path / "sound" / name, make(tmp_path / "sound" / name)) for name, make in WORLDS.items()}

    def fresh(name):
        source, tensors = sound[name]
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        return place, tensors

    return fresh


def attempt(place, case, **options):
    """Merge; whether that went well. Anything but success or a one-line `PeftError` fails the test, with the case."""
    inputs = (place / "base", place / "adapter")
    before = tree(place)
    said = None
    with warnings.catch_warnings():
        # What a user of the command line would see on standard error.
        warnings.simplefilter("error")
        try:
            pa.merge(*inputs, place / "out", **options)
        except pa.PeftError as error:
            said = str(error)
        except BaseException as error:
            error.add_note(f"case: {case}, options: {options}")
            raise
    if said is not None:
        assert said.isprintable(), case
        assert len(said) < 5000, case
    if said is not None or options["dry_run"]:
        assert tree(place) == before, case
    else:
        checked = pa.verify(*inputs, place / "out", allow_unmatched=options["allow_unmatched"])
        assert checked.passed, (case, checked.failures)
    return said is None


def looked_into(place, case):
    """`inspect`, which works without a base, has the same promise."""
    for path in (place / "base", place / "adapter"):
        try:
            json.dumps(pa.inspect(path).to_dict())
        except pa.PeftError:
            pass
        except BaseException as error:
            error.add_note(f"case: {case}")
            raise


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("world", WORLDS)
def test_damage(worlds, world, kind):
    merged = 0
    for seed in range(CASES):
        rng = np.random.default_rng([seed, *kind.encode()])
        place, tensors = worlds(world)
        DAMAGE[kind](place, tensors, rng)
        case, options = (world, kind, seed), rng.random(2) < 0.3
        merged += attempt(place, case, dry_run=bool(options[0]), allow_unmatched=bool(options[1]))
        looked_into(place, case)
    assert merged < CASES or kind == "index and config", "the damage did none"


@pytest.mark.parametrize("world", WORLDS)
def test_every_field_with_every_odd_value(worlds, world):
    """An adapter's configuration has no value that does worse than be refused."""
    place, _ = worlds(world)
    path = place / "adapter" / "adapter_config.json"
    sound = json.loads(path.read_text())
    refused = 0
    for field, value in itertools.product(FIELDS, ODD[list(WORLDS).index(world) :: len(WORLDS)]):
        path.write_text(json.dumps(sound | {field: value}))
        refused += not attempt(place, (world, field, value), dry_run=True, allow_unmatched=False)
    assert refused > len(FIELDS)


@pytest.mark.parametrize("world", WORLDS)
def test_damaged_result(worlds, world):
    """`verify` finds what was done to a result, or refuses to read it."""
    place, _ = worlds(world)
    pa.merge(place / "base", place / "adapter", place / "out")
    sound = {path: path.read_bytes() for path in (place / "out").iterdir()}
    passed = 0
    for seed in range(2 * CASES):
        rng = np.random.default_rng(seed)
        path = any_file(place / "out", "*.safetensors" if seed % 4 else "[cm]*.json", rng)
        (damage_json if path.suffix == ".json" or seed % 2 else damage_bytes)(path, rng)
        try:
            passed += pa.verify(place / "base", place / "adapter", place / "out").passed
        except pa.PeftError:
            pass
        except BaseException as error:
            error.add_note(f"case: {world, seed}")
            raise
        path.write_bytes(sound[path])
    assert passed < CASES, "most of this damage is to bytes that matter"


@pytest.mark.parametrize("world", WORLDS)
def test_options(worlds, world):
    """Sound inputs and any options: each merge is verified, by the merge itself or after it."""
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        place, _ = worlds(world)
        adapters = [place / "adapter"] * int(rng.integers(1, 4))
        choices = {
            "scale": [float(rng.choice([0, 1, -0.5, 2, 1e-3])) for _ in adapters],
            "dtype": [None, "float32", "float16", "bfloat16", "float64", "F8_E5M2"][rng.integers(6)],
            "max_shard_size": [None, 1, 100, "1KB", "3KB", "5GB"][rng.integers(6)],
            "threads": [None, 1, 2, 7][rng.integers(4)],
            "verify": bool(rng.random() < 0.5),
            "fail_if_retained_below": [None, None, 0.0, 0.5, 1.0][rng.integers(5)],
        }
        try:
            report = pa.merge(place / "base", adapters, place / "out", **choices)
        except pa.UnsupportedError:
            assert len(adapters) > 1 or choices["scale"] != [1.0]  # what is replaced whole cannot be weighted
        except pa.QualityError:
            assert choices["fail_if_retained_below"]
        else:
            json.dumps(report.to_dict())
            checked = pa.verify(place / "base", adapters, place / "out", scale=choices["scale"])
            assert checked.passed, (seed, choices, checked.failures)
            assert not (place / "out.partial").exists()
