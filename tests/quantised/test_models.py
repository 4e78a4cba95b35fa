"""Quantised models: mappings, models of every library and torch modules; loading, training and saving."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import models
from peftarray.arrays import namespace
from peftarray.backend import backend_of
from peftarray.quantised_weight import QuantisedWeight

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = np.random.default_rng(0).integers(0, 96, (2, 12))
QUANTISED = 2 * 7


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as place:
        models.save(models.create(TINY | {"tie_word_embeddings": True}), Path(place) / "base")
        yield Path(place) / "base"


def packed(weights: Any) -> dict[str, QuantisedWeight]:
    return {name: weight for name, weight in weights.items() if isinstance(weight, QuantisedWeight)}


def plain(model: Any) -> Any:
    """The model with the decoded numbers as arrays."""
    from dataclasses import replace

    formed = {name: w.dense() if isinstance(w, QuantisedWeight) else w for name, w in model.weights.items()}
    return replace(model, weights=formed)


def test_what_is_quantised():
    tree = {
        "embed_tokens": {"weight": np.ones((20, 64), np.float32)},
        "layers": [{"up": {"weight": np.ones((8, 64), np.float32), "bias": np.ones(8, np.float32)}}] * 2,
        "kernels": {"attention": {"kernel": np.ones((64, 8), np.float32)}, "conv": {"weight": np.ones((4, 4, 3))}},
        "norm": {"weight": np.ones(64, np.float32)},
        "ids": np.arange(4),
        "lm_head": {"weight": np.ones((20, 64), np.float32)},
        "score": {"weight": np.ones((2, 64), np.float32)},
    }
    found = dict(pa_named(pa.quantize(tree, "int8")))
    assert list(packed(found)) == ["layers.0.up.weight", "layers.1.up.weight", "kernels.attention.kernel"]
    found = dict(pa_named(pa.quantize(tree, "int8", skip=["layers.1", "attention"], embeddings="nf4")))
    assert list(packed(found)) == ["embed_tokens.weight", "layers.0.up.weight"]
    again = pa.quantize(tree, "int8", skip=["layers.1", "attention"])
    assert pa.quantize(again, "nf4")["layers"][0]["up"]["weight"] is again["layers"][0]["up"]["weight"]
    with pytest.raises(pa.MatchError, match="nearest: lm_head"):
        pa.quantize(tree, skip=["lm_hed"])
    with pytest.raises(pa.ShapeError, match=r"up\.weight"):
        pa.quantize({"up.weight": np.ones((8, 60), np.float32)}, "mlx")
    with pytest.raises(pa.MatchError, match="none of 1"):
        pa.quantize({"norm.weight": np.ones(4, np.float32)})
    with pytest.raises(pa.ConfigError, match="skip"):
        pa.quantize(tree, skip="up")


def pa_named(tree: Any) -> Any:
    from peftarray import trees

    return trees.named(tree)


def test_a_model_of_every_library(folder, xp, asarray, to_numpy):
    backend = backend_of(asarray([0.0]))
    if backend not in ("numpy", "torch", "jax"):
        pytest.skip("three libraries have shown it")
    base = models.load(folder, backend=backend, quantize="nf4", embeddings=pa.codec("ints", bits=6, group=64))
    assert len(packed(base.weights)) == QUANTISED + 1
    other = pa.quantize(models.load(folder), "nf4")
    for name, weight in packed(other.weights).items():  # the host quantises, whatever the library
        for key, part in weight.parts.items():
            np.testing.assert_array_equal(to_numpy(base.weights[name].parts[key]), part)

    config = pa.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    batches = [{"input_ids": IDS}]

    def train(model: Any) -> Any:
        adapted = pa.get_peft_model(model, config, seed=0)
        loss = models.causal_loss(model)
        history = pa.fit(
            adapted,
            lambda m, batch: loss(m.weights, batch),
            batches,
            steps=6,
            optimizer=pa.AdamW(2e-2),
            progress=False,
        )
        return adapted, history.losses

    adapted, losses = train(base)
    assert all(weight.materialised == 0 for weight in packed(base.weights).values())
    assert losses[-1] < losses[0] - 0.3
    _, wanted = train(plain(models.load(folder, quantize="nf4", embeddings=pa.codec("ints", bits=6, group=64))))
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    if backend == "numpy":
        merged = adapted.merge_and_unload()
        assert not packed(merged.weights)
        np.testing.assert_allclose(merged(merged.weights, IDS), adapted(IDS), atol=1e-3)
        text = base.generate(adapted.weights, IDS[:1, :4], max_new_tokens=4)
        np.testing.assert_array_equal(text, merged.generate(merged.weights, IDS[:1, :4], max_new_tokens=4))


def test_the_adapter_of_a_quantised_model(folder, tmp_path):
    base = models.load(folder, quantize="nf4", skip=["o_proj"])
    assert len(packed(base.weights)) == QUANTISED - 2
    config = pa.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "o_proj"])
    model = pa.get_peft_model(base, config, seed=1)
    model.save_pretrained(tmp_path)
    again = pa.PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_array_equal(again(IDS), model(IDS))
    assert model.get_nb_trainable_parameters()[1] > 96 * 64  # of numbers, not of bytes
    assert all(weight.dtype == np.float32 for weight in packed(base.weights).values())


@pytest.mark.parametrize(
    "codec", [pa.codec("nf4"), pa.codec("int8"), pa.codec("fp8", block=(32, 32)), pa.codec("ints", group=32)], ids=str
)
def test_checkpoints_that_are_stored_quantised(codec, folder, tmp_path):
    base = models.load(folder, quantize=codec)
    models.save(base, tmp_path / "out")
    again = models.load(tmp_path / "out", dtype="float64")
    assert packed(again.weights).keys() == packed(base.weights).keys()
    assert again.left_out == ()
    weight = again.weights["model.layers.0.mlp.up_proj.weight"]
    assert weight.codec == codec
    assert weight.dtype == np.float64
    np.testing.assert_array_equal(weight.dense(), base.weights["model.layers.0.mlp.up_proj.weight"].dense())


def test_two_codecs_are_not_one_file(folder, tmp_path):
    base = models.load(folder, quantize="nf4", embeddings="int8")
    with pytest.raises(pa.UnsupportedError, match="one codec"):
        models.save(base, tmp_path / "out")
    with pytest.raises(pa.ConfigError, match="quantize is None"):
        models.load(folder, skip=["o_proj"])


def test_transformers_reads_what_is_saved(folder, tmp_path):
    """The file of a quantised model is bitsandbytes': transformers loads it, with the same logits."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = models.load(folder, quantize="nf4")
    models.save(base, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, weight in packed(base.weights).items():
        held = theirs.get_parameter(name)
        decoded = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
        np.testing.assert_array_equal(decoded.numpy(), weight.dense())
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(IDS)).logits.numpy()
    # bitsandbytes multiplies in bfloat16 on CPUs that can.
    np.testing.assert_allclose(base(base.weights, IDS), wanted, atol=0.01 * np.abs(wanted).max())


