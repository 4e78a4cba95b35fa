"""Several adapters on one layer: what goes through them equals what is merged of them, for every pair of methods."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from peftarray import (
    AdaLoraConfig,
    Adapter,
    BOFTConfig,
    ConfigError,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from peftarray.adapted_weight import adapted
from peftarray.composition import Composition, composed

from .libraries import on_libraries

METHODS = {
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "adalora": AdaLoraConfig(init_r=3),
    "vera": VeraConfig(r=4),
    "loha": LoHaConfig(r=2),
    "lokr": LoKrConfig(r=2),
    "ia3": IA3Config(),
    "fed-ia3": IA3Config(feedforward_modules=["proj"], target_modules=["proj"]),
    "oft": OFTConfig(oft_block_size=3),
    "boft": BOFTConfig(boft_block_size=2),
    "tokens": TrainableTokensConfig(token_indices=[3, 0]),
}
SHAPES: dict[str, tuple[int, ...]] = {"linear": (6, 12), "conv": (6, 6, 3), "embedding": (12, 6)}
PAIRS = [
    (kind, first, second)
    for kind in SHAPES
    for first, second in itertools.combinations_with_replacement(METHODS, 2)
    if kind in METHODS[first].kinds and kind in METHODS[second].kinds
    if (kind, "tokens") not in {("linear", first), ("linear", second)}
]
NEXT = dict(itertools.pairwise(METHODS))


def trained(name: str, weight: Any, kind: str, seed: int, asarray: Any, to_numpy: Any) -> Adapter:
    """An adapter that is away from its first state."""
    made = METHODS[name].init(weight, seed=seed, name="proj", kind=kind)
    draw = np.random.default_rng(seed)
    frozen = {key for key, row in made.config.params(made.layer).items() if row.frozen}
    moved = {
        key: array if key in frozen else asarray(to_numpy(array) + 0.3 * draw.standard_normal(array.shape))
        for key, array in made.params.items()
    }
    return Adapter(made.config, made.layer, moved)


@on_libraries(
    "kind,first,second", PAIRS, also=lambda kind, first, second: kind == "linear" and NEXT.get(first) == second
)
def test_forward_equals_merge_and_the_order_does_not_matter(kind, first, second, asarray, to_numpy):
    draw = np.random.default_rng(0)
    weight = asarray(draw.standard_normal(SHAPES[kind]))
    inputs = {"linear": draw.standard_normal((5, 12)), "conv": draw.standard_normal((2, 6, 7))}
    x = asarray(inputs.get(kind, np.asarray([3, 1, 0, 11])))
    pair = tuple(trained(name, weight, kind, seed, asarray, to_numpy) for seed, name in enumerate((first, second)))
    both = Composition(pair, (1.0, 0.5))
    merged = both.merge(weight)
    np.testing.assert_allclose(to_numpy(both.merge(weight)), to_numpy(merged), rtol=0)
    wanted = to_numpy(weight) + (to_numpy(pair[0].merge(weight)) - to_numpy(weight))
    wanted = wanted + 0.5 * (to_numpy(pair[1].merge(weight)) - to_numpy(weight))
    np.testing.assert_allclose(to_numpy(merged), wanted, atol=1e-10)

    plain = trained("lora", weight, kind, 0, asarray, to_numpy)  # of the same kind, to apply a plain weight by
    plain = Adapter(plain.config, plain.layer, {key: array * 0.0 for key, array in plain.params.items()})
    through = to_numpy(both.forward(x, weight))
    np.testing.assert_allclose(through, to_numpy(plain.forward(x, merged)), atol=1e-9)
    turned = Composition(pair[::-1], (0.5, 1.0))
    np.testing.assert_allclose(to_numpy(turned.forward(x, weight)), through, atol=1e-9)
    if both.adds_apart():
        apart = to_numpy(plain.forward(x, weight)) + to_numpy(both.added(x))
        np.testing.assert_allclose(apart, through, atol=1e-9)


def test_the_bias_is_composed_likewise(asarray, to_numpy):
    draw = np.random.default_rng(0)
    weight, bias = asarray(draw.standard_normal((6, 12))), asarray(draw.standard_normal(6))
    pair = []
    for seed, config in enumerate((LoraConfig(r=2, lora_bias=True), IA3Config())):
        made = config.init(weight, seed=seed, name="proj")
        layer = type(made.layer)("proj", "linear", (6, 12), bias=True)
        moved = {k: asarray(to_numpy(a) + 0.3 * draw.standard_normal(a.shape)) for k, a in made.params.items()}
        pair.append(Adapter(made.config, layer, moved))
    both = Composition(tuple(pair), (0.25, 1.0))
    b = to_numpy(bias)
    wanted = b + 0.25 * (to_numpy(pair[0].merge_bias(bias)) - b) + to_numpy(pair[1].merge_bias(bias)) - b
    np.testing.assert_allclose(to_numpy(both.merge_bias(bias, weight)), wanted, atol=1e-12)
    x = asarray(draw.standard_normal((3, 12)))
    found = to_numpy(both.forward(x, weight, bias=bias)) - to_numpy(both.forward(x, weight))
    np.testing.assert_allclose(found, np.broadcast_to(wanted, (3, 6)), atol=1e-9)
    assert both.touches() == ("weight", "bias")


def test_one_adapter_of_scale_one_is_itself(asarray):
    weight = asarray(np.ones((6, 12)))
    adapter = LoraConfig(r=2).init(weight)
    assert composed([adapter], [1.0]) is adapter
    assert isinstance(composed([adapter], [0.5]), Composition)
    with pytest.raises(ConfigError, match="a scale for each"):
        Composition((adapter,), ())


def test_it_stands_in_for_a_weight(asarray, to_numpy, xp):
    """And is taken apart and put together again, as JAX's transformations do."""
    draw = np.random.default_rng(1)
    weight, x = asarray(draw.standard_normal((6, 12))), asarray(draw.standard_normal((3, 12)))
    pair = tuple(trained(name, weight, "linear", seed, asarray, to_numpy) for seed, name in enumerate(("lora", "oft")))
    both = Composition(pair, (1.0, 2.0))
    stand_in = adapted(both, weight)
    found = to_numpy(x @ stand_in.T)
    assert stand_in.materialised == 0
    np.testing.assert_allclose(found, to_numpy(x @ both.merge(weight).mT), atol=1e-9)
    arrays, rest = stand_in.flatten()
    again = stand_in.unflatten(rest, arrays)
    hash(both.take_apart()[1])
    np.testing.assert_array_equal(to_numpy(x @ again.T), found)
    if "jax" in xp.__name__:
        import jax

        np.testing.assert_allclose(jax.jit(lambda w: x @ w.T)(stand_in), found, atol=1e-9)


