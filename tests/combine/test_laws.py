"""What holds of every combination, on every library: its sign, its order, what it loses, that it can be repeated."""

from __future__ import annotations

from dataclasses import replace

import definitions
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peftarray as pa
from peftarray.combining import COMBINATIONS
from peftarray.combining.drops import dare, della
from peftarray.combining.pruning import largest
from peftarray.combining.spectrum import product_spectrum

EXAMPLES = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYERS = {
    "linear": pa.Layer("block.proj", "linear", (12, 9)),
    "transposed": pa.Layer("block.proj", "linear", (12, 9), transposed=True),
    "embedding": pa.Layer("block.proj", "embedding", (8, 14), transposed=True),
    "conv": pa.Layer("block.proj", "conv", (10, 3, 2, 2)),
}
PLAIN = [name for name, way in COMBINATIONS.items() if way.space != "arc"]
RANDOM = [name for name, way in COMBINATIONS.items() if way.drop in ("random", "della")]


def lora(layer, rank, seed, *, asarray=np.asarray, alpha=3.0, **settings_):
    """A LoRA adapter with normal factors."""
    rng = np.random.default_rng(seed)
    method = pa.LoraConfig(r=rank, lora_alpha=alpha, **settings_).at(layer.name)
    table = method.params(layer)
    values = {name: rng.standard_normal(row.shape).astype(np.float64) for name, row in table.items()}
    return pa.Adapter(method, layer, {name: asarray(array) for name, array in values.items()})


def negated(adapter):
    """By `lora_A`, which is where a weight's sign goes: what works on the factors sees the difference."""
    return replace(adapter, params={**adapter.params, "lora_A": -adapter.params["lora_A"]})


def factors(adapter):
    up, down = (np.asarray(adapter.params[name]) for name in ("lora_B", "lora_A"))
    return up.reshape(len(up), -1), down.reshape(len(down), -1), adapter.config.scale


def options(combination):
    return {"density": 0.6} if COMBINATIONS[combination].drop else {}


def result(adapters, weights=None, **settings_):
    return pa.combine(adapters, weights, **settings_).adapter.update()


def close(found, wanted, tolerance=1e-10):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


# Exact sums, and what a cut loses.


@pytest.mark.parametrize("kind", LAYERS)
@EXAMPLES
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 0.01), min_size=4, max_size=4),
    rank=st.integers(1, 8),
)
def test_cat_is_exact_and_svd_loses_what_no_rank_could_hold(kind, ranks, weights, rank):
    adapters = [lora(LAYERS[kind], r, seed, alpha=1.0 + seed) for seed, r in enumerate(ranks)]
    weights = weights[: len(ranks)]
    wanted = definitions.exact_sum([factors(adapter) for adapter in adapters], weights)
    whole = pa.combine(adapters, weights)
    close(whole.adapter.update(), wanted)
    assert (whole.rank, whole.error, whole.energy) == (sum(ranks), 0.0, 1.0)
    assert whole.norm == pytest.approx(np.linalg.norm(wanted))
    assert whole.adapter.config.scale == 1
    full = pa.combine(adapters, weights, combination="svd", rank=min(wanted.shape))
    close(full.adapter.update(), wanted)
    assert full.error < 1e-10
    cut = pa.combine(adapters, weights, combination="svd", rank=rank)
    assert cut.rank == min(rank, sum(ranks), *wanted.shape)
    assert cut.error == pytest.approx(definitions.lost(wanted, rank), abs=1e-9)
    assert np.linalg.norm(cut.adapter.update() - wanted) == pytest.approx(cut.error * cut.norm, abs=1e-9)
    assert cut.energy == pytest.approx(1 - cut.error**2)


@EXAMPLES
@given(energy=st.floats(0.05, 1.0), count=st.integers(1, 3))
def test_the_energy_asked_for_is_kept_by_no_rank_too_many(energy, count):
    adapters = [lora(LAYERS["linear"], 3, seed) for seed in range(count)]
    wanted = definitions.exact_sum([factors(adapter) for adapter in adapters], [1.0] * count)
    fit = pa.combine(adapters, energy=energy)
    kept = 1 - definitions.lost(wanted, fit.rank) ** 2
    assert kept >= energy - 1e-9
    assert fit.energy == pytest.approx(kept)
    assert fit.rank == 1 or 1 - definitions.lost(wanted, fit.rank - 1) ** 2 < energy + 1e-9


def test_rank_bounds_energy_and_what_cancels_has_rank_one():
    adapters = [lora(LAYERS["linear"], 3, seed) for seed in range(2)]
    assert pa.combine(adapters, energy=1.0).rank == 6
    assert pa.combine(adapters, energy=1.0, rank=2).rank == 2
    gone = pa.combine([adapters[0], adapters[0]], [1.0, -1.0], energy=1.0)
    assert gone.rank == 1
    assert gone.norm < 1e-12
    zero = pa.LoraConfig(r=3).init(np.zeros((4, 5)))
    fit = pa.combine([zero], combination="svd")
    assert (fit.rank, fit.norm, fit.error) == (1, 0.0, 0.0)


