"""Damaged and forged files: every claim that a header or an index makes is checked before it is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import (
    base_shapes,
    data_of,
    header_of,
    lora_tensors,
    random_tensors,
    targets_of,
    tree,
    write_adapter,
    write_base,
    write_raw,
    write_sparse,
)
from refusals import ENVIRONMENT, CommandLine

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


@pytest.fixture(params=["base", "adapter"])
def damaged(request, tmp_path):
    """`(path, tensors)` of a sound file, once in the base and once in the adapter, which the test then damages."""
    write_base(tmp_path / "base", TENSORS)
    write_adapter(tmp_path / "adapter", ADAPTER)
    if request.param == "base":
        return tmp_path / "base" / "model.safetensors", TENSORS
    return tmp_path / "adapter" / "adapter_model.safetensors", ADAPTER


# The eight bytes, and the header.


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_shorter_than_its_length_field(damaged, refused, size):
    path, _ = damaged
    os.truncate(path, size)
    refused(path.name, f"{size} bytes", "truncated")


@pytest.mark.parametrize("kept", [8, 9, 100])
def test_truncated_header(damaged, refused, kept):
    path, _ = damaged
    os.truncate(path, kept)
    refused(path.name, "claims a header", "truncated", "download it again")


@pytest.mark.parametrize("lost", [1, 4, 300])
def test_truncated_data(damaged, refused, lost):
    path, _ = damaged
    os.truncate(path, path.stat().st_size - lost)
    refused(path.name, "is truncated", "download or save it again")


@pytest.mark.parametrize("claim", [100_000, 50 << 20, 100 << 20])
def test_header_longer_than_the_file(damaged, refused, claim):
    path, tensors = damaged
    write_raw(path, header_of(tensors), data_of(tensors), length=claim)
    refused(path.name, f"a header of {claim} bytes", "truncated")


@pytest.mark.parametrize("claim", [(100 << 20) + 1, 200_000_000, 1 << 40, (1 << 64) - 1])
def test_header_of_200_megabytes_and_more(damaged, refused, claim):
    path, tensors = damaged
    write_raw(path, header_of(tensors), data_of(tensors), length=claim)
    refused(path.name, f"a header of {claim} bytes", "at most 104857600")


@pytest.mark.parametrize("claim", [90 << 20, 200_000_000])
def test_header_that_a_huge_file_really_has_room_for(damaged, refused, claim):
    path, _ = damaged
    path.write_bytes(claim.to_bytes(8, "little"))
    os.truncate(path, claim + 1000)
    refused(path.name, *(("not valid JSON",) if claim < 100 << 20 else ("at most 104857600",)))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\x00" * 64,
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b'{"a": "\\ud800"}',
    ],
    ids=["empty", "cut", "list", "null", "zeros", "not utf-8", "deep", "deep objects", "number", "half a character"],
)
def test_header_that_is_no_json_object(damaged, refused, text):
    path, tensors = damaged
    write_raw(path, text, data_of(tensors))
    refused(path.name, "JSON")


def test_name_twice_in_one_header(damaged, refused):
    path, tensors = damaged
    name = next(iter(tensors))
    text = json.dumps(header_of(tensors))
    twice = text[:-1] + f', "{name}": {json.dumps(header_of(tensors)[name])}' + "}"
    write_raw(path, twice.encode(), data_of(tensors))
    refused(path.name, name, "twice")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "entry",
    [
        *(None, 5, "F32", [], {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [2]}),
        *(entry(dtype=value) for value in (5, None, ["F32"])),
        *(entry(shape=value) for value in (2, None, "2", {"2": 2}, [2.0], ["2"], [True, 2], [-2], [[2]], [None])),
        *(entry(offsets=value) for value in (None, 0, [0], [0, 8, 8], ["0", "8"], {"a": 0, "b": 8}, [-8, 0], [8, 0])),
        *(entry(offsets=value) for value in ([0, 8.0], [False, 8], "08")),
        *(entry("F32", [1] * 33, [0, 4]), entry("F32", [1 << 70], [0, 1 << 72])),
    ],
)
def test_entry_that_is_none(damaged, refused, entry):
    path, tensors = damaged
    name = next(iter(tensors))
    write_raw(path, header_of(tensors) | {name: entry}, data_of(tensors))
    refused(path.name, name, "damaged")


@pytest.mark.parametrize("metadata", [5, [], {"format": 5}, {"format": None}, {"a": {}}])
def test_metadata_that_are_not_strings(damaged, refused, metadata):
    path, tensors = damaged
    write_raw(path, header_of(tensors) | {"__metadata__": metadata}, data_of(tensors))
    refused(path.name, "__metadata__", "strings")


# The places of the tensors.


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([1 << 60, 2], ("does not make its",)),
        ([3], ("does not make its",)),
        ([0], ("does not make its",)),
        ([1 << 61, 1 << 61, 1 << 61], ("does not make its",)),
    ],
)
def test_shape_that_does_not_follow_from_the_bytes(damaged, refused, shape, words):
    path, tensors = damaged
    header = header_of(tensors)
    name = next(iter(tensors))
    header[name]["shape"] = shape
    write_raw(path, header, data_of(tensors))
    refused(path.name, name, *words)


def test_overlapping_offsets(damaged, refused):
    path, tensors = damaged
    header = header_of(tensors)
    first, second = list(tensors)[:2]
    size = tensors[second].nbytes
    header[second]["data_offsets"] = [header[first]["data_offsets"][0], header[first]["data_offsets"][0] + size]
    write_raw(path, header, data_of(tensors))
    refused(path.name, "overlaps the tensor before it", "damaged")


def test_two_tensors_on_the_same_bytes(damaged, refused):
    path, tensors = damaged
    header = header_of(tensors)
    first = next(iter(tensors))
    write_raw(path, header | {"shadow": header[first]}, data_of(tensors))
    refused(path.name, "overlaps the tensor before it")


@pytest.mark.parametrize("gap", [1, 4, 1000])
def test_gap_between_tensors(damaged, refused, gap):
    path, tensors = damaged
    header = header_of(tensors)
    first = next(iter(tensors))
    for name in list(tensors)[1:]:
        header[name]["data_offsets"] = [at + gap for at in header[name]["data_offsets"]]
    data = data_of(tensors)
    end = tensors[first].nbytes
    write_raw(path, header, data[:end] + bytes(gap) + data[end:])
    refused(path.name, "leaves a gap before it")


def test_gap_before_the_first_tensor(damaged, refused):
    path, tensors = damaged
    header = header_of(tensors)
    for name in tensors:
        header[name]["data_offsets"] = [at + 8 for at in header[name]["data_offsets"]]
    write_raw(path, header, bytes(8) + data_of(tensors))
    refused(path.name, "leaves a gap before it")


@pytest.mark.parametrize("more", [1, 4096])
def test_bytes_after_the_last_tensor(damaged, refused, more):
    path, _ = damaged
    with path.open("ab") as file:
        file.write(bytes(more))
    refused(path.name, "bytes after its last tensor")


# Memory: what a file claims is not allocated.

BOUNDED = """
import resource, sys
from peftarray.cli import main
import peftarray.merging
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv.pop(1)), -1))
main()
"""


def merge_in_little_memory(place, *options):
    """A merge that may use 48 MB of address space beyond what the interpreter has."""
    places = (place / "base", place / "adapter", "-o", place / "out")
    command = [sys.executable, "-c", BOUNDED, 48 << 20, "merge", *places, *options]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False
    )


@pytest.mark.parametrize("what", ["header", "header with room", "shape"])
def test_nothing_is_allocated_by_what_a_file_claims(tmp_path, what):
    """A header of 200 MB, in a short file and in one that has room for it, and a tensor of an exabyte."""
    write_base(tmp_path / "base", TENSORS)
    write_adapter(tmp_path / "adapter", ADAPTER)
    path = tmp_path / "base" / "model.safetensors"
    header = header_of(TENSORS)
    if what == "shape":
        header[FIRST]["shape"] = [1 << 58]
    write_raw(path, header, data_of(TENSORS), length=None if what == "shape" else 200_000_000)
    if what == "header with room":
        os.truncate(path, 300_000_000)
    before = tree(tmp_path)
    done = merge_in_little_memory(tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "memory" not in done.stderr
    assert tree(tmp_path) == before


def test_a_plan_of_16_gigabytes_fits_in_little_memory(tmp_path):
    write_base(tmp_path / "base", TENSORS)
    write_sparse(tmp_path / "base" / "model.safetensors", base_shapes() | {"huge": (1 << 33,)})
    write_adapter(tmp_path / "adapter", ADAPTER)
    done = merge_in_little_memory(tmp_path, "--dry-run", "--threads", "1")
    assert done.returncode == 0, done.stderr


def test_the_bound_on_memory_is_one(tmp_path):
    """A header of 90 MB is within the limit of the format: reading it needs what the bound forbids."""
    write_base(tmp_path / "base", TENSORS)
    write_adapter(tmp_path / "adapter", ADAPTER)
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes((90 << 20).to_bytes(8, "little"))
    os.truncate(path, 100 << 20)
    done = merge_in_little_memory(tmp_path)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