def test_each_adapter_may_drop_by_its_own_draw():
    weight, x = np.ones((6, 12), np.float32), np.ones((3, 12), np.float32)
    config = LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False)
    both = Composition((config.init(weight, seed=0), config.init(weight, seed=1)), (1.0, 1.0))
    shares: list[int] = []

    def by(number: int) -> Any:
        def drop(array: Any, share: float) -> Any:
            shares.append(number)
            return array * 0

        return drop

    np.testing.assert_array_equal(both.forward(x, weight, drop=[by(1), by(2)]), x @ weight.T)
    assert shares == [1, 2]
    assert both.drops()


def test_a_short_weight_is_rounded_once():
    torch = pytest.importorskip("torch")
    weight = torch.linspace(-1, 1, 72).reshape(6, 12).to(torch.bfloat16)
    pair = tuple(LoraConfig(r=2, init_lora_weights=False).init(weight, seed=seed) for seed in (0, 1))
    both = Composition(pair, (1.0, 0.5))
    wanted = weight.float() + pair[0].change(weight) + 0.5 * pair[1].change(weight)
    assert torch.equal(both.merge(weight), wanted.to(torch.bfloat16))
    assert both.forward(torch.ones(2, 12, dtype=torch.bfloat16), weight).dtype == torch.bfloat16
