"""Merging into a quantised base: its weights dequantised, or those of the checkpoint that it was quantised from."""

from __future__ import annotations

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import base_shapes, lora_config, random_tensors, read_tensors, tree, write_adapter, write_base
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_bases import (
    HIDDEN,
    INNER,
    TOUCHED,
    config_of,
    is_linear,
    original_tensors,
    quantised_weights,
    update,
    write_folder,
    write_inputs,
    write_lora,
    write_quantised,
)
from refusals import CommandLine, one_line

import peftarray as pa
from peftarray.merging.base import read_base
from peftarray.quant import FP8, MLX, MXFP4, NVFP4, FourBitFloat, Int8Rows, Ints, NormalFloat
from peftarray.quant.layouts import LAYOUTS
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import save_file

CASES = {
    "nf4": (NormalFloat(), "bitsandbytes"),
    "nf4 with float32 scales": (NormalFloat(block=32, double=False), "bitsandbytes"),
    "fp4": (FourBitFloat(), "bitsandbytes"),
    "int8": (Int8Rows(), "bitsandbytes"),
    "fp8 blocks": (FP8(block=(40, 48)), "fp8"),
    "fp8 rows": (FP8(scale="row"), "compressed-tensors"),
    "fp8 tensor": (FP8(scale="tensor"), "compressed-tensors"),
    "ints": (Ints(bits=4, group=32), "compressed-tensors"),
    "ints with zeros": (Ints(bits=8, group=32, symmetric=False), "compressed-tensors"),
    "mxfp4": (MXFP4(), "compressed-tensors"),
    "nvfp4": (NVFP4(), "compressed-tensors"),
    "mlx": (MLX(group=32), "mlx"),
}


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


def assert_rounded(found: np.ndarray, exact: np.ndarray) -> None:
    """`found` is the float64 numbers rounded to its dtype, but for float32's noise before it."""
    noise = 1e-6 * (np.abs(exact) + np.abs(exact).max())
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    half = unit * 2.0 ** (23 - ml_dtypes.finfo(found.dtype).nmant) / 2
    assert (np.abs(found.astype(np.float64) - exact) <= half + noise).all()