# Signs, order, absence, repetition.


@pytest.mark.parametrize("combination", PLAIN)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_negative_weights_negate(combination, kind):
    one, two, three = (lora(LAYERS[kind], 3, seed) for seed in range(3))
    settings_ = options(combination) | {"combination": combination}
    alone = result([one], [1.0], **settings_)
    assert np.abs(alone).max() > 0
    np.testing.assert_array_equal(result([one], [-1.0], **settings_), -alone)
    # A negative weight is the negated adapter; its draws are its own, so here is none.
    if combination not in RANDOM:
        subtracted = result([one, two, three], [1.0, -0.7, 0.5], **settings_)
        close(result([one, negated(two), three], [1.0, 0.7, 0.5], **settings_), subtracted)
    close(result([one, two], [-1.0, 0.7], **settings_), -result([one, two], [1.0, -0.7], **settings_))


@pytest.mark.parametrize("combination", PLAIN)
def test_order_does_not_matter_and_weight_zero_is_absence(combination):
    adapters = [lora(LAYERS["linear"], 3, seed) for seed in range(3)]
    weights = [1.0, -0.7, 0.5]
    settings_ = options(combination) | {"combination": combination}
    found = result(adapters, weights, **settings_)
    for order in ([2, 0, 1], [1, 0, 2], [2, 1, 0]):
        close(result([adapters[i] for i in order], [weights[i] for i in order], **settings_), found)
    absent = lora(LAYERS["linear"], 5, 9)
    close(result([absent, *adapters], [0.0, *weights], **settings_), found)


@pytest.mark.parametrize("combination", RANDOM)
def test_what_is_drawn_depends_on_the_seed_and_the_numbers_alone(combination):
    adapters = [lora(LAYERS["linear"], 3, seed) for seed in range(2)]
    settings_ = options(combination) | {"combination": combination}
    found = result(adapters, seed=5, **settings_)
    np.testing.assert_array_equal(result(adapters, seed=5, **settings_), found)
    assert np.abs(result(adapters, seed=6, **settings_) - found).max() > 1e-3
    # Copies are told apart: dropping the same entries of both would leave more out.
    twice = result([adapters[0], adapters[0]], [0.5, 0.5], seed=5, **settings_)
    assert np.abs(twice - result(adapters[:1], seed=5, **settings_)).max() > 1e-3


def test_draws_keep_the_mean_and_the_density():
    x = np.random.default_rng(0).standard_normal((200, 300))
    dropped = dare(x, 0.3, seed=1, stream="x")
    assert (dropped != 0).mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(dropped[dropped != 0], x[dropped != 0] / 0.3)
    found = della(x, 0.3, 0.2, seed=1, stream="x")
    kept = found != 0
    ranks = np.argsort(np.argsort(-np.abs(x), axis=1), axis=1)
    for low in (0, 100, 200):  # rates grow from 0.6 to 0.8 as magnitudes fall
        some = (ranks >= low) & (ranks < low + 100)
        middle = 0.6 + 0.2 * (low + 50) / 300
        assert kept[some].mean() == pytest.approx(1 - middle, abs=0.01)
    rates = 0.7 - 0.1 + 0.2 * ranks / 300
    np.testing.assert_allclose(found[kept], (x / (1 - rates))[kept], rtol=1e-6)


@EXAMPLES
@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=12),
    count=st.integers(-1, 13),
)
def test_the_largest_entries_are_as_many_as_asked(values, count):
    x = np.array(values)
    mask = largest(x, count)
    assert mask.sum() == min(max(count, 0), x.size)
    if mask.any() and not mask.all():
        assert np.abs(x[mask]).min() >= np.abs(x[~mask]).max()


def test_singular_vectors_have_one_sign():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    one, two = product_spectrum(up, down), product_spectrum(-up, -down)
    np.testing.assert_allclose(one.left, two.left, atol=1e-12)
    np.testing.assert_allclose(one.right, two.right, atol=1e-12)
    assert (one.left[np.abs(one.left).argmax(0), np.arange(3)] > 0).all()
    np.testing.assert_allclose(one.left.T @ one.left, np.eye(3), atol=1e-12)


# What PEFT has not, against its definition.


