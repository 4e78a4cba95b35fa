"""`peftarray quantize`: which weights, what is written, what it says of them, and who can load it."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import read_tensors, tree, write_base
from killing import kill_after_first_shard
from quantised_bases import config_of, is_linear, original_tensors, quantised_weights, write_inputs
from refusals import CommandLine, one_line

import peftarray as pa
from peftarray.quant import NormalFloat
from peftarray.stores.checkpoint import Checkpoint

CODECS = {
    "nf4": ("nf4", {}),
    "nf4 with float32 scales": ("nf4", {"double": False, "block": 32}),
    "fp4": ("fp4", {}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {"block": (48, 32)}),
    "fp8 rows": ("fp8", {"scale": "row"}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "ints": ("ints", {"bits": 3, "group": 64}),
    "mlx": ("mlx", {}),
}


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def base(tmp_path):
    tensors = original_tensors() | {"model.layers.0.mlp.gate.weight": np.ones((4, 64), ml_dtypes.bfloat16)}
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(64, ml_dtypes.bfloat16)
    tensors["model.layers.0.mlp.experts.up_proj"] = np.ones((2, 8, 64), ml_dtypes.bfloat16)
    write_base(tmp_path / "base", tensors, shards=3, config={"dtype": "bfloat16"})
    return tmp_path / "base"


def linear(tensors) -> list[str]:
    return [name for name in tensors if is_linear(name) and name.endswith("_proj.weight")]


@pytest.mark.parametrize("case", CODECS)
def test_linear_weights_are_quantised(case, base, tmp_path):
    name, settings = CODECS[case]
    report = pa.quantize_checkpoint(base, tmp_path / "out", name, **settings)
    codec, original = pa.codec(name, **settings), read_tensors(base)
    found = quantised_weights(tmp_path / "out")
    assert sorted(found) == sorted(linear(original))
    errors = {tensor.name: tensor for tensor in report.tensors}
    for key, (weight, numbers) in found.items():
        exact = original[key].astype(np.float32)
        parts = codec.quantize(exact)
        if (name, settings) != ("ints", CODECS["ints"][1]):  # a group as wide as the rows reads as none
            assert weight.codec == codec
        np.testing.assert_array_equal(numbers, codec.dequantize(parts, exact.shape))
        assert errors[key].error == pytest.approx(np.linalg.norm(numbers - exact) / np.linalg.norm(exact), rel=1e-5)
    with Checkpoint.open(tmp_path / "out") as files:
        for key in set(original) - set(found):
            np.testing.assert_array_equal(files.read_stored(key), original[key])
        sizes = {key: sum(files[part].nbytes for part in found[key][0].names()) for key in found}
        assert {key: tensor.nbytes for key, tensor in errors.items()} == sizes
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.nbytes_before == sum(array.nbytes for array in original.values())
    assert report.copied == len(original) - len(found)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_is_left_out_is_said(base, tmp_path):
    report = pa.quantize_checkpoint(base, tmp_path / "out", skip=["v_proj", "model.layers.1"])
    names = {tensor.name for tensor in report.tensors}
    assert names == {name for name in linear(original_tensors()) if "layers.0" in name and "v_proj" not in name}
    stated = config_of(tmp_path / "out")["quantization_config"]
    assert stated["bnb_4bit_compute_dtype"] == "bfloat16"
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"} <= set(stated["llm_int8_skip_modules"])
    assert {"model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"} <= set(stated["llm_int8_skip_modules"])


def test_the_command(cli, base, tmp_path):
    place = (base, "-o", tmp_path / "out")
    before = tree(tmp_path)
    assert cli("quantize", *place, "--dry-run") == 0
    assert (
        "would quantise 8 weights with NormalFloat(block=64, double=True) (bitsandbytes) and copy 8 tensors" in cli.out
    )
    assert tree(tmp_path) == before
    assert cli("quantize", *place, "--codec", "fp8", "--block", "32x64", "--tensors") == 0
    assert "quantised 8 weights with FP8(dtype='F8_E4M3', scale='block', block=(32, 64)" in cli.out
    assert "largest error          0.02" in cli.out
    assert cli("quantize", base, "-o", tmp_path / "json", "--no-double", "--block", "128", "--json") == 0
    told = json.loads(cli.out)
    assert told["codec"] == "NormalFloat(block=128, double=False)"
    assert [4.2 < tensor["bits"] < 6 for tensor in told["tensors"]] == [True] * 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--codec", "nf5"), ("there is no codec 'nf5'", "nearest: nf4")),
        (("--codec", "gptq"), ("no layout of safetensors checkpoints is written for the codec gptq",)),
        (("--codec", "gguf"), ("for the codec gguf",)),
        (("--codec", "int8", "--block", "64"), ("the codec int8 has no setting 'block'",)),
        (("--block", "0"), ("block",)),
        (("--codec", "fp8", "--block", "64"), ("block", "two whole numbers")),
        (("--codec", "ints", "--group", "48"), ("q_proj.weight: 64 columns are no multiple of the group of 48",)),
        (("--codec", "ints", "--group", "48"), ("--skip model.layers.0.self_attn.q_proj leaves it as it is",)),
        (("--skip", "q_prj"), ("skip names q_prj", "nearest: ")),
        (("--threads", "0"), ("threads is 0",)),
    ],
)
def test_refusals(cli, base, tmp_path, options, words):
    before = tree(tmp_path)
    assert cli("quantize", base, "-o", tmp_path / "out", *options) == 1
    one_line(cli.err, words)
    assert tree(tmp_path) == before


def test_what_is_quantised_already(cli, tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    assert cli("quantize", inputs.base, "-o", tmp_path / "out") == 1
    one_line(cli.err, ("is quantised already",))


def test_models_without_linear_weights(tmp_path):
    write_base(tmp_path / "base", {"model.norm.weight": np.ones(8, np.float32)})
    with pytest.raises(pa.UnsupportedError, match="has no linear weight to quantise"):
        pa.quantize_checkpoint(tmp_path / "base", tmp_path / "out")
    names = {"transformer.h.0.attn.c_attn.weight": np.ones((64, 192), np.float32)}
    write_base(tmp_path / "gpt2", names, config={"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(pa.UnsupportedError, match=r"is stored as \(in, out\), as gpt2 has it"):
        pa.quantize_checkpoint(tmp_path / "gpt2", tmp_path / "out")


def test_a_weight_that_is_not_finite(base, tmp_path):
    tensors = read_tensors(base)
    broken = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    broken[3, 3] = np.inf
    tensors["model.layers.1.mlp.up_proj.weight"] = broken
    write_base(tmp_path / "broken", tensors)
    with pytest.raises(pa.NumberError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: a weight holds NaN"):
        pa.quantize_checkpoint(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_sizes_of_shards(base, tmp_path):
    pa.quantize_checkpoint(base, tmp_path / "whole")
    pa.quantize_checkpoint(base, tmp_path / "small", max_shard_size=8000)
    files = list((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 3
    whole, small = quantised_weights(tmp_path / "whole"), quantised_weights(tmp_path / "small")
    for name, (_, numbers) in whole.items():
        np.testing.assert_array_equal(small[name][1], numbers)


def test_killed_in_the_middle_and_started_again(base, tmp_path):
    pieces = []
    pa.quantize_checkpoint(base, tmp_path / "whole", threads=1, progress=lambda *piece: pieces.append(piece))
    call = "pa.quantize_checkpoint(*sys.argv[1:], threads=1, progress=progress)"
    kill_after_first_shard(call, base, tmp_path / "out", pieces=len(pieces))
    assert not (tmp_path / "out").exists()
    report = pa.quantize_checkpoint(base, tmp_path / "out")
    assert 1 <= report.resumed < 3
    assert {tensor.error is not None for tensor in report.tensors} == {True}
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_inspect_tells_codec_and_bits(cli, base, tmp_path):
    pa.quantize_checkpoint(base, tmp_path / "out")
    found = pa.inspect(tmp_path / "out")
    assert found.facts["quantised weights"].startswith("8 in NormalFloat(block=64, double=True), ")
    bits = float(found.facts["quantised weights"].split()[-4])
    assert bits == pytest.approx(np.mean(4 + 8 / 64) + 1.5, abs=0.3)  # tables and states weigh on matrices so small
    assert found.parameters == pa.inspect(base).parameters
    assert cli("inspect", tmp_path / "out") == 0
    assert "quantised weights: 8 in NormalFloat" in cli.out
    config = config_of(tmp_path / "out") | {"quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert "'hqq' is not known" in pa.inspect(tmp_path / "out").facts["quantised weights"]


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_transformers_loads_it_with_bitsandbytes(name, quiet_and_offline, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "dtype": "float32"}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    pa.quantize_checkpoint(tmp_path / "base", tmp_path / "out", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").eval()
    found = quantised_weights(tmp_path / "out")
    assert len(found) == 14
    kind = "Linear8bitLt" if name == "int8" else "Linear4bit"
    modules = {key: module for key, module in model.named_modules() if type(module).__name__ == kind}
    assert {f"{key}.weight" for key in modules} == set(found)
    for key, module in modules.items():
        weight = module.weight
        if name == "int8":
            numbers = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            np.testing.assert_allclose(numbers.numpy(), found[f"{key}.weight"][1], rtol=1e-6)
        else:
            numbers = functional.dequantize_4bit(weight.data, weight.quant_state)
            np.testing.assert_array_equal(numbers.float().numpy(), found[f"{key}.weight"][1])
    with torch.no_grad():
        logits = model(torch.arange(24)[None]).logits
    assert torch.isfinite(logits).all()