@pytest.mark.parametrize("case", CASES)
def test_dequantised(case, tmp_path):
    inputs = write_inputs(tmp_path, *CASES[case], shards=2)
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised", verify=True)
    merged, original = read_tensors(tmp_path / "out"), read_tensors(inputs.original)
    assert {name: (array.shape, array.dtype) for name, array in merged.items()} == {
        name: (array.shape, array.dtype) for name, array in original.items()
    }
    for name, (_, weight) in quantised_weights(inputs.base).items():
        exact = weight.astype(np.float64) + (update(inputs.adapter, name) if name in TOUCHED else 0)
        assert_rounded(merged[name], exact)
    for name, array in original.items():
        if not is_linear(name):
            np.testing.assert_array_equal(merged[name], array)
    config = config_of(tmp_path / "out")
    assert not {"quantization_config", "quantization"} & set(config)
    assert config["dtype"] == "bfloat16"
    assert sorted(tensor.name for tensor in report.tensors) == sorted(TOUCHED)
    assert pa.verify(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised").passed
    wrong = pa.verify(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised", scale=0.9)
    assert len(wrong.failures) == len(TOUCHED)


@pytest.mark.parametrize("codec", [NormalFloat(), FourBitFloat(double=False), Int8Rows()], ids=lambda codec: codec.kind)
def test_bitsandbytes_dequantises_to_the_same(codec, tmp_path):
    """In float32, what is written is bitsandbytes' own weight and the update, to the last bit but one."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    inputs = write_inputs(tmp_path, codec, "bitsandbytes")
    pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised", dtype="float32")
    merged, held = read_tensors(tmp_path / "out"), {}
    with Checkpoint.open(inputs.base) as files:
        held = {name: files.read_stored(name) for name in files if is_linear(name)}
    for name in [name for name in merged if is_linear(name)]:
        mine = [key for key in held if key.startswith(f"{name}.")]
        parts = {key.removeprefix(f"{name}."): torch.from_numpy(held[key]) for key in mine}
        if isinstance(codec, Int8Rows):
            scale = torch.from_numpy(held[name.replace("weight", "SCB")])
            theirs = functional.int8_vectorwise_dequant(torch.from_numpy(held[name]), scale)
        else:
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            theirs = functional.dequantize_4bit(torch.from_numpy(held[name]), state)
        exact = theirs.double().numpy() + (update(inputs.adapter, name) if name in TOUCHED else 0)
        np.testing.assert_allclose(merged[name], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["nf4", "int8", "fp8 blocks", "ints", "mlx"])
def test_the_original_is_merged_as_if_it_had_been_given(case, tmp_path):
    inputs = write_inputs(tmp_path, *CASES[case])
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as=f"original={inputs.original}", verify=True)
    pa.merge(inputs.original, inputs.adapter, tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    original = read_tensors(inputs.original)
    quantised = quantised_weights(inputs.base)
    for tensor in report.tensors:
        weight = original[tensor.name].astype(np.float64)
        error = np.linalg.norm(quantised[tensor.name][1] - weight) / np.linalg.norm(weight)
        assert tensor.base_error == pytest.approx(error, rel=0.2)  # from some of the rows
        assert tensor.mismatch == pytest.approx(tensor.base_error / tensor.update)
        assert tensor.to_dict()["mismatch"] == tensor.mismatch
    assert pa.verify(inputs.base, inputs.adapter, tmp_path / "out", base_as=f"original={inputs.original}").passed


def test_an_original_that_is_farther_away_than_the_update_is_told(cli, tmp_path):
    """What Falcon-H1 suffered from: the 4-bit base of the training and its original differ by many times the update."""
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes", size=0.01)
    assert not cli(
        "merge", inputs.base, inputs.adapter, "-o", tmp_path / "out", "--base-as", f"original={inputs.original}"
    )
    assert "OTHER BASE             in 4 of 4 tensors" in cli.out
    assert "--base-as dequantised" in cli.out
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "again", base_as=f"original={inputs.original}")
    assert [tensor.mismatch > 5 for tensor in report.mismatched] == [True] * 4


def test_the_base_must_be_said(cli, tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    place = (inputs.base, inputs.adapter, "-o", tmp_path / "out")
    cli.refuses(tmp_path, *place, words=("is quantised (nf4)", "--base-as dequantised", "--base-as original=PATH"))
    cli.refuses(tmp_path, *place, "--requantise", words=("requantise is for a quantised base", "--base-as"))
    cli.refuses(tmp_path, *place, "--base-as", "it", words=("base_as is 'it'", "'dequantised' or 'original=PATH'"))
    both = ("--base-as", "dequantised", "--requantise")
    cli.refuses(tmp_path, *place, *both, "--keep-touched-in", "bf16", words=("contradict each other",))
    cli.refuses(tmp_path, *place, *both, "--dtype", "float32", words=("keeps its dtypes", "keep_touched_in"))
    plain = (inputs.original, inputs.adapter, "-o", tmp_path / "out", "--base-as", "dequantised")
    cli.refuses(tmp_path, *plain, words=(f"{inputs.original} is not quantised; leave it out",))


def altered(inputs, change):
    tensors = read_tensors(inputs.original)
    change(tensors)
    write_base(inputs.original.with_name("other"), tensors)
    return f"original={inputs.original.with_name('other')}"


def other_numbers(tensors):
    tensors |= original_tensors(seed=5)


def one_other_layer(tensors):
    tensors[TOUCHED[0]] = original_tensors(seed=5)[TOUCHED[0]]


def trained_on(tensors):
    rng = np.random.default_rng(0)
    for name in filter(is_linear, tensors):
        noise = 0.3 * 0.1 * rng.standard_normal(tensors[name].shape)
        tensors[name] = (tensors[name].astype(np.float64) + noise).astype(ml_dtypes.bfloat16)


def shorter(tensors):
    del tensors[TOUCHED[1]]


def longer(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]


def wider(tensors):
    tensors[TOUCHED[0]] = np.concatenate([tensors[TOUCHED[0]]] * 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_numbers, ("is not what", "differs by 14", "nf4 explains", "8 of 8 weights are off")),
        (one_other_layer, (f"{TOUCHED[0]} differs by", "1 of 8 weights are off", "--base-as dequantised")),
        (trained_on, ("is not what", "differs by 3", "8 of 8")),
        (shorter, (f"has {TOUCHED[1]}, and the original", "does not")),
        (longer, ("has model.layers.2.mlp.up_proj.weight, and", "does not")),
        (wider, (f"{TOUCHED[0]} is (64, 64)", "(128, 64) in the original")),
    ],
)
def test_another_model_is_not_the_original(cli, tmp_path, change, words):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    place = (inputs.base, inputs.adapter, "-o", tmp_path / "out", "--base-as", altered(inputs, change))
    cli.refuses(tmp_path, *place, words=words)


def test_a_tied_head_may_lie_in_one_of_the_two_alone(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    tensors = read_tensors(inputs.original)
    del tensors["lm_head.weight"]
    write_base(tmp_path / "tied", tensors)
    with pytest.raises(pa.MatchError, match=r"lm_head\.weight"):
        pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as=f"original={tmp_path / 'tied'}")
    config = config_of(inputs.base) | {"tie_word_embeddings": True}
    (inputs.base / "config.json").write_text(json.dumps(config))
    pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as=f"original={tmp_path / 'tied'}")


def test_the_original_must_not_be_quantised(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    with pytest.raises(pa.ConfigError, match="is quantised as well; give the checkpoint that"):
        pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as=f"original={inputs.base}")


def packed(numbers: np.ndarray) -> np.ndarray:
    """Four-bit numbers along the first axis in words of 32 bits, the lowest first."""
    eights = numbers.reshape(-1, 8, *numbers.shape[1:]).astype(np.uint64)
    return sum(eights[:, at] << np.uint64(4 * at) for at in range(8)).astype(np.uint32).view(np.int32)


def write_gptq(place):
    """A base whose adapted modules are GPTQ's. Returns the weights by the formula of its files."""
    rng = np.random.default_rng(3)
    held, exact = {}, {}
    for name, array in original_tensors().items():
        if not is_linear(name):
            held[name] = array.astype(np.float16)
            continue
        rows, columns = array.shape
        codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(1, 16, (columns // 32, rows))
        scales = (0.02 * rng.random((columns // 32, rows)) + 0.01).astype(np.float16)
        group = np.arange(columns) // 32
        module = name.removesuffix(".weight")
        held |= {f"{module}.qweight": packed(codes), f"{module}.qzeros": packed((zeros - 1).T).T.copy()}
        held |= {f"{module}.scales": scales, f"{module}.g_idx": group.astype(np.int32)}
        exact[name] = (scales[group].astype(np.float64) * (codes - zeros[group])).T
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    write_folder(place / "base", held, {"quantization_config": stated, "dtype": "float16"})
    write_lora(place / "adapter")
    return exact


def test_gptq_is_read_and_not_written(tmp_path):
    exact = write_gptq(tmp_path)
    pa.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", base_as="dequantised", verify=True)
    merged = read_tensors(tmp_path / "out")
    assert set(merged) == set(base_shapes(2, HIDDEN, INNER))
    assert {array.dtype for array in merged.values()} == {np.dtype(np.float16)}
    for name, weight in exact.items():
        assert_rounded(merged[name], weight + (update(tmp_path / "adapter", name) if name in TOUCHED else 0))
    words = "weights quantised as gptq are read, and not written; written are bitsandbytes, fp8"
    with pytest.raises(pa.UnsupportedError, match=words):
        pa.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", base_as="dequantised", requantise=True)
    with pytest.raises(pa.UnsupportedError, match=r"gptq cannot say that model.*_proj is not quantised"):
        pa.merge(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "again", base_as="dequantised", keep_touched_in="bf16"
        )
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "again.partial").exists()


def write_gpt_oss(place):
    """Stacked experts as gpt-oss stores them: transposed, and in MXFP4."""
    layout, codec = LAYOUTS["mxfp4"], MXFP4()
    rng = np.random.default_rng(0)
    held, shapes = {}, {"gate_up_proj": (3, 48, 64), "down_proj": (3, 64, 32)}
    held |= random_tensors({"model.layers.0.self_attn.q_proj.weight": (64, 64)}, ml_dtypes.bfloat16, 0)
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        held |= layout.write(f"model.layers.0.mlp.experts.{name}", shape, codec, codec.quantize(weight), dtype="BF16")
    config = {"quantization_config": layout.config(codec, skipped=["lm_head"], dtype="BF16"), "model_type": "gpt_oss"}
    write_folder(place / "base", held, config)
    factors = {"lora_A": (2, 64), "lora_B": (64, 2)}
    named = {
        f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight": shape for name, shape in factors.items()
    }
    write_adapter(place / "adapter", random_tensors(named, np.float32, 1), lora_config(target_modules=["q_proj"]))


def test_stacks_that_the_file_holds_transposed(tmp_path):
    write_gpt_oss(tmp_path)
    pa.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", base_as="dequantised", verify=True)
    merged = read_tensors(tmp_path / "out")
    for name, (_, weight) in quantised_weights(tmp_path / "base").items():
        np.testing.assert_array_equal(merged[name], np.swapaxes(weight, -1, -2).astype(ml_dtypes.bfloat16))
    assert merged["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 64, 48)


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """Weights of every kind, and all of their numbers as the model has them."""
    place = tmp_path_factory.mktemp("origins")
    write_gpt_oss(place)
    write_quantised(place / "nf4", original_tensors(50, 33), NormalFloat(block=7), "bitsandbytes")
    write_quantised(place / "ints", original_tensors(), Ints(bits=4, group=32, symmetric=False), "compressed-tensors")
    found = []
    for folder in ("base", "nf4", "ints"):
        base = read_base(Checkpoint.open(place / folder))
        for name in base.quantised:
            origin = base.stored_origin(name)
            size = int(np.prod(origin.shape))
            found.append((origin, origin.read(0, 1, size).reshape(-1)))
    return found


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_the_whole(origins, data):
    origin, numbers = data.draw(st.sampled_from(origins))
    columns = data.draw(st.sampled_from([origin.shape[-1], 1, int(np.prod(origin.shape[1:]))]))
    matrix = numbers.reshape(-1, columns)
    begin = data.draw(st.integers(0, len(matrix) - 1))
    end = data.draw(st.integers(begin + 1, len(matrix)))
    inner = sorted(data.draw(st.lists(st.integers(begin, end), min_size=2, max_size=4)))
    with origin.rows(begin, end, columns) as take:
        for first, last in itertools.pairwise(inner):
            np.testing.assert_array_equal(take(first, last), matrix[first:last])


def test_the_dtype_that_is_not_said_is_bfloat16(tmp_path):
    tensors = original_tensors()
    write_quantised(tmp_path / "base", tensors, Int8Rows(), "bitsandbytes", dtype=None)
    write_lora(tmp_path / "adapter")
    pa.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", base_as="dequantised")
    assert read_tensors(tmp_path / "out")[TOUCHED[0]].dtype == ml_dtypes.bfloat16


def test_sizes_are_known_before(cli, tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    before = tree(tmp_path)
    planned = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised", dry_run=True)
    assert tree(tmp_path) == before
    told = []
    pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised", planned=told.append)
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert planned.nbytes == size
    assert told == [size]
    assert planned.memory < 100 << 20


def damaged(inputs, change):
    with Checkpoint.open(inputs.base) as files:
        held = {name: files.read_stored(name) for name in files}
    change(held)
    save_file(held, inputs.base / "model.safetensors")


def state_of(name):
    return f"{name}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop(f"{TOUCHED[0]}.absmax"), (f"not {TOUCHED[0]}.absmax, which it needs",)),
        (
            lambda held: held.update({f"{TOUCHED[0]}.absmax": np.zeros(3, np.uint8)}),
            (f"{TOUCHED[0]}.absmax has shape (3,)", "damaged"),
        ),
        (lambda held: held.update({TOUCHED[0]: np.zeros((9, 1), np.uint8)}), (f"{TOUCHED[0]} has shape (9, 1)",)),
        (lambda held: held.update({state_of(TOUCHED[0]): np.zeros(9, np.uint8)}), (state_of(TOUCHED[0]), "JSON")),
        (
            lambda held: held.update({f"{TOUCHED[0]}.quant_map": np.zeros(16, np.float32)}),
            ("other numbers than bitsandbytes'",),
        ),
    ],
)
def test_damaged_parts(cli, tmp_path, change, words):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    damaged(inputs, change)
    place = (inputs.base, inputs.adapter, "-o", tmp_path / "out", "--base-as", "dequantised")
    cli.refuses(tmp_path, *place, words=words)


def test_methods_that_are_not_known(cli, tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    config = config_of(inputs.base) | {"quantization_config": {"quant_method": "hqq"}}
    (inputs.base / "config.json").write_text(json.dumps(config))
    place = (inputs.base, inputs.adapter, "-o", tmp_path / "out", "--base-as", "dequantised")
    cli.refuses(tmp_path, *place, words=("'hqq' is not known; known are bitsandbytes, fp8",))


def test_scales_that_are_not_finite(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(double=False), "bitsandbytes")
    damaged(inputs, lambda held: held[f"{TOUCHED[0]}.absmax"].__setitem__(0, np.nan))
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised")
    assert report.total.nonfinite == 64  # as in the base, and counted
    with pytest.raises(pa.NumberError, match=f"{TOUCHED[0]}: a weight holds NaN or infinity"):
        pa.merge(inputs.base, inputs.adapter, tmp_path / "again", base_as="dequantised", requantise=True)
    assert not (tmp_path / "again.partial").exists()


def test_verify_asks_what_the_base_is(cli, tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    pa.merge(inputs.base, inputs.adapter, tmp_path / "out", base_as="dequantised")
    assert cli("verify", inputs.base, inputs.adapter, tmp_path / "out") == 1
    one_line(cli.err, ("is quantised (nf4)", "--base-as"))
    assert cli("verify", inputs.base, inputs.adapter, tmp_path / "out", "--base-as", "dequantised") == 0