class TestTorchModules:
    """`pa.quantize` on a `torch.nn.Module`."""

    @staticmethod
    def nets() -> tuple[Any, Any, Any]:
        """A net, quantised; one with the decoded numbers; and inputs."""
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 16, bias=False))
        known = copy.deepcopy(net)
        quantised = pa.quantize(net, "nf4", block=32)
        for place in (0, 2):
            known[place].weight.data = quantised[place].weight.dense()
        return quantised, known, torch.randn(5, 64)

    @pytest.mark.parametrize(
        "config",
        [
            pa.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False),
            pa.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True),
            pa.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
            pa.OFTConfig(target_modules=["0"], oft_block_size=8, init_weights=False),
        ],
        ids=lambda config: config.peft_type,
    )
    def test_adapters(self, config):
        torch = pytest.importorskip("torch")
        quantised, known, x = self.nets()
        ours, theirs = pa.get_peft_model(quantised, config), pa.get_peft_model(known, config)
        for model in (ours, theirs):
            model(x).square().mean().backward()
        for name, one in ours.named_parameters():
            if one.requires_grad:
                torch.testing.assert_close(one.grad, theirs.get_parameter(name).grad, atol=1e-6, rtol=1e-5)
        y = ours(x)
        torch.testing.assert_close(y, theirs(x))
        merged = ours.merge_and_unload()
        assert type(merged[0]) is torch.nn.Linear
        torch.testing.assert_close(merged(x), y)

    def test_state_dicts_and_dtypes(self):
        torch = pytest.importorskip("torch")
        quantised, known, x = self.nets()
        torch.testing.assert_close(quantised(x), known(x))
        torch.manual_seed(1)
        other = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 16, bias=False))
        other = pa.quantize(other, "nf4", block=32)
        other.load_state_dict(quantised.state_dict())
        assert torch.equal(other(x), quantised(x))
        half = copy.deepcopy(quantised).to(torch.bfloat16)
        assert half[0].weight.dtype is torch.bfloat16
        assert half[0].weight_nested_absmax.dtype is torch.float32
        assert torch.equal(half[0].weight.dense(), quantised[0].weight.dense().to(torch.bfloat16))
        y = pa.get_peft_model(half, pa.LoraConfig(r=2, target_modules=["0"]))(x.bfloat16())
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), quantised(x), atol=0.05, rtol=0.05)

    def test_the_compiler_makes_one_graph(self):
        torch = pytest.importorskip("torch")
        quantised, _, x = self.nets()
        model = pa.get_peft_model(quantised, pa.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.sum().backward()


def test_what_a_short_dtype_keeps():
    """Beside a bfloat16 weight an adapter computes in float32, and the merged weight is bfloat16."""
    torch = pytest.importorskip("torch")
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    quantised = pa.quantize({"up.weight": weight})["up.weight"]
    adapter = pa.LoraConfig(r=2, use_dora=True).init(quantised)
    assert adapter.params["lora_A"].dtype is torch.float32
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    y, wanted = adapter.forward(x, quantised), adapter.forward(x, quantised.dense())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, wanted, atol=0.05, rtol=0.05)
    assert adapter.merge(quantised).dtype is torch.bfloat16
    assert namespace(quantised).float32 is torch.float32


def test_layers_have_codecs_of_their_own():
    weights = {f"layers.{layer}.{name}.weight": np.ones((64, 64), np.float32) for layer in (0, 1) for name in "qv"}
    found = pa.quantize(weights, "nf4", codecs={"v": "int8", "layers.1.v": "fp8"})
    kinds = {name: found[f"{name}.weight"].codec.kind for name in ("layers.0.q", "layers.0.v", "layers.1.v")}
    assert kinds == {"layers.0.q": "nf4", "layers.0.v": "int8", "layers.1.v": "fp8"}
    with pytest.raises(pa.MatchError, match="codecs names 'x', which is none of 4 linear layers"):
        pa.quantize(weights, "nf4", codecs={"x": "int8"})
