"""GGUF's blocks against the package that knows them, on drawn and on real ones."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from real_models import SMOLLM2, wheel

from peftarray.errors import ShapeError, UnsupportedError
from peftarray.quant import GGUF, codec

gguf = pytest.importorskip("gguf")


def types() -> list[str]:
    return [kind.name for kind in gguf.quants._type_traits if kind.name not in ("BF16", "NVFP4")]


@pytest.mark.parametrize("kind", types())
def test_every_type_is_read(kind):
    how = GGUF(kind)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (3, 4, 2 * block)
    blocks = np.random.default_rng(0).integers(0, 60, (3, 4, 2 * size), dtype=np.uint8)
    expected = gguf.quants.dequantize(blocks.reshape(12, -1), gguf.GGMLQuantizationType[kind]).reshape(shape)
    found = how.dequantize({"blocks": blocks}, shape)
    np.testing.assert_array_equal(found, expected, strict=True)
    np.testing.assert_array_equal(how.dequantize({"blocks": blocks}, shape, rows=(1, 2)), expected[1:2], strict=True)
    assert how.nbytes(shape) == blocks.nbytes


def test_arrays_of_other_libraries_are_refused(asarray, xp):
    if "numpy" in xp.__name__ and "jax" not in xp.__name__:
        pytest.skip("this is about the others")
    with pytest.raises(UnsupportedError, match="move it to the host"):
        GGUF("Q8_0").quantize(asarray(np.ones((2, 32), np.float32)))


def test_rows_that_are_no_blocks_are_refused():
    with pytest.raises(ShapeError, match="multiple of 256"):
        codec("gguf", type="Q6_K").parts((4, 100))


def test_a_real_file(tmp_path):
    """SmolLM2 as llama.cpp stores it: every second weight, rows from its middle, straight from the mapped file."""
    with zipfile.ZipFile(wheel(SMOLLM2)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = archive.extract(name, tmp_path)
    read = 0
    for tensor in gguf.GGUFReader(path).tensors[::20]:
        if tensor.tensor_type.name not in types():
            continue
        shape = tuple(int(n) for n in reversed(tensor.shape))
        rows = (shape[0] // 2, shape[0] // 2 + 8)
        found = GGUF(tensor.tensor_type.name).dequantize({"blocks": tensor.data}, shape, rows=rows)
        expected = gguf.quants.dequantize(tensor.data[slice(*rows)], tensor.tensor_type)
        np.testing.assert_array_equal(found, expected)
        read += 1
    assert read > 5
