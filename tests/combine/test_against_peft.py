"""Combinations against PEFT's `add_weighted_adapter`, and against the float64 definition where PEFT is wrong.

PEFT 0.21 is wrong, or does not do it, where

1. adapters have `use_rslora`: the result inherits it, and is too large by the root of its rank;
2. adapters have `use_dora`: the magnitudes are ignored, and those of the result are the base's;
3. adapters have `lora_bias`: the biases are lost;
4. a weight is negative in an election of signs: the adapter votes with the sign of what is subtracted;
5. a weight is 0 in an election: the adapter votes, and is counted in the mean;
6. a layer is a Conv1d or Conv3d and the type ends in `svd`: it crashes;
7. ranks differ, of adapters or of modules, and the type works on factors: it refuses or crashes;
8. the density is 0: DARE makes NaN; and where there is one adapter only, any type is `linear` and drops nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import definitions
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peftarray as pa
from peftarray.combining.drops import streams
from peftarray.random import uniform

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_net import NAMES, live_model, quiet  # noqa: E402

EXAMPLES = settings(max_examples=12)
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MATRICES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


def ours(model: Any, name: str, count: int) -> list[Any]:
    """The adapters of a module, as this package has them."""
    module = model.base_model.model.get_submodule(name)
    found = []
    for adapter in (f"a{place}" for place in range(count)):
        given = model.peft_config[adapter]
        shared = {field.name for field in dataclasses.fields(pa.LoraConfig)} & {"r", "lora_alpha", "use_rslora"}
        settings_ = {field: getattr(given, field) for field in shared}
        bias = bool(given.lora_bias)
        config = pa.LoraConfig(**settings_, use_dora=given.use_dora, lora_bias=bias).at(name)
        table = name == "table"
        suffix = "embedding_" if table else ""
        params = {}
        for side in "AB":
            value = getattr(module, f"lora_{suffix}{side}")[adapter]
            params[f"lora_{side}"] = (value if table else value.weight).detach().numpy()
        if bias:
            params["lora_B.bias"] = module.lora_B[adapter].bias.detach().numpy()
        if given.use_dora:
            params["lora_magnitude_vector"] = module.lora_magnitude_vector[adapter].weight.detach().numpy()
        kind = "embedding" if table else "conv" if params["lora_A"].ndim > 2 else "linear"
        down, up = params["lora_A"].shape, params["lora_B"].shape
        layer = pa.Layer(name, kind, (up[0], *down[1:]), transposed=name in ("conv1d", "table"))
        found.append(pa.Adapter(config, layer, params))
    return found


def theirs(model: Any, name: str, adapter: str = "m") -> np.ndarray:
    return model.base_model.model.get_submodule(name).get_delta_weight(adapter).detach().numpy()


def combined_update(adapters: list[Any], weights: list[float], **options: Any) -> np.ndarray:
    """As the layer's weight is stored."""
    fit = pa.combine(adapters, weights, **options)
    return fit.adapter.layer.unview(fit.adapter.update())


def sources_of(adapters: list[Any]) -> list[definitions.Factors]:
    return [
        (
            a.params["lora_B"].reshape(len(a.params["lora_B"]), -1),
            a.params["lora_A"].reshape(len(a.params["lora_A"]), -1),
            a.config.scale,
        )
        for a in adapters
    ]


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


alphas = st.sampled_from([1, 3, 4.5, 16])
positive = st.floats(0.1, 2.0)
signed = positive | st.floats(-2.0, -0.1)


