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

CONFIG = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["embed", "head"])


def loss(model, batch, key):
    weights = model.training_weights(key)
    xp = namespace(batch["x"], *weights.values())
    hidden = xp.tanh(xp.matmul(batch["x"], xp.matrix_transpose(weights["embed.weight"])))
    scores = xp.matmul(hidden, xp.matrix_transpose(weights["head.weight"]))
    logs = scores - xp.log(xp.sum(xp.exp(scores), axis=-1, keepdims=True))
    return -xp.sum(logs * batch["y"]) / batch["y"].shape[0]


def trained(convert):
    weights = {f"{name}.weight": convert(weight) for name, weight in digits.base().items()}
    model = get_peft_model(weights, CONFIG, seed=1)
    batches = digits.moved(convert, digits.batches())
    options = {"optimizer": AdamW(1e-2, groups=lora_plus(4.0)), "schedule": cosine(warmup=3), "steps": 30, "seed": 2}
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


class TestTorchModule:
    """A module of torch's, whose parameters and generators are torch's own."""

    def module(self, dropout=0.0):
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        nn = torch.nn
        module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10))
        return get_peft_model(module, LoraConfig(r=4, target_modules=["0", "3"], lora_dropout=dropout))

    def batches(self):
        torch = pytest.importorskip("torch")
        return [{"x": torch.asarray(b["x"]), "y": torch.asarray(b["y"].argmax(1))} for b in digits.batches()]

    def loss(self, model, batch):
        torch = pytest.importorskip("torch")
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    def test_its_training_is_that_of_torch(self):
        torch = pytest.importorskip("torch")
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
        torch = pytest.importorskip("torch")

        def run(steps, folder):
            module = self.module(dropout=0.3)
            torch.manual_seed(7)
            return fit(module, self.loss, self.batches(), steps=steps, checkpoint_dir=folder, progress=False)

        run(4, tmp_path / "run")
        found, expected = run(9, tmp_path / "run"), run(9, None)
        assert found.losses == expected.losses
        for (name, leaf), other in zip(trees.named(found.params), trees.leaves(expected.params), strict=True):
            assert torch.equal(leaf, other), name

    def test_a_module_without_trained_parameters_is_refused(self):
        with pytest.raises(ConfigError, match="no parameter of PeftModule requires a gradient"):
            fit(self.module().freeze(), self.loss, self.batches())
