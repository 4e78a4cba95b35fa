"""NF4, FP4 and int8 against bitsandbytes on the CPU: the same bits, and the same files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from peftarray.errors import FormatError, UnsupportedError
from peftarray.quant import FourBitFloat, Int8Blocks, Int8Rows, NormalFloat
from peftarray.quant.blocks import mean_in_order
from peftarray.quant.codebooks import DYNAMIC
from peftarray.quant.layouts import LAYOUTS, find_quantised
from peftarray.stores.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

FOUR_BIT = {"nf4": NormalFloat, "fp4": FourBitFloat}
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes allows


@pytest.fixture(autouse=True)
def one_thread():
    """The order of torch's sums, and so the statistics of the scales, hangs on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def weights(draw, *, even: bool = False) -> np.ndarray:
    """Normal numbers of one magnitude; on a grid, so that many lie between two codes; with rows of zeros; tiny."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal((rows, columns + (columns % 2 if even else 0))).astype(np.float32)
    kind = draw(st.sampled_from(["plain", "grid", "zeros", "tiny", "huge"]))
    if kind == "grid":
        weight = np.round(weight * 8) / 8
    elif kind == "zeros":
        weight[rng.random(rows) < 0.5] = 0
    elif kind == "tiny":
        weight = weight * np.float32(1e-33)
    elif kind == "huge":
        weight = weight * np.float32(1e33)
    return weight.astype(np.float32)


def same(actual: np.ndarray, expected: object, name: str = "") -> None:
    expected = np.asarray(expected)
    assert actual.dtype == expected.dtype, name
    assert actual.tobytes() == expected.tobytes(), name


@given(weights(), st.sampled_from(sorted(FOUR_BIT)), st.sampled_from(BLOCKS), st.booleans())
def test_four_bits(weight, kind, block, double):
    codes, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=block, quant_type=kind, compress_statistics=double
    )
    how = FOUR_BIT[kind](block=block, double=double)
    parts = how.quantize(weight)
    same(parts["codes"], codes.numpy(), "codes")
    same(parts["absmax"], state.absmax.numpy(), "absmax")
    if double:
        same(parts["nested_absmax"], state.state2.absmax.numpy(), "nested_absmax")
        same(parts["nested_offset"], state.offset.numpy(), "nested_offset")
        same(parts["nested_map"], state.state2.code.numpy(), "nested_map")
    if weight.shape[1] % block == 0:  # where a row ends within a block, its CPU kernel takes scales of other blocks
        back = functional.dequantize_4bit(codes, state).numpy()
        np.testing.assert_array_equal(how.dequantize(parts, weight.shape), back)


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_of_whole_blocks(kind, block, double):
    weight = torch.randn(9, 4096, generator=torch.Generator().manual_seed(block))
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double)
    how = FOUR_BIT[kind](block=block, double=double)
    parts = how.quantize(weight.numpy())
    same(parts["codes"], codes.numpy())
    same(parts["absmax"], state.absmax.numpy())
    same(how.dequantize(parts, (9, 4096)) + 0, functional.dequantize_4bit(codes, state).numpy() + 0)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_numbers_between_two_codes(kind):
    """At every midpoint, and one step to either side of it."""
    how = FOUR_BIT[kind](block=64, double=False)
    middles = how.book.thresholds
    edges = np.concatenate([np.nextafter(middles, np.float32(-2)), middles, np.nextafter(middles, np.float32(2))])
    for scale in (1, 0.37, 3e4):
        weight = np.ones((len(edges), 64), np.float32)
        weight[:, 1] = edges
        weight = weight * np.float32(scale)
        codes, _ = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type=kind)
        same(how.quantize(weight)["codes"], codes.numpy())


@given(weights(), st.integers(1, 300))
def test_blocks_of_eight_bits(weight, block):
    codes, state = functional.quantize_blockwise(torch.from_numpy(weight), blocksize=block)
    how = Int8Blocks(block=block)
    parts = how.quantize(weight)
    same(parts["codes"], codes.numpy())
    same(parts["absmax"], state.absmax.numpy())
    same(how.dequantize(parts, weight.shape), functional.dequantize_blockwise(codes, state).numpy())


def test_eight_bits_at_the_edges_of_codes():
    """bitsandbytes takes the nearest of 65,536 steps first; within 40 numbers of every edge between two codes."""
    steps = (np.arange(1 << 16, dtype=np.float32) - np.float32(0.5)) / np.float32(32767.5) - 1
    edges = steps[np.searchsorted(steps, DYNAMIC.thresholds)]
    near = (edges.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)).view(np.float32).reshape(-1)
    near = near[np.abs(near) < 1]
    weight = np.ones((len(near), 8), np.float32)
    weight[:, 1] = near
    codes, _ = functional.quantize_blockwise(torch.from_numpy(weight), blocksize=8)
    same(Int8Blocks(block=8).quantize(weight)["codes"], codes.numpy())


@given(weights())
def test_rows_of_eight_bits(weight):
    codes, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight.copy()))
    parts = Int8Rows().quantize(weight)
    full = np.abs(weight).max(axis=1) > 0  # a row of zeros is not a number there, cast to whatever it gives
    same(parts["absmax"], absmax.numpy())
    same(parts["codes"][full], codes.numpy()[full])
    assert not parts["codes"][~full].any()
    back = functional.int8_vectorwise_dequant(codes, absmax).numpy()
    same(Int8Rows().dequantize(parts, weight.shape)[full], back[full])


def test_rows_between_two_codes():
    """Half steps, which the last bit of the scale decides."""
    largest = np.abs(np.random.default_rng(0).standard_normal((500, 1))).astype(np.float32)
    halves = (np.arange(-126, 127) + 0.5) / 127
    weight = np.concatenate([largest, largest * halves.astype(np.float32)], axis=1)
    codes, _, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight.copy()))
    same(Int8Rows().quantize(weight)["codes"], codes.numpy())


def test_the_dynamic_code():
    same(DYNAMIC.values, functional.create_dynamic_map().numpy())


@pytest.mark.parametrize("count", [*range(1, 40), 255, 256, 511, 513, 1000, 4096, 13824, 100_003, 1 << 20])
def test_sums_are_added_in_torchs_order(count):
    values = np.abs(np.random.default_rng(count).standard_normal(count)).astype(np.float32)
    assert float(mean_in_order(values)) == torch.from_numpy(values).mean().item()


@pytest.fixture
def written(tmp_path):
    """A checkpoint that bitsandbytes' layers wrote, and the weights that they hold."""
    bnb = pytest.importorskip("bitsandbytes")
    layers = {
        "a.nf4": bnb.nn.Linear4bit(64, 40, bias=True, quant_type="nf4", compress_statistics=True),
        "a.fp4": bnb.nn.Linear4bit(128, 40, bias=False, quant_type="fp4", compress_statistics=False),
        "b.int8": bnb.nn.Linear8bitLt(64, 40, bias=False, has_fp16_weights=False),
    }
    tensors, expected = {}, {}
    for name, layer in layers.items():
        layer.weight.data = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
        layer = layer.to("cpu")
        state = layer.state_dict()
        if name == "b.int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(layer.weight.data.to(torch.float16))
            state = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
            expected[f"{name}.weight"] = functional.int8_vectorwise_dequant(codes, absmax).numpy()
        else:
            expected[f"{name}.weight"] = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).numpy()
        tensors |= {f"{name}.{key}": value.detach().numpy() for key, value in state.items()}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path, expected


