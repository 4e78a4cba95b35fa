"""Names, dtypes and shapes of quantised checkpoints: what is written is found again, what is damaged is refused."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file as plain_save

from peftarray.errors import FormatError, PeftError, UnsupportedError
from peftarray.quant import AWQ, FP8, GPTQ, MLX, MXFP4, NVFP4, FourBitFloat, Int8Rows, Ints, NormalFloat
from peftarray.quant.layouts import LAYOUTS, WritableLayout, find_quantised, layout, layout_of, writable_layout
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo, save_file

from .cases import name_of, normal

WRITTEN = [
    ("bitsandbytes", NormalFloat(), (24, 64)),
    ("bitsandbytes", NormalFloat(block=32, double=False), (7, 33)),
    ("bitsandbytes", FourBitFloat(), (7, 33)),
    ("bitsandbytes", Int8Rows(), (7, 33)),
    ("fp8", FP8(), (130, 260)),
    ("fp8", FP8(block=(16, 32), scale_dtype="F8_E8M0"), (48, 64)),
    ("fp8", FP8(dtype="F8_E5M2"), (3, 140, 130)),
    ("compressed-tensors", FP8(scale="tensor"), (8, 20)),
    ("compressed-tensors", FP8(scale="row"), (8, 20)),
    ("compressed-tensors", FP8(block=(16, 32)), (48, 64)),
    ("compressed-tensors", MXFP4(), (6, 64)),
    ("compressed-tensors", NVFP4(), (6, 64)),
    *[("compressed-tensors", Ints(bits=bits, group=0), (9, 100)) for bits in (2, 3, 4, 6, 8)],
    ("compressed-tensors", Ints(bits=4, group=32, symmetric=False), (40, 64)),
    ("compressed-tensors", Ints(bits=8, group=0, packed=False), (9, 64)),
    ("compressed-tensors", Ints(bits=8, group=16, symmetric=False, packed=False), (9, 64)),
    ("mxfp4", MXFP4(), (4, 6, 64)),
    ("mlx", MLX(), (8, 128)),
    ("mlx", MLX(bits=8, group=32), (2, 8, 64)),
]
CASES = [pytest.param(*case, id="-".join(map(name_of, case))) for case in WRITTEN]
LEADS = ("SCB", "quant_state.bitsandbytes__nf4", "weight_packed", "_blocks", "biases")  # what a weight is found by
KEYS = {"mlx": "quantization"}


def written(kind, how, shape, folder):
    """A checkpoint of one quantised weight, one plain one, and the configuration that goes with it."""
    weight = normal(shape)
    parts = how.quantize(weight)
    known = writable_layout(kind)
    tensors = known.write("m.down.weight", shape, how, parts, dtype="BF16") | {"norm.weight": np.ones(3, np.float32)}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {KEYS.get(kind, "quantization_config"): known.config(how, skipped=["lm_head"], dtype="BF16")}
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder), parts


@pytest.mark.parametrize(("kind", "how", "shape"), CASES)
def test_what_is_written_is_found(kind, how, shape, tmp_path):
    checkpoint, parts = written(kind, how, shape, tmp_path)
    with checkpoint:
        found = find_quantised(checkpoint, checkpoint.config, checkpoint.read_stored)
        (weight,) = found.values()
        assert found.keys() == {"m.down.weight"}
        assert weight.shape == shape
        assert weight.transposed == (kind == "mxfp4")
        assert set(weight.names()) == set(checkpoint) - {"norm.weight"}
        stored = weight.parts(checkpoint.read_stored)
        assert stored.keys() == parts.keys()
        for name, part in parts.items():
            np.testing.assert_array_equal(stored[name], part, err_msg=name, strict=True)
        expected = how.dequantize(parts, shape)
        np.testing.assert_array_equal(weight.dequantize(checkpoint.read_stored), expected)
        np.testing.assert_array_equal(weight.dequantize(checkpoint.read_stored, rows=(1, 2)), expected[1:2])


@pytest.mark.parametrize(("kind", "how", "shape"), CASES)
def test_every_tensor_is_needed(kind, how, shape, tmp_path):
    """Without one of them, the weight is not there or an error says what is missing; it never decodes to something."""
    checkpoint, _ = written(kind, how, shape, tmp_path)
    with checkpoint:
        (weight,) = find_quantised(checkpoint, checkpoint.config, checkpoint.read_stored).values()
        names = [name for name in weight.tensors.values() if "zero_point" not in name and "nested_absmax" not in name]
        for name in names:
            rest = {other: checkpoint[other] for other in checkpoint if other != name}
            leads = (*LEADS, "weight") if kind in ("fp8", "compressed-tensors") else LEADS
            if name.endswith(leads):
                assert not find_quantised(rest, checkpoint.config, checkpoint.read_stored)
                continue
            with pytest.raises(PeftError, match=re.escape(name.removesuffix("_inv"))):
                find_quantised(rest, checkpoint.config, checkpoint.read_stored)


@pytest.mark.parametrize(("kind", "how", "shape"), CASES)
def test_a_tensor_of_another_size_is_refused(kind, how, shape, tmp_path):
    checkpoint, _ = written(kind, how, shape, tmp_path)
    with checkpoint:
        (weight,) = find_quantised(checkpoint, checkpoint.config, checkpoint.read_stored).values()
        for part, name in weight.tensors.items():
            stored = checkpoint.read_stored(name)
            longer = np.concatenate([np.atleast_1d(stored), np.atleast_1d(stored)])
            with pytest.raises(FormatError, match="needs"):
                weight.parts(
                    lambda other, of=name, longer=longer: longer if other == of else checkpoint.read_stored(other)
                )
            header = TensorInfo(name, checkpoint[name].code, (7, *checkpoint[name].shape), 0, 0)
            with pytest.raises(FormatError, match="needs"):
                weight.check({**checkpoint, name: header})
            assert part in weight.codec.parts(shape)


def test_four_bits_in_storage_of_another_dtype(tmp_path):
    """bitsandbytes may call the same bytes bfloat16, for the sake of sharding."""
    how, shape = NormalFloat(), (24, 64)
    checkpoint, parts = written("bitsandbytes", how, shape, tmp_path)
    with checkpoint:
        tensors = {name: checkpoint.read_stored(name) for name in checkpoint}
    tensors["m.down.weight"] = tensors["m.down.weight"].view(np.uint8).reshape(-1, 2).view(ml_dtypes.bfloat16)
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    with Checkpoint.open(other) as again:
        (weight,) = find_quantised(again, again.config, again.read_stored).values()
        np.testing.assert_array_equal(weight.dequantize(again.read_stored), how.dequantize(parts, shape))


def found_in(tensors: dict[str, np.ndarray], config: dict, folder):
    plain_save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    return find_quantised(checkpoint, {"quantization_config": config}, checkpoint.read_stored), checkpoint.read_stored


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("form", "version"), [("gptq", 1), ("gptq_v2", 2), (None, 1)])
def test_gptq(desc_act, form, version, tmp_path):
    rng = np.random.default_rng(0)
    index = np.arange(64, dtype=np.int32) // 16
    tensors = {
        "m.q.qweight": rng.integers(-(2**31), 2**31, (8, 32)).astype(np.int32),
        "m.q.qzeros": rng.integers(-(2**31), 2**31, (4, 4)).astype(np.int32),
        "m.q.scales": rng.random((4, 32)).astype(np.float16),
        "m.q.g_idx": rng.permutation(index) if desc_act else index,
        "m.q.bias": np.zeros(32, np.float16),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": desc_act}
    found, read = found_in(tensors, config | ({"checkpoint_format": form} if form else {}), tmp_path)
    (weight,) = found.values()
    assert weight.name == "m.q.weight"
    assert weight.shape == (32, 64)
    assert weight.codec == GPTQ(bits=4, group=16, version=version, act_order=desc_act)
    assert set(weight.names()) == set(tensors) - {"m.q.bias"}
    assert weight.dequantize(read, rows=(4, 6)).shape == (2, 64)


def test_gptq_with_groups_that_are_not_there(tmp_path):
    tensors = {
        "q.qweight": np.zeros((8, 32), np.int32),
        "q.qzeros": np.zeros((4, 4), np.int32),
        "q.scales": np.ones((4, 32), np.float16),
        "q.g_idx": np.full(64, 4, np.int32),
    }
    with pytest.raises(FormatError, match="g_idx names groups that are not there: there are 4"):
        found_in(tensors, {"quant_method": "gptq"}, tmp_path)


def test_awq(tmp_path):
    tensors = {
        "q.qweight": np.zeros((64, 4), np.int32),
        "q.qzeros": np.zeros((4, 4), np.int32),
        "q.scales": np.ones((4, 32), np.float16),
    }
    (weight,) = found_in(tensors, {"quant_method": "awq", "version": "gemm"}, tmp_path)[0].values()
    assert weight.shape == (32, 64)
    assert weight.codec == AWQ(group=16)
    with pytest.raises(UnsupportedError, match="packed as 'gemv'; known is gemm"):
        found_in(tensors, {"quant_method": "awq", "version": "gemv"}, tmp_path)
    with pytest.raises(UnsupportedError, match="3 bits"):
        found_in(tensors, {"quant_method": "awq", "bits": 3}, tmp_path)


def test_modelopt(tmp_path):
    how = NVFP4("multiply")
    weight = normal((8, 64))
    parts = how.quantize(weight)
    tensors = {
        "q.weight": parts["codes"],
        "q.weight_scale": parts["scale"].view(ml_dtypes.float8_e4m3fn),
        "q.weight_scale_2": parts["global_scale"],
        "q.input_scale": np.array(1, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        found = find_quantised(
            checkpoint, {"quantization_config": {"quant_method": "modelopt"}}, checkpoint.read_stored
        )
        np.testing.assert_array_equal(
            found["q.weight"].dequantize(checkpoint.read_stored), how.dequantize(parts, weight.shape)
        )
        assert set(found["q.weight"].names()) == set(tensors)


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("weight_scale_inv", (2, 3), FP8()),
        ("weight_scale_inv", (), FP8(scale="tensor")),
        ("weight_scale", (1,), FP8(scale="tensor")),
        ("weight_scale", (200, 1), FP8(scale="row")),
        ("weight_scale", (200,), FP8(scale="row")),
    ],
)
def test_the_forms_of_fp8_scales(name, scale, expected, tmp_path):
    tensors = {
        "p.weight": np.ones((200, 300), ml_dtypes.float8_e4m3fn),
        f"p.{name}": np.full(scale, 3, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8"}}
    with Checkpoint.open(tmp_path) as checkpoint:
        (weight,) = find_quantised(checkpoint, config, checkpoint.read_stored).values()
        assert weight.codec == expected
        np.testing.assert_array_equal(weight.dequantize(checkpoint.read_stored), np.full((200, 300), 3, np.float32))


def test_fp8_without_a_scale_is_refused(tmp_path):
    save_file({"p.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(FormatError, match=r"not p\.weight_scale, which"):
        find_quantised(checkpoint, {"quantization_config": {"quant_method": "fp8"}}, checkpoint.read_stored)


def test_fp8_scales_of_no_form_are_refused(tmp_path):
    tensors = {
        "p.weight": np.ones((200, 300), ml_dtypes.float8_e4m3fn),
        "p.weight_scale_inv": np.ones((3, 3), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for config in ({"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}):
            with pytest.raises(FormatError, match="check weight_block_size"):
                find_quantised(checkpoint, {"quantization_config": config}, checkpoint.read_stored)
        for size in ([0, 1], [128], "128", [128.0, 128]):
            config = {"quant_method": "fp8", "weight_block_size": size}
            with pytest.raises(FormatError, match="weight_block_size is"):
                find_quantised(checkpoint, {"quantization_config": config}, checkpoint.read_stored)


def test_methods_are_found_by_name():
    assert layout("fbgemm_fp8") is LAYOUTS["fp8"]
    with pytest.raises(UnsupportedError, match="'aqlm' is not known; known are bitsandbytes"):
        layout("aqlm")
    assert layout_of({}) is None
    assert layout_of({"quantization": {"group_size": 64, "bits": 4}})[0] is LAYOUTS["mlx"]
    assert layout_of({"text_config": {"quantization_config": {"quant_method": "awq"}}})[0] is LAYOUTS["awq"]
    with pytest.raises(FormatError, match="must be an object"):
        layout_of({"quantization_config": [1]})


def test_layouts_write_what_they_can():
    weight = normal((32, 64))
    how = NormalFloat()
    assert {kind for kind, known in LAYOUTS.items() if isinstance(known, WritableLayout)} == {
        case[0] for case in WRITTEN
    }
    for kind, known in LAYOUTS.items():
        if not isinstance(known, WritableLayout):
            with pytest.raises(UnsupportedError, match=f"{kind} are read, and not written; written are bitsandbytes,"):
                writable_layout(kind)
        elif kind != "bitsandbytes":
            with pytest.raises(UnsupportedError, match=f"{kind} does not write"):
                known.write("w", weight.shape, how, how.quantize(weight), dtype="F32")
            with pytest.raises(UnsupportedError, match=f"{kind} does not write"):
                known.config(how, skipped=[], dtype="F32")
    with pytest.raises(UnsupportedError, match="bitsandbytes does not write"):
        writable_layout("bitsandbytes").config(MXFP4(), skipped=[], dtype="F32")


def test_one_number_is_a_scale_for_all_and_never_a_weight(tmp_path):
    """What a header claims allocates nothing: one code does not stand for a petabyte."""
    tensors = {"p.weight": np.zeros((8, 64), np.int8), "p.weight_scale": np.full(1, 0.5, np.float32)}
    found, read = found_in(tensors, {"quant_method": "compressed-tensors"}, tmp_path)
    np.testing.assert_array_equal(found["p.weight"].dequantize(read), np.zeros((8, 64), np.float32))
    how = NormalFloat(double=False)
    tensors = LAYOUTS["bitsandbytes"].write("w", (1, 64), how, how.quantize(normal((1, 64))), dtype="F32")
    state = "w.quant_state.bitsandbytes__nf4"
    claimed = json.loads(tensors[state].tobytes()) | {"shape": [1 << 30, 1 << 30], "blocksize": 1 << 60}
    tensors |= {state: np.frombuffer(json.dumps(claimed).encode(), np.uint8), "w": np.zeros((1, 1), np.uint8)}
    with pytest.raises(FormatError, match=r"w has shape .* needs"):
        found_in(tensors, {"quant_method": "bitsandbytes"}, tmp_path)


def test_a_weight_that_is_there_twice(tmp_path):
    how = Ints(bits=4, group=32)
    weight = normal((8, 64))
    tensors = LAYOUTS["compressed-tensors"].write("p.weight", weight.shape, how, how.quantize(weight), dtype="F32")
    with pytest.raises(FormatError, match="twice, quantised and otherwise"):
        found_in(tensors | {"p.weight": weight}, {"quant_method": "compressed-tensors"}, tmp_path)


def test_bits_that_the_file_does_not_tell(tmp_path):
    how = Ints(bits=4, group=0)
    weight = normal((8, 6))
    tensors = LAYOUTS["compressed-tensors"].write("p.weight", weight.shape, how, how.quantize(weight), dtype="F32")
    with pytest.raises(UnsupportedError, match="may have 1 or 2 or 3 or 4 or 5 bits"):
        found_in(tensors, {"quant_method": "compressed-tensors"}, tmp_path)
