"""AdaLoRA's budget and penalty as parts of a training."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray import AdaLoraConfig, Layer, trees
from peftarray.arrays import namespace
from peftarray.errors import ConfigError
from peftarray.methods.adalora_budget import allocate
from peftarray.methods.adalora_budget import orthogonality_penalty as penalty_of_layers
from peftarray.training import AdaLoraBudget, AdamW, fit, orthogonality_penalty

CONFIG = AdaLoraConfig(init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=16)
SHAPES = {"first": (8, 7), "second": (9, 8)}
LAYERS = {name: Layer(name, "linear", shape) for name, shape in SHAPES.items()}
METHODS = {name: CONFIG.at(name) for name in SHAPES}


def weights():
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def start():
    return {name: dict(CONFIG.init(weight, seed=1, name=name).params) for name, weight in weights().items()}


def batch():
    draw = np.random.default_rng(1)
    return {
        "x": draw.standard_normal((20, 7)).astype(np.float32),
        "y": draw.standard_normal((20, 9)).astype(np.float32),
    }


def loss_over(base):
    def loss(params, given):
        x = given["x"]
        for name, layer in LAYERS.items():
            x = METHODS[name].apply(METHODS[name].prepare(params[name], layer), x, base[name], layer)
        return namespace(x).mean((x - given["y"]) ** 2) + orthogonality_penalty(params, weight=CONFIG.orth_reg_weight)

    return loss


def moved(convert, tree):
    return trees.refill(tree, [convert(leaf) for leaf in trees.leaves(tree)])


def trained(convert=np.asarray, **options):
    base, params, given = (moved(convert, tree) for tree in (weights(), start(), batch()))
    optimizer = AdaLoraBudget(CONFIG, AdamW(0.05))
    return fit(params, loss_over(base), [given], **{"optimizer": optimizer, "steps": 16, "progress": False, **options})


def test_the_budget_is_kept_on_every_library(asarray, to_numpy):
    history = trained(asarray)
    keep = history.state["keep"]
    assert sum(map(sum, keep.values())) == CONFIG.target_r * len(SHAPES)
    for name, mask in keep.items():
        assert (to_numpy(history.params[name]["lora_E"])[:, 0] != 0).tolist() == mask
    assert keep == trained().state["keep"]
    np.testing.assert_allclose(history.losses, trained().losses, atol=1e-4)


def test_it_is_the_allocation_after_each_step_of_the_optimiser():
    seen = []
    history = trained(callbacks=[lambda moment: seen.append(moment.params)])
    optimizer, params = AdamW(0.05), start()
    state, importance, keep = optimizer.init(params), None, None
    from peftarray.autodiff import value_and_grad

    for step in range(16):
        _, gradients = value_and_grad(loss_over(weights()))(params, batch())
        params, state = optimizer.step(params, gradients, state)
        params, importance, keep = allocate(CONFIG, step, params, gradients, importance, keep)
        for (name, leaf), other in zip(trees.named(params), trees.leaves(seen[step]), strict=True):
            np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=1e-7, err_msg=f"step {step}, {name}")
    assert history.state["keep"] == keep


def test_it_goes_on_from_a_checkpoint(tmp_path):
    for steps in (1, 3, 4, 9, 16):
        history = trained(steps=steps, checkpoint_dir=tmp_path / "run")
    expected = trained()
    assert history.losses == expected.losses
    assert history.state["keep"] == expected.state["keep"]


def test_the_penalty_is_that_of_the_method(asarray, to_numpy):
    params = start()
    expected = float(penalty_of_layers(CONFIG, params))
    found = orthogonality_penalty(moved(asarray, params), weight=CONFIG.orth_reg_weight)
    assert float(to_numpy(found)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: AdaLoraBudget(AdaLoraConfig(), AdamW()), "total_step is None"),
        (lambda: AdaLoraBudget(CONFIG, AdamW()).init({"w": np.ones(2)}), "no module with lora_A, lora_E and lora_B"),
        (lambda: orthogonality_penalty({"w": np.ones((2, 2))}), "no matrix of params matches the pattern"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