def test_its_files_are_read(written):
    folder, expected = written
    with Checkpoint.open(folder) as checkpoint:
        found = find_quantised(checkpoint, checkpoint.config, checkpoint.read_stored)
        assert found.keys() == expected.keys()
        assert found["a.nf4.weight"].codec == NormalFloat()
        assert found["a.fp4.weight"].codec == FourBitFloat(double=False)
        for name, weight in found.items():
            np.testing.assert_array_equal(weight.dequantize(checkpoint.read_stored), expected[name])
            some = weight.dequantize(checkpoint.read_stored, rows=(3, 17))
            np.testing.assert_array_equal(some, expected[name][3:17])
        taken = {tensor for weight in found.values() for tensor in weight.names()}
        assert set(checkpoint) - taken == {"a.nf4.bias"}


@pytest.mark.parametrize("how", [NormalFloat(), FourBitFloat(block=128, double=False), Int8Rows()])
def test_our_files_are_the_same_bytes(how):
    weight = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    parts = how.quantize(weight)
    tensors = LAYOUTS["bitsandbytes"].write("x.weight", weight.shape, how, parts, dtype="F32")
    if isinstance(how, Int8Rows):
        codes, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight))
        same(tensors["x.weight"], codes.numpy())
        same(tensors["x.SCB"], absmax.numpy())
        assert tensors["x.weight_format"] == 0
        return
    codes, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=how.block, quant_type=how.kind, compress_statistics=how.double
    )
    theirs = {"x.weight": codes} | {f"x.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if how.double and "quant_state" in name:  # blanks follow, so that its length does not hang on the offset
            assert tensors[name].tobytes().rstrip(b" ") == tensor.numpy().tobytes()
            continue
        assert tensors[name].shape == tuple(tensor.shape), name
        same(tensors[name], tensor.numpy(), name)


def test_a_state_is_as_long_whatever_its_offset():
    """So that a file can be laid out before any weight is quantised."""
    how, lengths = NormalFloat(), set()
    for size in (1e-30, 1e-4, 1 / 3, 1.0, 3e30):
        weight = (size * np.random.default_rng(0).standard_normal((12, 128))).astype(np.float32)
        tensors = LAYOUTS["bitsandbytes"].write("x.weight", weight.shape, how, how.quantize(weight), dtype="BF16")
        lengths.add(tensors["x.weight.quant_state.bitsandbytes__nf4"].size)
    zeros = LAYOUTS["bitsandbytes"].zeros("x.weight", (12, 128), how, dtype="BF16")
    assert lengths == {zeros["x.weight.quant_state.bitsandbytes__nf4"].size}


def checkpoint_of(tensors: dict[str, np.ndarray], folder) -> Checkpoint:
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 0}, "blocksize 0"),
        ({"blocksize": "64"}, "blocksize '64'"),
        ({"shape": [1 << 40, 1 << 40]}, "has shape .* needs"),
        ({"shape": [12, -128]}, "shape"),
        ({"shape": []}, "shape"),
        ({"dtype": 3}, "dtype 3"),
        ({"nested_offset": None}, "nested_offset None"),
        ({"nested_offset": float("inf")}, "nested_offset inf"),
    ],
)
def test_states_that_lie_are_refused(change, message, tmp_path):
    weight = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    how = NormalFloat()
    tensors = LAYOUTS["bitsandbytes"].write("x.weight", weight.shape, how, how.quantize(weight), dtype="F32")
    key = "x.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].tobytes())
    tensors[key] = np.frombuffer(json.dumps(state | change).encode(), np.uint8)
    with checkpoint_of(tensors, tmp_path) as checkpoint, pytest.raises(FormatError, match=message):
        find_quantised(checkpoint, {}, checkpoint.read_stored)


@pytest.mark.parametrize("missing", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_quant_map"])
def test_missing_tensors_are_named(missing, tmp_path):
    weight = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    how = NormalFloat()
    tensors = LAYOUTS["bitsandbytes"].write("x.weight", weight.shape, how, how.quantize(weight), dtype="F32")
    del tensors[f"x.{missing}"]
    with checkpoint_of(tensors, tmp_path) as checkpoint, pytest.raises(FormatError, match=f"not x.{missing}, which"):
        find_quantised(checkpoint, {}, checkpoint.read_stored)


def test_other_maps_are_refused(tmp_path):
    weight = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    how = NormalFloat()
    tensors = LAYOUTS["bitsandbytes"].write("x.weight", weight.shape, how, how.quantize(weight), dtype="F32")
    tensors["x.weight.quant_map"] = tensors["x.weight.quant_map"][::-1]
    with checkpoint_of(tensors, tmp_path) as checkpoint, pytest.raises(UnsupportedError, match="other numbers"):
        find_quantised(checkpoint, {}, checkpoint.read_stored)
