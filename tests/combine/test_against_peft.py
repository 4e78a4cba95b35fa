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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from transformers.pytorch_utils import Conv1D  # noqa: E402

EXAMPLES = settings(max_examples=12)
NAMES = ("linear", "conv1d", "conv", "point", "table")
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MATRICES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


class Net(torch.nn.Module):
    """One layer of each kind; none is square."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(7, 9)
        self.conv1d = Conv1D(8, 6)
        self.conv = torch.nn.Conv2d(4, 6, (3, 2))
        self.point = torch.nn.Conv2d(5, 6, 1)
        self.table = torch.nn.Embedding(11, 8)


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def live_model(configs: list[Any], net: Any = None, seed: int = 0) -> Any:
    """A PEFT model with an adapter for each configuration, called "0", "1" ..., with random values."""
    torch.manual_seed(seed)
    with quiet():
        model = peft.get_peft_model(net or Net(), configs[0], adapter_name="a0")
        for place, config in enumerate(configs[1:], start=1):
            model.add_adapter(f"a{place}", config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw) + (1.0 if "magn" in name else 0))
    return model


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
    configs = [peft.LoraConfig(r=r, lora_alpha=alpha * (1 + i), target_modules=list(NAMES)) for i, r in enumerate(ranks)]
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
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setattr(torch, "bernoulli", OurDraws(density, draws))
        model.base_model.add_weighted_adapter(
            [f"a{i}" for i in range(count)],
            weights,
            "m",
            combination_type=combination,
            majority_sign_method=sign,
            **options,
        )
    for name in NAMES:
        adapters = ours(model, name, count)
        found = combined_update(adapters, weights, combination=combination, majority_sign=sign, **options)
        close(found, theirs(model, name), 1e-4)