@EXAMPLES
@given(
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    alpha=alphas,
    weights=st.lists(signed, min_size=3, max_size=3),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_exact_sums_and_their_cuts(ranks, alpha, weights, rank, seed):
    configs = [
        peft.LoraConfig(r=r, lora_alpha=alpha * (1 + i), target_modules=list(NAMES)) for i, r in enumerate(ranks)
    ]
    weights = weights[: len(ranks)]
    model = live_model(configs, seed=seed)
    names = [f"a{i}" for i in range(len(ranks))]
    with quiet():
        model.base_model.add_weighted_adapter(names, weights, "m", combination_type="cat")
        model.base_model.add_weighted_adapter(names, weights, "s", combination_type="svd", svd_rank=rank)
    for name in NAMES:
        adapters = ours(model, name, len(ranks))
        whole = combined_update(adapters, weights)
        close(whole, theirs(model, name))
        wanted = definitions.exact_sum(sources_of(adapters), weights)
        close(whole, adapters[0].layer.unview(wanted), 1e-6)
        close(combined_update(adapters, weights, combination="task_arithmetic"), whole, 0)
        gaps = np.linalg.svd(wanted, compute_uv=False)
        if len(gaps) > rank and gaps[rank - 1] > 1.05 * gaps[rank]:  # or the cut is not unique
            close(combined_update(adapters, weights, combination="svd", rank=rank), theirs(model, name, "s"), 1e-4)


class OurDraws:
    """In place of `torch.bernoulli`: the masks that this package draws, in the order in which PEFT asks for them."""

    def __init__(self, density: float, draws: list[tuple[str, bool]]) -> None:
        self.density, self.draws = density, list(draws)

    def __call__(self, chances: Any) -> Any:
        stream, flipped = self.draws.pop(0)
        shape = (chances.shape[0], chances[0].numel())
        drawn = uniform(0, stream, shape[::-1] if flipped else shape) < np.float32(self.density)
        return torch.from_numpy((drawn.T if flipped else drawn).astype(np.float32)).reshape(chances.shape)


@pytest.mark.parametrize("combination", [*FACTORS, *MATRICES[1:]])
@EXAMPLES
@given(
    rank=st.integers(1, 5),
    alpha=alphas,
    weights=st.lists(positive, min_size=2, max_size=3),
    density=st.sampled_from([0.2, 0.5, 0.8]),
    sign=st.sampled_from(["total", "frequency"]),
    seed=st.integers(0, 99),
)
def test_what_is_left_out_and_elected(combination, rank, alpha, weights, density, sign, seed):
    count = len(weights)
    configs = [peft.LoraConfig(r=rank, lora_alpha=alpha * (1 + i), target_modules=list(NAMES)) for i in range(count)]
    model = live_model(configs, seed=seed)
    options = {} if combination == "linear" else {"density": density}
    draws: list[tuple[str, bool]] = []
    for name in NAMES:
        own = streams(ours(model, name, count), weights)
        if combination in MATRICES:  # PEFT draws for the matrix as it is stored
            draws += [(one, name in ("conv1d", "table")) for one in own]
        else:
            draws += [(f"{one}/{side}", False) for side in ("down", "up") for one in own]
    masks = OurDraws(density, draws)
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setattr(torch, "bernoulli", masks)
        model.base_model.add_weighted_adapter(
            [f"a{i}" for i in range(count)],
            weights,
            "m",
            combination_type=combination,
            majority_sign_method=sign,
            **options,
        )
    assert bool(masks.draws) == ("dare" not in combination)
    for name in NAMES:
        adapters = ours(model, name, count)
        found = combined_update(adapters, weights, combination=combination, majority_sign=sign, **options)
        close(found, theirs(model, name), 1e-4)


# Where PEFT is wrong.


def add(model, weights, combination, **options):
    """PEFT's combination "m" of all adapters of a model."""
    with quiet():
        names = [f"a{place}" for place in range(len(weights))]
        model.base_model.add_weighted_adapter(names, weights, "m", combination_type=combination, **options)


def differ(found: np.ndarray, wanted: np.ndarray) -> None:
    """PEFT is still wrong: where this fails, the list above has one entry too many."""
    assert np.linalg.norm(found - wanted) > 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_rslora(combination):
    model = live_model([peft.LoraConfig(r=4, use_rslora=True, target_modules=["linear"])] * 2)
    add(model, [1.0, 0.5], combination)
    adapters = ours(model, "linear", 2)
    sources = sources_of(adapters)
    exact = definitions.exact_sum(sources, [1.0, 0.5])
    wanted = {"cat": exact, "svd": definitions.truncated(exact, 4)}.get(combination)
    if wanted is None:
        wanted = definitions.of_factors(sources, [1.0, 0.5])
    close(combined_update(adapters, [1.0, 0.5], combination=combination), wanted)
    close(theirs(model, "linear"), wanted * {"cat": 8, "svd": 4, "linear": 4}[combination] ** 0.5)


def test_dora():
    model = live_model([peft.LoraConfig(r=2, use_dora=True, target_modules=["linear"])] * 2)
    add(model, [0.5, 0.5], "cat")
    weight = model.base_model.model.linear.base_layer.weight.detach().numpy()
    adapters = ours(model, "linear", 2)
    wanted = np.zeros_like(weight, np.float64)
    for (up, down, scale), adapter in zip(sources_of(adapters), adapters, strict=True):
        direction = weight + scale * up.astype(np.float64) @ down
        length = np.linalg.norm(direction, axis=1, keepdims=True)
        wanted += 0.5 * (adapter.params["lora_magnitude_vector"][:, None] * direction / length - weight)
    close(combined_update(adapters, [0.5, 0.5], energy=1.0, base=weight), wanted)
    with torch.no_grad():
        model.base_model.set_adapter("m")
        merged = model.merge_and_unload().linear.weight.numpy()
    differ(merged - weight, wanted)
    with pytest.raises(pa.UnsupportedError, match=r"DoRA adds depends on the weight .* give the base"):
        pa.combine(adapters)


def test_trained_biases_of_lora():
    model = live_model([peft.LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["linear"])] * 2)
    add(model, [1.0, -0.5], "cat")
    adapters = ours(model, "linear", 2)
    merged = pa.combine(adapters, [1.0, -0.5]).adapter.merge_bias(np.zeros(9, np.float32))
    one, two = (adapter.params["lora_B.bias"] for adapter in adapters)
    close(merged, 3 * one - 1.5 * two)
    assert np.linalg.norm(merged) > 0.1
    layer = model.base_model.model.linear
    differ(layer.lora_B["m"].bias.detach().numpy() * layer.scaling["m"], merged)


