"""Optimisers against torch's and transformers' own, and what every optimiser keeps to on every library."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray import trees
from peftarray.errors import ConfigError, PeftError
from peftarray.training import SGD, Adafactor, AdamW, Group, Lion, lora_plus

torch = pytest.importorskip("torch")

SHAPES = {"scalar": (), "bias": (5,), "layer": {"lora_A": (3, 4), "lora_B": (4, 3)}, "kernel": (2, 3, 4)}
STEPS = 6


def adafactor(params, **options):
    return pytest.importorskip("transformers").Adafactor(params, **options)


def torch_adamw(params, **options):
    return torch.optim.AdamW(params, foreach=False, **options)


AGAINST = [
    (AdamW(1e-2), torch_adamw, {"lr": 1e-2}),
    (
        AdamW(1e-2, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.3),
        torch_adamw,
        {"lr": 1e-2, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.3},
    ),
    (SGD(0.1), torch.optim.SGD, {"lr": 0.1}),
    (SGD(0.1, momentum=0.9, weight_decay=0.2), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}),
    (SGD(0.1, momentum=0.9, nesterov=True), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adafactor(), adafactor, {}),
    (Adafactor(warmup_init=True), adafactor, {"warmup_init": True}),
    (
        Adafactor(0.1, beta1=0.9, weight_decay=0.1, clip_threshold=0.3, decay_rate=-0.5, scale_parameter=False),
        adafactor,
        {
            "lr": 0.1,
            "beta1": 0.9,
            "weight_decay": 0.1,
            "clip_threshold": 0.3,
            "decay_rate": -0.5,
            "scale_parameter": False,
            "relative_step": False,
        },
    ),
]
EVERY = [*(ours for ours, _, _ in AGAINST), Lion(1e-2, weight_decay=0.1)]


def named(optimizer):
    return repr(optimizer)


def draws(seed, dtype=np.float64):
    """A tree of normal values in the form of `SHAPES`."""
    draw = np.random.default_rng(seed)

    def fill(shapes):
        if isinstance(shapes, dict):
            return {name: fill(inner) for name, inner in shapes.items()}
        return np.asarray(draw.standard_normal(shapes), dtype)

    return fill(SHAPES)


def mapped(function, tree):
    return trees.refill(tree, [function(leaf) for leaf in trees.leaves(tree)])


def trained(optimizer, convert, dtype=np.float64, steps=STEPS):
    params = mapped(convert, draws(0, dtype))
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.step(params, mapped(convert, draws(1 + step, dtype)), state)
    return params, state


@pytest.mark.parametrize(("ours", "theirs", "options"), AGAINST, ids=map(str, range(len(AGAINST))))
def test_steps_are_those_of_torch(ours, theirs, options):
    params = [torch.tensor(leaf, requires_grad=True) for leaf in trees.leaves(draws(0))]
    optimizer = theirs(params, **options)
    for step in range(STEPS):
        for param, gradient in zip(params, trees.leaves(draws(1 + step)), strict=True):
            param.grad = torch.tensor(gradient)
        optimizer.step()
    found, _ = trained(ours, np.asarray)
    for (name, leaf), param in zip(trees.named(found), params, strict=True):
        np.testing.assert_allclose(leaf, param.detach().numpy(), rtol=1e-10, atol=1e-12, err_msg=name)


def test_lion_is_algorithm_2_of_its_paper():
    """Written out as printed there: c, then theta, then m."""
    optimizer = Lion(0.02, betas=(0.7, 0.8), weight_decay=0.3)
    theta, m = 1.5, 0.0
    params, state = {"w": np.asarray(theta)}, optimizer.init({"w": np.asarray(theta)})
    for g in (0.5, -3.0, 0.25, 0.0, 2.0):
        c = 0.7 * m + (1 - 0.7) * g
        theta = theta - 0.02 * (np.sign(c) + 0.3 * theta)
        m = 0.8 * m + (1 - 0.8) * g
        params, state = optimizer.step(params, {"w": np.asarray(g)}, state)
        assert float(params["w"]) == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize("optimizer", EVERY, ids=named)
def test_libraries_agree_and_keep_dtypes_and_inputs(optimizer, asarray, to_numpy):
    expected, _ = trained(optimizer, np.asarray, np.float32)
    params = mapped(asarray, draws(0, np.float32))
    gradients = mapped(asarray, draws(1, np.float32))
    state = optimizer.init(params)
    optimizer.step(params, gradients, state)
    for tree, seed in ((params, 0), (gradients, 1)):
        for (name, leaf), value in zip(trees.named(tree), trees.leaves(draws(seed, np.float32)), strict=True):
            np.testing.assert_array_equal(to_numpy(leaf), value, err_msg=f"{name} was written into")
    found, state = trained(optimizer, asarray, np.float32)
    for (name, leaf), value in zip(trees.named(found), trees.leaves(expected), strict=True):
        assert to_numpy(leaf).dtype == np.float32, name
        assert leaf.shape == value.shape, name
        np.testing.assert_allclose(to_numpy(leaf), value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, slot in trees.named(state["slots"]):
        assert to_numpy(slot).dtype == np.float32, name


@pytest.mark.parametrize("optimizer", EVERY, ids=named)
def test_a_compiled_step_is_the_step(optimizer):
    jax = pytest.importorskip("jax")
    traces = []

    def once(*arguments):
        traces.append(arguments)
        return optimizer.step(*arguments, factor=1.0)

    step = jax.jit(once)
    expected, _ = trained(optimizer, np.asarray, np.float32)
    params = mapped(jax.numpy.asarray, draws(0, np.float32))
    state = optimizer.init(params)
    for number in range(STEPS):
        gradients = mapped(jax.numpy.asarray, draws(1 + number, np.float32))
        params, state = step(params, gradients, state)
    assert len(traces) == 1, "it is traced again for another step"
    found = dict(trees.named(params))
    for name, value in trees.named(expected):
        assert found[name].dtype == np.float32, name
        np.testing.assert_allclose(np.asarray(found[name]), value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_half_precision_parameters_are_rounded_once():
    """Moments stay float32, and a step is the float32 step of the same numbers, rounded."""
    start = torch.tensor([1.0, -0.3, 0.01], dtype=torch.bfloat16)
    gradient = torch.tensor([0.1, 0.2, -0.3], dtype=torch.bfloat16)
    optimizer = AdamW(1e-2)
    params, state = optimizer.step({"w": start}, {"w": gradient}, optimizer.init({"w": start}))
    wide, _ = optimizer.step({"w": start.float()}, {"w": gradient.float()}, optimizer.init({"w": start.float()}))
    assert state["slots"]["w"]["first"].dtype == torch.float32
    assert torch.equal(params["w"], wide["w"].to(torch.bfloat16))


def test_a_step_of_parameters_that_require_gradients_is_not_recorded():
    params = {"w": torch.ones(3, requires_grad=True)}
    optimizer = AdamW()
    assert not optimizer.step(params, {"w": torch.ones(3)}, optimizer.init(params))[0]["w"].requires_grad


def test_groups_have_rates_and_decays_of_their_own():
    groups = (Group(r"layer\.lora_A", rate=0.0), *lora_plus(4.0), Group("bias|scalar", decay=0.0))
    plain, grouped = SGD(0.1, weight_decay=0.5), SGD(0.1, weight_decay=0.5, groups=groups)
    start, gradients = draws(0), draws(1)
    one, _ = plain.step(start, gradients, plain.init(start))
    other, _ = grouped.step(start, gradients, grouped.init(start))
    np.testing.assert_array_equal(other["layer"]["lora_A"], start["layer"]["lora_A"])
    moved, faster = (tree["layer"]["lora_B"] - start["layer"]["lora_B"] for tree in (one, other))
    np.testing.assert_allclose(faster, 4 * moved)
    np.testing.assert_allclose(other["bias"], start["bias"] - 0.1 * gradients["bias"])
    np.testing.assert_array_equal(other["kernel"], one["kernel"])


def test_a_factor_multiplies_the_rate():
    start, gradients = draws(0), draws(1)
    one, _ = AdamW(1e-2).step(start, gradients, AdamW().init(start), factor=0.25)
    other, _ = AdamW(0.25e-2).step(start, gradients, AdamW().init(start))
    for (name, leaf), value in zip(trees.named(one), trees.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, value, err_msg=name)


def test_no_gradient_no_change():
    params = {"a": np.ones(2), "b": np.ones(2), "places": np.arange(3)}
    optimizer = AdamW(0.1)
    state = optimizer.init(params)
    found, after = optimizer.step(params, {"a": np.ones(2), "b": None, "places": None}, state)
    assert found["b"] is params["b"]
    assert found["places"] is params["places"]
    assert "places" not in state["slots"]
    assert after["slots"]["b"] is state["slots"]["b"]


def stepped(param, gradient, slot):
    """A step whose trees have these names."""
    return AdamW().step({param: np.ones(1)}, {gradient: np.ones(1)}, AdamW().init({slot: np.ones(1)}))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: AdamW(-1.0), "AdamW.lr is -1.0; it must be a finite number of at least 0"),
        (lambda: AdamW("fast"), "AdamW.lr is 'fast'"),
        (lambda: AdamW(float("nan")), "AdamW.lr is nan"),
        (lambda: AdamW(betas=(0.9, 1.0)), "two numbers from 0 to below 1"),
        (lambda: AdamW(weight_decay=-0.1), "AdamW.weight_decay is -0.1"),
        (lambda: AdamW(groups=["lora_B"]), "it must be a list of Group"),
        (lambda: AdamW(groups=[Group("lora_X")]).init(draws(0)), "no array matches Group.pattern 'lora_X'; nearest: "),
        (lambda: Group("("), "is not a regular expression"),
        (lambda: SGD(nesterov=True), "momentum is 0"),
        (lambda: SGD(momentum=1.0), "SGD.momentum is 1.0"),
        (lambda: Adafactor(1e-3, warmup_init=True), "lr is 0.001"),
        (lambda: Adafactor(decay_rate=0.8), "below 0"),
        (lambda: Lion(betas=0.9), "Lion.betas is 0.9"),
        (lambda: stepped("a", "b", "a"), "params and gradients have different names: a, b"),
        (lambda: stepped("a", "a", "b"), "the state has nothing of a"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value)
    assert isinstance(caught.value, PeftError)
