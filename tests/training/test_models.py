"""`fit` trains a `PeftModel` and a torch module as it trains a tree."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from peftarray import LoraConfig, trees
from peftarray.arrays import namespace
from peftarray.errors import ConfigError
from peftarray.model import get_peft_model
from peftarray.training import AdamW, cosine, fit, lora_plus

sys.path.insert(0, str(Path(__file__).parent))
import digits

torch = pytest.importorskip("torch")

CONFIG = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["embed", "head"])


def loss(model, batch, key):
    weights = model.training_weights(key)
    xp = namespace(batch["x"], *weights.values())
    hidden = xp.tanh(xp.matmul(batch["x"], xp.matrix_transpose(weights["embed.weight"])))
    scores = xp.matmul(hidden, xp.matrix_transpose(weights["head.weight"]))
    logs = scores - xp.log(xp.sum(xp.exp(scores), axis=-1, keepdims=True))
    return -xp.sum(logs * batch["y"]) / batch["y"].shape[0]


def trained(convert, **more):
    weights = {f"{name}.weight": convert(weight) for name, weight in digits.base().items()}
    model = get_peft_model(weights, CONFIG, seed=1)
    batches = digits.moved(convert, digits.batches())
    options = {"optimizer": AdamW(1e-2, groups=lora_plus(4.0)), "schedule": cosine(warmup=3), "steps": 30, "seed": 2}
    options |= more
    return model, fit(model, loss, batches, progress=False, **options)


@pytest.fixture(scope="module")
def on_numpy():
    return trained(np.asarray)


def test_a_model_is_trained_the_same_on_every_library(on_numpy, asarray, to_numpy):
    model, history = trained(asarray)
    assert history.losses[-1] < 0.7 * history.losses[0]
    np.testing.assert_allclose(history.losses, on_numpy[1].losses, atol=1e-4)
    expected = on_numpy[0].params
    assert model.params.keys() == expected.keys()
    for name, array in model.params.items():
        np.testing.assert_allclose(to_numpy(array), expected[name], atol=1e-3, err_msg=name)


def test_a_base_follows_the_precision(on_numpy, xp, asarray, to_numpy):
    if not hasattr(xp, "bfloat16"):
        pytest.skip("it has no bfloat16 to compute in")
    model, history = trained(asarray, precision="bf16")
    np.testing.assert_allclose(history.losses, on_numpy[1].losses, atol=0.1)
    assert {to_numpy(array).dtype for array in model.params.values()} == {np.dtype(np.float32)}
    assert to_numpy(model.base["head.weight"]).dtype == np.float32


class TestTorchModule:
    """A module of torch's, whose parameters and generators are torch's own."""

    def module(self, dropout=0.0):
        torch.manual_seed(0)
        nn = torch.nn
        module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10))
        return get_peft_model(module, LoraConfig(r=4, target_modules=["0", "3"], lora_dropout=dropout))

    def batches(self):
        return [{"x": torch.asarray(b["x"]), "y": torch.asarray(b["y"].argmax(1))} for b in digits.batches()]

    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    def test_its_training_is_that_of_torch(self):
        module, other = self.module(), self.module()
        history = fit(module, self.loss, self.batches(), optimizer=AdamW(1e-2), steps=8, clip_norm=0.5, progress=False)
        params = [p for p in other.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        for step in range(8):
            optimizer.zero_grad()
            value = self.loss(other, self.batches()[step])
            assert history.losses[step] == pytest.approx(float(value.detach()), rel=1e-5)
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
        for (name, mine), theirs in zip(module.named_parameters(), other.parameters(), strict=True):
            np.testing.assert_allclose(mine.detach(), theirs.detach(), rtol=1e-4, atol=1e-5, err_msg=name)

    def test_a_name_is_the_modules(self):
        history = fit(
            self.module(), self.loss, self.batches(), optimizer=AdamW(groups=lora_plus(2.0)), steps=1, progress=False
        )
        assert "base_model.model.0.lora_A.default.weight" in history.params

    def test_its_dropout_goes_on_from_a_checkpoint(self, tmp_path):
        def run(steps, folder):
            module = self.module(dropout=0.3)
            torch.manual_seed(7)
            return fit(module, self.loss, self.batches(), steps=steps, checkpoint_dir=folder, progress=False)

        run(4, tmp_path / "run")
        found, expected = run(9, tmp_path / "run"), run(9, None)
        assert found.losses == expected.losses
        for (name, leaf), other in zip(trees.named(found.params), trees.leaves(expected.params), strict=True):
            assert torch.equal(leaf, other), name

    def test_its_precision_is_that_of_autocast(self):
        seen = set()

        def loss(model, batch):
            scores = model(batch["x"])
            seen.add(scores.dtype)
            return torch.nn.functional.cross_entropy(scores.float(), batch["y"])

        short = fit(self.module(), loss, self.batches(), steps=8, precision="bf16", progress=False)
        wide = fit(self.module(), self.loss, self.batches(), steps=8, progress=False)
        assert seen == {torch.bfloat16}
        assert {array.dtype for array in short.params.values()} == {torch.float32}
        np.testing.assert_allclose(short.losses, wide.losses, atol=0.03)

    def test_it_drops_nothing_in_an_evaluation(self):
        module, batch = self.module(dropout=0.5), self.batches()[0]
        module.base_model.model[1].eval()
        options = {"optimizer": AdamW(0.0), "steps": 3, "eval_every": 1, "progress": False}
        history = fit(module, self.loss, [batch], eval_batches=[batch], **options)
        assert len(set(history.losses)) == 3
        assert len({loss for _, loss in history.evaluations}) == 1
        assert module.training
        assert not module.base_model.model[1].training
        module.eval()
        with torch.no_grad():
            assert history.evaluations[0][1] == pytest.approx(float(self.loss(module, batch)), rel=1e-6)

    def test_it_compiles_without_breaks(self, monkeypatch):
        torch._dynamo.reset()
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
        found = fit(self.module(), self.loss, self.batches()[:3], steps=3, compile=True, progress=False)
        expected = fit(self.module(), self.loss, self.batches()[:3], steps=3, progress=False)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)

    def test_a_module_without_trained_parameters_is_refused(self):
        with pytest.raises(ConfigError, match="no parameter of PeftModule requires a gradient"):
            fit(self.module().freeze(), self.loss, self.batches())