@pytest.mark.parametrize("combination", ["ties", "ties_svd"])
@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, 0.0]])
def test_votes_of_what_is_subtracted_or_left_out(combination, weights):
    model = live_model([peft.LoraConfig(r=4, target_modules=["linear"])] * 2)
    add(model, weights, combination, density=0.5)
    adapters = ours(model, "linear", 2)
    sources = sources_of(adapters)
    used = [(source, weight) for source, weight in zip(sources, weights, strict=True) if weight]
    sources, weights_ = [source for source, _ in used], [weight for _, weight in used]
    if combination == "ties":
        wanted = definitions.of_factors(
            sources, weights_, definitions.mean_of_winners, lambda x: definitions.keep_largest(x, 0.5)
        )
    else:
        pruned = [definitions.keep_largest(update, 0.5) for update in definitions.updates(sources)]
        wanted = definitions.truncated(definitions.mean_of_winners(pruned, weights_), 4)
    close(combined_update(adapters, weights, combination=combination, density=0.5), wanted)
    differ(theirs(model, "linear"), wanted)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 2)])
def test_convolutions_of_other_dimensions(shape):
    class Convolution(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = {1: torch.nn.Conv1d, 3: torch.nn.Conv3d}[len(shape)](4, 6, shape)

    model = live_model([peft.LoraConfig(r=2, target_modules=["conv"])] * 2, Convolution())
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch says
        add(model, [1.0, 0.5], "svd")
    adapters = ours(model, "conv", 2)
    wanted = definitions.truncated(definitions.exact_sum(sources_of(adapters), [1.0, 0.5]), 2)
    close(combined_update(adapters, [1.0, 0.5], combination="svd"), wanted.reshape(6, 4, *shape))


def test_factors_of_different_ranks():
    model = live_model([peft.LoraConfig(r=rank, target_modules=["linear"]) for rank in (2, 4)])
    with pytest.raises(ValueError, match="same r value"):
        add(model, [1.0, 0.5], "linear")
    adapters = ours(model, "linear", 2)
    (up, down, scale), other = sources_of(adapters)
    padded = np.pad(up, ((0, 0), (0, 2))), np.pad(down, ((0, 2), (0, 0))), scale
    wanted = definitions.of_factors([padded, other], [1.0, 0.5])
    close(combined_update(adapters, [1.0, 0.5], combination="linear"), wanted)


def test_a_density_of_zero_and_a_single_adapter():
    model = live_model([peft.LoraConfig(r=4, target_modules=["linear"])] * 2)
    add(model, [1.0, 1.0], "dare_linear", density=0.0)
    assert np.isnan(theirs(model, "linear")).all()
    adapters = ours(model, "linear", 2)
    with pytest.raises(pa.ConfigError, match=r"needs density.*above 0"):
        pa.combine(adapters, combination="dare_linear", density=0.0)
    alone = live_model([peft.LoraConfig(r=4, target_modules=["linear"])])
    add(alone, [1.0], "magnitude_prune", density=0.25)
    (adapter,) = ours(alone, "linear", 1)
    wanted = definitions.of_factors(sources_of([adapter]), [1.0], drop=lambda x: definitions.keep_largest(x, 0.25))
    close(combined_update([adapter], [1.0], combination="magnitude_prune", density=0.25), wanted)
    differ(theirs(alone, "linear"), wanted)