@EXAMPLES
@given(t=st.floats(0.0, 1.0), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_slerp(t, ranks):
    adapters = [lora(LAYERS["linear"], rank, seed) for seed, rank in enumerate(ranks)]
    sources = [factors(adapter) for adapter in adapters]
    close(result(adapters, [1 - t, t], combination="slerp"), definitions.slerp(sources, t), 1e-9)
    close(result(adapters[::-1], [t, 1 - t], combination="slerp"), definitions.slerp(sources, t), 1e-9)


def test_slerp_of_parallel_updates_is_on_the_line():
    one = lora(LAYERS["linear"], 2, 0)
    close(result([one, one], [0.25, 0.75], combination="slerp"), one.update())
    close(result([one, negated(one)], [0.25, 0.75], combination="slerp"), -0.5 * one.update())


@pytest.mark.parametrize("ranks", [(2, 3, 1), (5, 6, 4)], ids=["thin", "as many as outputs"])
def test_knots(ranks):
    adapters = [lora(LAYERS["linear"], rank, seed) for seed, rank in enumerate(ranks)]
    sources, weights = [factors(adapter) for adapter in adapters], [1.0, 0.5, -0.8]

    def trim(x):
        return definitions.keep_largest(x, 0.4)

    wanted = definitions.knots(sources, weights, definitions.mean_of_winners, trim)
    close(result(adapters, weights, combination="knots_ties", density=0.4), wanted, 1e-9)
    # Without drops and election the shared basis changes nothing: here for one adapter, which every election wins.
    close(result(adapters[:1], combination="knots_ties", density=1.0), adapters[0].update(), 1e-9)


def test_breadcrumbs():
    adapters = [lora(LAYERS["linear"], 3, seed) for seed in range(2)]
    parts = [definitions.without_outliers(adapter.update(), 0.5, 0.1) for adapter in adapters]
    found = result(adapters, [1.0, -0.5], combination="breadcrumbs_svd", density=0.5, gamma=0.1, rank=9)
    close(found, parts[0] - 0.5 * parts[1], 1e-9)


def test_della():
    adapters = [lora(LAYERS["linear"], 3, seed) for seed in range(2)]
    plain = {"density": 0.7, "epsilon": 0.0, "rank": 9}
    for name, like in (("della_svd", "dare_ties_svd"), ("della_linear_svd", "dare_linear_svd")):
        # With equal rates it is DARE.
        found = result(adapters, combination=name, **plain)
        close(found, result(adapters, combination=like, density=0.7, rank=9), 1e-6)


# Every library.


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_library_combines_alike(combination, asarray, to_numpy):
    weights = [0.4, 0.6] if combination == "slerp" else [1.0, -0.5]
    settings_ = options(combination) | {"combination": combination}
    layer = LAYERS["conv" if combination == "cat" else "linear"]
    here = [lora(layer, rank, rank) for rank in (2, 3)]
    there = [lora(layer, rank, rank, asarray=asarray) for rank in (2, 3)]
    found = pa.combine(there, weights, **settings_)
    wanted = pa.combine(here, weights, **settings_)
    assert type(found.adapter.params["lora_A"]) is type(there[0].params["lora_A"])
    assert found.rank == wanted.rank
    assert found.energy == pytest.approx(wanted.energy)
    # Also the factors: singular vectors have one sign everywhere.
    for name, array in wanted.adapter.params.items():
        close(to_numpy(found.adapter.params[name]), array, 1e-8)


def test_masks_have_the_same_bits_everywhere(asarray, to_numpy):
    x = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    x[:, 3] = x[:, 4]  # ties
    for drop in (
        lambda a: dare(a, 0.3, seed=1, stream="x"),
        lambda a: della(a, 0.3, 0.2, seed=1, stream="x"),
        lambda a: largest(a, 100),
    ):
        np.testing.assert_array_equal(to_numpy(drop(asarray(x))), drop(x))


def test_short_dtypes_are_combined_in_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    adapters = [lora(LAYERS["linear"], 2, seed) for seed in range(2)]
    short = [
        replace(a, params={name: array.astype(ml_dtypes.bfloat16) for name, array in a.params.items()})
        for a in adapters
    ]
    wide = [replace(a, params={name: array.astype(np.float32) for name, array in a.params.items()}) for a in short]
    for combination in PLAIN:
        settings_ = options(combination) | {"combination": combination}
        found = pa.combine(short, **settings_).adapter
        assert found.params["lora_A"].dtype == np.float32
        close(found.update(), result(wide, **settings_), 1e-6)


def test_the_result_is_apart_from_what_trains_its_sources():
    torch = pytest.importorskip("torch")
    made = lora(LAYERS["linear"], 2, 0, asarray=lambda array: torch.nn.Parameter(torch.tensor(array)))
    for combination in ("cat", "svd", "linear", "ties_svd"):
        found = pa.combine([made], combination=combination, **({"density": 1.0} if "ties" in combination else {}))
        for name, array in found.adapter.params.items():
            assert not array.requires_grad
            assert array.data_ptr() != made.params[name].data_ptr()
