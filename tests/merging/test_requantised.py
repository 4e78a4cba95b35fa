"""A merged base that stays quantised: as it was, or with more bits where an adapter landed."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from checkpoints import read_tensors
from killing import kill_after_first_shard
from quantised_bases import (
    TOUCHED,
    Inputs,
    config_of,
    held_bytes,
    quantised_weights,
    update,
    write_folder,
    write_inputs,
)
from refusals import CommandLine, one_line
from test_quantised_bases import CASES, assert_rounded

import peftarray as pa
from peftarray.merging.encoding import codes_changed
from peftarray.merging.journal import JOURNAL
from peftarray.quant import Int8Rows, Ints, NormalFloat
from peftarray.quant.layouts import LAYOUTS
from peftarray.stores.checkpoint import Checkpoint

DEQUANTISED = {"base_as": "dequantised"}


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


def norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array))


@pytest.mark.parametrize("case", CASES)
def test_requantised(case, tmp_path):
    inputs = write_inputs(tmp_path, *CASES[case], shards=3)
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", requantise=True, verify=True, **DEQUANTISED)
    before, after = quantised_weights(inputs.base), quantised_weights(tmp_path / "out")
    assert {name: weight.codec for name, (weight, _) in after.items()} == {
        name: weight.codec for name, (weight, _) in before.items()
    }
    figures = {tensor.name: tensor for tensor in report.tensors}
    assert sorted(figures) == sorted(TOUCHED)
    for name in TOUCHED:
        (weight, base), (_, found) = before[name], after[name]
        wanted = update(inputs.adapter, name)
        exact = (base + wanted).astype(np.float32)
        expected = weight.codec.dequantize(weight.codec.quantize(exact), exact.shape)
        # But for scales and halves that float32's noise moves.
        assert norm(found - exact) <= 1.001 * norm(expected - exact)
        assert norm(found - expected) <= 0.3 * norm(expected - exact)
        error = found - base - wanted
        assert figures[name].error == pytest.approx(norm(error) / norm(wanted), rel=1e-4)
        assert figures[name].retained == pytest.approx(1 - (norm(error) / norm(wanted)) ** 2, rel=1e-4)
        cosine = np.vdot(found - base, wanted) / norm(found - base) / norm(wanted)
        assert figures[name].cosine == pytest.approx(cosine, rel=1e-4)
        assert figures[name].dtype == weight.codec.kind
        assert figures[name].sums.measured == figures[name].sums.count == base.size
    old, new = held_bytes(inputs.base), held_bytes(tmp_path / "out")
    assert set(old) == set(new)
    touched = {tensor for name in TOUCHED for tensor in before[name][0].names()}
    assert {name for name in old if old[name] != new[name]} <= touched
    assert config_of(tmp_path / "out") == config_of(inputs.base)
    assert report.copied == len(old) - len({tensor for name in TOUCHED for tensor in before[name][0].names()})
    again = pa.verify(inputs.base, inputs.adapter, tmp_path / "out", **DEQUANTISED)
    assert again.passed
    assert len(pa.verify(inputs.base, inputs.adapter, tmp_path / "out", scale=0.8, **DEQUANTISED).failures) == 4


def test_codes_that_changed_are_counted(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", requantise=True, **DEQUANTISED)
    before, after = (read_quantised(folder) for folder in (inputs.base, tmp_path / "out"))
    for tensor in report.tensors:
        same = halves(before[tensor.name]) == halves(after[tensor.name])
        assert tensor.unchanged == pytest.approx(same.mean())


def read_quantised(folder) -> dict[str, np.ndarray]:
    with Checkpoint.open(folder) as files:
        return {name: files.read_stored(name) for name in files if files[name].code == "U8"}


def halves(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes >> 4, codes & 15])


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_every_width_are_compared(bits):
    """Packed as `Ints` does it, in rows that end within a word."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (2, 5, 37))
    codes[1] = np.where(rng.random((5, 37)) < 0.5, codes[0], codes[1])
    words = -(-37 * bits // 32)
    streams = np.zeros((2, 5, words * 32), np.uint8)
    for bit in range(bits):
        streams[..., bit : 37 * bits : bits] = codes >> bit & 1
    before, after = np.packbits(streams, axis=-1, bitorder="little").view(np.int32)
    changed = np.count_nonzero(codes[0] != codes[1])
    assert codes_changed(before, after, codes[0].size, bits) == changed
    assert codes_changed(before, before, codes[0].size, bits) == 0


def test_the_original_requantised(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    how = {"base_as": f"original={inputs.original}", "requantise": True}
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", verify=True, **how)
    after, original = quantised_weights(tmp_path / "out"), read_tensors(inputs.original)
    for name in TOUCHED:
        weight, found = after[name]
        exact = (original[name].astype(np.float64) + update(inputs.adapter, name)).astype(np.float32)
        expected = weight.codec.dequantize(weight.codec.quantize(exact), exact.shape)
        assert norm(found - expected) <= 0.1 * norm(expected - exact)
    assert all(tensor.base_error > 0.05 for tensor in report.tensors)
    assert pa.verify(inputs.base, inputs.adapter, tmp_path / "out", base_as=how["base_as"]).passed


def test_an_update_that_requantising_erases_is_refused(cli, tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes", size=0.01)
    out, place = tmp_path / "out", ("--base-as", "dequantised", "--requantise")
    assert cli("merge", inputs.base, inputs.adapter, "-o", out, *place) == 3
    words = (
        "requantising loses the update: 4 of 4 weights",
        "less than 50%",
        "times the update",
        "codes are the base's",
    )
    one_line(cli.err, (*words, "--keep-touched-in", "--allow-lost-updates", str(tmp_path / "out.partial")))
    assert not out.exists()
    assert cli("merge", inputs.base, inputs.adapter, "-o", out, *place, "--allow-lost-updates", "--tensors") == 0
    assert "1 shards from an earlier run" in cli.out
    assert "LOST IN ROUNDING       4 tensors hold less than 90% of their update; --keep-touched-in bfloat16" in cli.out
    report = pa.merge(
        inputs.base, inputs.adapter, tmp_path / "api", requantise=True, allow_lost_updates=True, **DEQUANTISED
    )
    for tensor in report.flagged:
        assert tensor.retained < 0.1
        assert tensor.unchanged > 0.95  # nearly every code is what it was: the base model, under another name
    assert len(report.flagged) == 4


def test_an_update_of_zero_is_not_lost(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes", size=0.0)
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", requantise=True, **DEQUANTISED)
    assert len(report.empty) == 4


@pytest.mark.parametrize("case", ["nf4", "int8", "fp8 blocks", "ints", "mlx"])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_touched_weights_in_more_bits(case, dtype, tmp_path):
    inputs = write_inputs(tmp_path, *CASES[case], size=0.01)
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", keep_touched_in=dtype, verify=True, **DEQUANTISED)
    before, after = quantised_weights(inputs.base), quantised_weights(tmp_path / "out")
    assert set(before) - set(after) == set(TOUCHED)
    merged = read_tensors_of(tmp_path / "out", TOUCHED)
    for name in TOUCHED:
        assert merged[name].dtype == {"bf16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]
        assert_rounded(merged[name], before[name][1] + update(inputs.adapter, name))
    old, new = held_bytes(inputs.base), held_bytes(tmp_path / "out")
    gone = {tensor for name in TOUCHED for tensor in before[name][0].names()}
    assert {name: old[name] for name in old if name not in gone} == {
        name: new[name] for name in new if name not in TOUCHED
    }
    assert report.retained > (0.6 if dtype == "bf16" else 0.9999)  # requantised it is below 0.1
    stated, layout = config_of(tmp_path / "out"), LAYOUTS[CASES[case][1]]
    modules = [name.removesuffix(".weight") for name in TOUCHED]
    if layout.skip_list is None:
        assert all(stated["quantization"][module] is False for module in modules)
    else:
        assert set(stated["quantization_config"][layout.skip_list]) == {"lm_head", *modules}
    assert pa.verify(inputs.base, inputs.adapter, tmp_path / "out", **DEQUANTISED).passed


def read_tensors_of(folder, names) -> dict[str, np.ndarray]:
    with Checkpoint.open(folder) as files:
        return {name: files.read_stored(name) for name in names}


def test_a_config_without_a_list_gets_all_that_is_not_quantised(tmp_path):
    """bitsandbytes takes the absence of a list as one of its own making."""
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    config = config_of(inputs.base)
    config["quantization_config"]["llm_int8_skip_modules"] = None
    (inputs.base / "config.json").write_text(json.dumps(config))
    pa.merge(inputs.base, inputs.adapter, tmp_path / "out", keep_touched_in="bf16", **DEQUANTISED)
    skipped = config_of(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"]
    assert set(skipped) == {"lm_head", "model.embed_tokens", *(name.removesuffix(".weight") for name in TOUCHED)}


def test_scales_keep_their_dtype_and_tensors_beside_them_pass(tmp_path):
    """compressed-tensors writes scales in the dtype of the model, and scales of activations beside them."""
    codec, layout = Ints(bits=4, group=32), LAYOUTS["compressed-tensors"]
    inputs = write_inputs(tmp_path, codec, "compressed-tensors")
    with Checkpoint.open(inputs.base) as files:
        held = {name: files.read_stored(name) for name in files}
    for name in [name for name in held if name.endswith("_scale")]:
        held[name] = held[name].astype(ml_dtypes.bfloat16)
        held[name.replace("weight_scale", "input_scale")] = np.float32(0.5)
    shutil.rmtree(inputs.base)
    write_folder(inputs.base, held, {"quantization_config": layout.config(codec, skipped=["lm_head"], dtype="BF16")})
    report = pa.merge(inputs.base, inputs.adapter, tmp_path / "out", requantise=True, verify=True, **DEQUANTISED)
    with Checkpoint.open(inputs.base) as old, Checkpoint.open(tmp_path / "out") as new:
        assert {name: (info.code, info.shape) for name, info in old.items()} == {
            name: (info.code, info.shape) for name, info in new.items()
        }
        assert new.read_stored("model.layers.0.mlp.down_proj.input_scale") == 0.5
    for tensor in report.tensors:  # measured on what is written, not on what the codec made
        base, found = (quantised_weights(folder)[tensor.name][1] for folder in (inputs.base, tmp_path / "out"))
        wanted = update(inputs.adapter, tensor.name)
        assert tensor.error == pytest.approx(norm(found - base - wanted) / norm(wanted), rel=1e-4)


def test_codecs_that_only_read(tmp_path):
    """Groups in the order of a calibration: compressed-tensors is written, such weights are not."""
    codec = Ints(bits=4, group=32)
    inputs = write_inputs(tmp_path, codec, "compressed-tensors")
    with Checkpoint.open(inputs.base) as files:
        held, config = {name: files.read_stored(name) for name in files}, files.config
    order = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
    held["model.layers.0.mlp.down_proj.weight_g_idx"] = order
    shutil.rmtree(inputs.base)
    write_folder(inputs.base, held, config)
    pa.merge(inputs.base, inputs.adapter, tmp_path / "plain", verify=True, **DEQUANTISED)
    with pytest.raises(pa.UnsupportedError, match="act_order comes out of a calibration"):
        pa.merge(inputs.base, inputs.adapter, tmp_path / "out", requantise=True, **DEQUANTISED)
    assert not (tmp_path / "out.partial").exists()


def test_killed_in_the_middle_and_started_again(tmp_path):
    inputs = write_inputs(tmp_path, Int8Rows(), "bitsandbytes", shards=4)
    out, how, pieces = tmp_path / "out", {"requantise": True, "allow_lost_updates": True} | DEQUANTISED, []
    count = {"threads": 1, "progress": lambda *piece: pieces.append(piece)}
    pa.merge(inputs.base, inputs.adapter, tmp_path / "whole", **how, **count)
    call = 'pa.merge(*sys.argv[1:], base_as="dequantised", requantise=True, threads=1, progress=progress)'
    kill_after_first_shard(call, inputs.base, inputs.adapter, out, pieces=len(pieces))
    assert not out.exists()
    assert (tmp_path / "out.partial" / JOURNAL).is_file()
    report = pa.merge(inputs.base, inputs.adapter, out, **how)
    assert 1 <= report.resumed < 4
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(tensor.name for tensor in report.tensors) == sorted(TOUCHED)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_memory_is_that_of_one_weight_a_thread(tmp_path):
    inputs = write_inputs(tmp_path, NormalFloat(), "bitsandbytes")
    plans = [
        pa.merge(inputs.base, inputs.adapter, tmp_path / "out", dry_run=True, requantise=True, threads=n, **DEQUANTISED)
        for n in (1, 2)
    ]
    assert plans[1].memory == 2 * plans[0].memory


@pytest.fixture(scope="module")
def loaded(quiet_and_offline, tmp_path_factory):
    """A small Llama of transformers with what quantising it by `quantize_checkpoint` makes, and a weak LoRA."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.mktemp("loaded")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(place / "original")
    pa.quantize_checkpoint(place / "original", place / "base", "nf4", double=False)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2e-4)
    lora.save_pretrained(place / "adapter")
    return Inputs(place / "original", place / "base", place / "adapter")


def in_transformers(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.arange(24)[None]).logits.numpy()


def test_peft_erases_what_is_refused_here(loaded, tmp_path):
    """PEFT merges into 4 bits without a word: the merged model is the base, code for code."""
    peft = pytest.importorskip("peft")
    base = in_transformers(loaded.base)
    codes = {name: module.weight.data.numpy().copy() for name, module in base.named_modules() if "proj" in name[-5:]}
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit linear"):
        merged = peft.PeftModel.from_pretrained(base, loaded.adapter).merge_and_unload()
    touched = {name: module.weight.data.numpy() for name, module in merged.named_modules() if name in codes}
    same = [np.mean(halves(codes[name]) == halves(touched[name])) for name in touched]
    assert min(same) > 0.99
    with pytest.raises(pa.QualityError, match="requantising loses the update: 4 of 4 weights"):
        pa.merge(loaded.base, loaded.adapter, tmp_path / "out", requantise=True, **DEQUANTISED)


def test_what_stays_quantised_loads_in_transformers(loaded, tmp_path):
    """With bitsandbytes: requantised, and with touched weights in float32, it computes what the plain merge does."""
    how = {"requantise": True, "allow_lost_updates": True}
    pa.merge(loaded.base, loaded.adapter, tmp_path / "again", **how, **DEQUANTISED)
    pa.merge(loaded.base, loaded.adapter, tmp_path / "kept", keep_touched_in="float32", **DEQUANTISED)
    pa.merge(loaded.base, loaded.adapter, tmp_path / "plain", dtype="float32", **DEQUANTISED)
    plain, kept = in_transformers(tmp_path / "plain"), in_transformers(tmp_path / "kept")
    kinds = {name: type(module).__name__ for name, module in kept.named_modules() if name.endswith("_proj")}
    assert {name.rpartition(".")[2] for name, kind in kinds.items() if kind == "Linear"} == {"q_proj", "down_proj"}
    assert set(kinds.values()) == {"Linear", "Linear4bit"}
    weights = decoded(plain)
    for name, weight in decoded(kept).items():
        np.testing.assert_array_equal(weight, weights[name])
    again = in_transformers(tmp_path / "again")
    for name, (_, weight) in quantised_weights(tmp_path / "again").items():
        np.testing.assert_array_equal(decoded(again)[name], weight)
    for model in (kept, again):  # bitsandbytes multiplies in bfloat16 on the CPU
        np.testing.assert_allclose(logits(model), logits(plain), atol=0.02)


def decoded(model) -> dict[str, np.ndarray]:
    """The weight of every linear layer, by bitsandbytes where it is quantised."""
    functional = pytest.importorskip("bitsandbytes").functional
    found = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weight = module.weight.data
            state = getattr(module.weight, "quant_state", None)
            weight = weight if state is None else functional.dequantize_4bit(weight, state)
            found[f"{name}.weight"] = weight.float().numpy()
    return found
