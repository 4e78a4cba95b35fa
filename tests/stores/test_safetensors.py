"""The safetensors store against literal bytes and against the safetensors library."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as reference

from peftarray.errors import FormatError, MatchError
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import SafetensorsFile, header_bytes, save_file

HEADER = b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}'


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "a.weight": draw.standard_normal((3, 5)).astype(np.float32),
        "b": draw.integers(0, 9, (4,)),
        "c": np.asarray(np.float16(2.5)),
        "empty": np.zeros((0, 7), np.float32),
        "flag": np.array([True, False]),
    }


def test_bytes_of_a_file(tmp_path):
    padded = HEADER + b" " * (-len(HEADER) % 8)
    expected = len(padded).to_bytes(8, "little") + padded
    assert header_bytes([("w", "I8", (2,), 2)], {"format": "pt"}) == expected
    save_file({"w": np.array([1, -1], np.int8)}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == expected + b"\x01\xff"


def test_the_library_reads_what_is_written(tmp_path):
    save_file(arrays(), tmp_path / "x.safetensors")
    theirs = reference.load_file(tmp_path / "x.safetensors")
    for name, array in arrays().items():
        np.testing.assert_array_equal(theirs[name], array)
        assert theirs[name].dtype == array.dtype


def test_what_the_library_writes_is_read(tmp_path):
    reference.save_file(arrays(), tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as found:
        assert set(found) == set(arrays())
        for name, array in arrays().items():
            np.testing.assert_array_equal(found.read_stored(name), array)
        np.testing.assert_array_equal(found.read("a.weight", slice(1, 3)), arrays()["a.weight"][1:3])
        assert found["a.weight"].matrix_shape == (3, 5)


def test_bfloat16_is_read_as_float32(tmp_path):
    values = np.array([[1.5, -2.25]], np.float32)
    save_file({"w": values.astype(ml_dtypes.bfloat16)}, tmp_path / "w.safetensors")
    with Checkpoint.open(tmp_path / "w.safetensors") as found:
        np.testing.assert_array_equal(found.read("w"), values)
        assert found.read("w").dtype == np.float32


def test_an_absent_tensor_is_named_with_its_neighbours(tmp_path):
    save_file(arrays(), tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as found, pytest.raises(MatchError, match=r"nearest: a\.weight"):
        found["a.weigth"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(arrays(), path)
    file = SafetensorsFile(path)
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size - 4)
    with pytest.raises(FormatError, match="was changed or truncated"):
        file.read(list(file.tensors.values())[-1])
