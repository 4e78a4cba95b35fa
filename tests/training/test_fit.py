"""`fit` makes the same training on every library, and what it says about one is so."""

from __future__ import annotations

import io
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from peftarray import trees
from peftarray.backend import backend_of, load_backend
from peftarray.draws import dropout
from peftarray.errors import ConfigError, NumberError, OutputError, PeftError, UnsupportedError
from peftarray.training import (
    SGD,
    AdamW,
    Batches,
    Group,
    constant,
    cosine,
    early_stopping,
    fit,
    linear,
    lora_plus,
)

sys.path.insert(0, str(Path(__file__).parent))
import digits

RECIPE = {
    "optimizer": AdamW(1e-2, groups=lora_plus(4.0)),
    "schedule": cosine(warmup=5),
    "steps": 50,
    "clip_norm": 1.0,
    "seed": 3,
    "progress": False,
}


@pytest.fixture(scope="module")
def on_numpy():
    """The training that every library is compared with."""
    return fit(digits.start(), digits.loss_over(digits.base(), rate=0.2), digits.batches(), **RECIPE)


def test_fifty_steps_are_the_same_on_every_library(on_numpy, asarray, to_numpy):
    weights = digits.moved(asarray, digits.base())
    batches = digits.moved(asarray, digits.batches())
    found = fit(digits.moved(asarray, digits.start()), digits.loss_over(weights, rate=0.2), batches, **RECIPE)
    assert on_numpy.losses[-1] < 0.6 * on_numpy.losses[0]
    np.testing.assert_allclose(found.losses, on_numpy.losses, atol=1e-4)
    np.testing.assert_allclose(found.norms, on_numpy.norms, rtol=1e-3)
    assert found.rates == on_numpy.rates
    for (name, leaf), value in zip(trees.named(found.params), trees.leaves(on_numpy.params), strict=True):
        assert type(leaf) is type(asarray(value)), name
        assert to_numpy(leaf).dtype == np.float32, name
        np.testing.assert_allclose(to_numpy(leaf), value, atol=1e-3, err_msg=name)


def test_gradients_are_the_same_on_every_library(asarray, to_numpy):
    def gradients(convert):
        params, batch = (digits.moved(convert, tree) for tree in (on_the_way(), digits.batches()[0]))
        backend = load_backend(backend_of(params["bias"]))
        loss = digits.loss_over(digits.moved(convert, digits.base()))
        return backend.value_and_grad(loss)(params, batch)

    def on_the_way():
        """B is zero at first, and A has no gradient then."""
        draw = np.random.default_rng(5)
        return digits.moved(lambda x: draw.standard_normal(x.shape).astype(np.float32) * 0.3, digits.start())

    (value, found), (wanted, expected) = gradients(asarray), gradients(np.asarray)
    assert float(to_numpy(value)) == pytest.approx(float(wanted), rel=1e-5)
    for (name, leaf), other in zip(trees.named(found), trees.leaves(expected), strict=True):
        error = np.linalg.norm(to_numpy(leaf) - other) / np.linalg.norm(other)
        assert error < 1e-5, f"{name}: {error}"


def test_compiled_and_not_compiled_is_the_same(on_numpy, xp, asarray):
    if not load_backend(backend_of(asarray([1.0]))).COMPILES:
        pytest.skip("it compiles only when asked to")
    weights = digits.moved(asarray, digits.base())
    batches = digits.moved(asarray, digits.batches())
    start = digits.moved(asarray, digits.start())
    found = fit(start, digits.loss_over(weights, rate=0.2), batches, **RECIPE | {"steps": 5, "compile": False})
    np.testing.assert_allclose(found.losses, on_numpy.losses[:5], atol=1e-4)


def test_torch_compiles_a_step_without_breaks(monkeypatch):
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    options = RECIPE | {"steps": 6, "schedule": constant()}
    # Six batches of one size.
    weights, start, batches = digits.base(), digits.start(), digits.batches()[:6]
    expected = fit(start, digits.loss_over(weights, rate=0.2), batches, **options)
    weights, start, batches = (digits.moved(torch.asarray, tree) for tree in (weights, start, batches))
    found = fit(start, digits.loss_over(weights, rate=0.2), batches, compile=True, **options)
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-4)


def squares(params, batch):
    return np.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def line(rows=12, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, 3))
    return {"x": x, "y": x @ np.asarray([1.0, -2.0, 0.5])}


def fitted(**options):
    options = {"optimizer": SGD(0.1), "progress": False, **options}
    return fit({"w": np.zeros(3)}, options.pop("loss", squares), options.pop("batches", [line()]), **options)


def test_accumulated_batches_are_one_large_batch():
    whole, parts = line(), Batches(line(), 3)
    assert fitted(batches=[whole], steps=5).params["w"] == pytest.approx(
        fitted(batches=parts, steps=5, accumulate=4).params["w"], rel=1e-12
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_number(workers):
    def loss(params, batch, key):
        return squares({"w": dropout(params["w"], 0.4, key, stream="w")}, batch)

    options = {"batches": Batches(line(), 3), "steps": 5, "accumulate": 4, "seed": 3}
    options |= {"loss": loss, "eval_batches": Batches(line(11), 3), "eval_every": 2}
    alone, beside = fitted(workers=1, **options), fitted(workers=workers, **options)
    assert beside.losses == alone.losses
    assert beside.evaluations == alone.evaluations
    assert beside.params["w"].tobytes() == alone.params["w"].tobytes()


def test_workers_are_at_work_at_once():
    both = threading.Barrier(2, timeout=20)

    def loss(params, batch):
        both.wait()  # passes only where another thread comes
        return squares(params, batch)

    assert fitted(loss=loss, batches=Batches(line(), 6), accumulate=2, workers=2, steps=3).steps == 3


def test_an_error_in_a_worker_is_that_of_the_training():
    def loss(params, batch):
        assert batch["x"].shape[0] == 3, "a shorter batch"
        return squares(params, batch)

    before = threading.active_count()
    with pytest.raises(AssertionError, match="a shorter batch"):
        fitted(loss=loss, batches=Batches(line(10), 3), accumulate=4, workers=2)
    assert threading.active_count() == before


def test_workers_are_for_libraries_that_use_one_core():
    torch = pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="torch computes in parallel by itself; leave workers at 1"):
        fit({"w": torch.zeros(3)}, squares, [line()], accumulate=2, workers=2)


def test_what_is_left_at_the_end_of_an_epoch_is_a_smaller_step():
    history = fitted(batches=Batches(line(10), 2), epochs=2, accumulate=2)
    assert history.steps == 6


def test_steps_and_epochs_end_a_training_whichever_is_first():
    assert fitted(batches=Batches(line(), 3)).steps == 4
    assert fitted(batches=Batches(line(), 3), epochs=3).steps == 12
    assert fitted(batches=Batches(line(), 3), epochs=3, steps=7).steps == 7
    assert fitted(batches=Batches(line(), 3), epochs=1, steps=7).steps == 4


def test_batches_may_be_a_function_of_the_epoch():
    asked = []

    def of_epoch(epoch):
        asked.append(epoch)
        return iter([line()])

    fitted(batches=of_epoch, steps=3)
    assert asked == [0, 1, 2]


def test_an_epoch_is_shuffled_by_its_seed():
    batches = Batches({"x": np.arange(20)}, 6, seed=1)
    epochs = [np.concatenate([batch["x"] for batch in batches(epoch)]) for epoch in (0, 0, 1)]
    assert all(sorted(rows) == list(range(20)) for rows in epochs)
    np.testing.assert_array_equal(epochs[0], epochs[1])
    assert (epochs[0] != epochs[2]).any()
    assert len(list(Batches({"x": np.arange(20)}, 6, drop_last=True))) == 3


def test_clipping_bounds_a_step():
    steep = [{"x": line()["x"], "y": line()["y"] * 1e3}]
    by_norm = fitted(batches=steep, steps=1, clip_norm=0.5)
    assert np.linalg.norm(by_norm.params["w"]) == pytest.approx(0.1 * 0.5, rel=1e-6)
    assert by_norm.norms[0] > 0.5
    by_value = fitted(batches=steep, steps=1, clip_value=0.5)
    np.testing.assert_allclose(np.abs(by_value.params["w"]), 0.1 * 0.5)


def test_frozen_arrays_stay_and_cost_nothing():
    def loss(params, batch):
        return squares({"w": params["w"] + params["offset"]["w"]}, batch)

    start = {"w": np.zeros(3), "offset": {"w": np.ones(3)}}
    history = fit(start, loss, [line()], optimizer=AdamW(), steps=2, frozen=["offset"], progress=False)
    assert history.params["offset"]["w"] is start["offset"]["w"]
    assert set(history.state["slots"]) == {"w"}


def test_evaluations_are_recorded_and_change_nothing():
    with_keys = {"seed": 1, "loss": lambda params, batch, key: squares(params, batch) * (1.0 if key is None else 2.0)}
    history = fitted(batches=Batches(line(), 3), epochs=2, eval_batches=[line(seed=1), line(seed=2)], **with_keys)
    assert [step for step, _ in history.evaluations] == [4, 8]
    expected = np.mean([squares(history.params, line(seed=seed)) for seed in (1, 2)])
    assert history.evaluations[-1][1] == pytest.approx(expected)
    often = fitted(batches=Batches(line(), 3), epochs=2, eval_batches=[line(seed=1)], eval_every=3, **with_keys)
    assert [step for step, _ in often.evaluations] == [3, 6, 8]
    assert often.losses == history.losses


def test_a_training_that_gets_no_better_is_ended():
    history = fitted(optimizer=SGD(0.0), steps=50, eval_batches=[line()], callbacks=[early_stopping(patience=3)])
    assert history.steps == 4
    assert history.stopped.startswith("no better evaluation than")


def test_a_callback_sees_every_step():
    seen = []
    history = fitted(steps=3, callbacks=[lambda moment: seen.append((moment.step, moment.epoch, moment.params["w"]))])
    assert [at[:2] for at in seen] == [(1, 0), (2, 1), (3, 2)]
    np.testing.assert_array_equal(seen[-1][2], history.params["w"])


class Model:
    """The smallest thing that is not a tree and can be trained."""

    def __init__(self, params):
        self.params = params

    def with_params(self, params):
        return Model(params)

    def __call__(self, x):
        return x @ self.params["w"]


def test_a_schedule_may_be_any_function_of_the_step():
    history = fitted(steps=3, schedule=lambda step: 0.5**step)
    assert history.rates == [0.1, 0.05, 0.025]


def test_a_callback_finds_the_parameters_in_the_model():
    model, seen = Model({"w": np.zeros(3)}), []

    def look(moment):
        seen.append(model.params["w"] is moment.params["w"])

    fit(model, lambda m, b: squares(m.params, b), [line()], steps=3, callbacks=[look], progress=False)
    assert seen == [True, True, True]


def test_a_model_is_trained_in_place():
    model = Model({"w": np.zeros(3)})
    history = fit(
        model, lambda m, b: np.mean((m(b["x"]) - b["y"]) ** 2), [line()], optimizer=SGD(0.1), steps=9, progress=False
    )
    np.testing.assert_array_equal(model.params["w"], fitted(steps=9).params["w"])
    assert model.params is history.params


def explode(step):
    """A loss that is NaN from a step on."""
    batches = [line() for _ in range(10)]
    batches[step] = {"x": line()["x"] * math.nan, "y": line()["y"]}
    return batches


def test_a_loss_that_is_no_number_names_its_step():
    model = Model({"w": np.zeros(3)})
    with pytest.raises(
        NumberError, match=r"the loss of step 4 is nan, and the gradients of w are not finite \(epoch 0"
    ):
        fit(model, lambda m, b: squares(m.params, b), explode(4), optimizer=SGD(0.1), progress=False)
    np.testing.assert_array_equal(model.params["w"], fitted(batches=explode(4)[:4]).params["w"])


def test_a_gradient_that_is_no_number_names_its_array():
    def loss(params, batch):
        return np.sum(np.sqrt(params["root"])) + np.sum(params["w"])

    with pytest.raises(NumberError, match=r"step 0 is 0.0, and the gradients of root are not finite"):
        fit({"w": np.zeros(3), "root": np.zeros(2)}, loss, [line()], progress=False)


def test_lines_say_how_it_goes(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    fitted(steps=3, progress=True)
    assert told.getvalue().startswith("step 3 of 3: loss ")
    assert "samples/s" in told.getvalue()


def test_a_bar_says_how_it_goes_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    told = Terminal()
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setenv("COLUMNS", "140")
    fitted(steps=3, progress=True)
    assert "training" in told.getvalue()
    assert "3/3" in told.getvalue()
    assert "samples/s" in told.getvalue()


def test_a_history_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    history = fitted(steps=5, eval_batches=[line()], eval_every=2)
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000
    with pytest.raises(OutputError, match="cannot be written"):
        history.plot(tmp_path / "none" / "history.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps of fit is 0; it must be None or a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs of fit is 1.5"),
        ({"accumulate": 0}, "accumulate of fit is 0"),
        ({"workers": 0}, "workers of fit is 0; it must be a whole number of at least 1"),
        ({"workers": 2}, "workers of fit is 2, and a step has 1 to work on; give smaller batches, and accumulate=2"),
        ({"clip_norm": 0.0}, "clip_norm of fit is 0.0; it must be None or a finite number above 0"),
        ({"clip_value": -1.0}, "clip_value of fit is -1.0"),
        ({"seed": "one"}, "seed of fit is 'one'"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be one of 'fp32', 'float32', 'bf16'"),
        ({"precision": "bf16"}, "precision is bfloat16, which numpy does not compute in"),
        ({"frozen": ["v"]}, "frozen names v, which params does not have"),
        ({"frozen": ["w"]}, "params holds no array that gets a gradient"),
        ({"batches": []}, "batches has none"),
        ({"batches": iter([line()]), "steps": 5}, "batches has none in epoch 1; give a list"),
        ({"batches": iter([line()]), "schedule": linear()}, "depends on the number of steps"),
        ({"eval_batches": []}, "eval_batches has none"),
        ({"loss": lambda params, batch: 1.0}, "the loss is a float that does not depend on params"),
        ({"loss": lambda params, batch: batch["x"] @ params["w"]}, "the loss has shape (12,)"),
        ({"optimizer": SGD(0.1, groups=[Group("v")])}, "no array matches Group.pattern 'v'"),
        ({"compile": "yes"}, "compile of fit is 'yes'"),
        (
            {"optimizer": "adamw"},
            "optimizer of fit is 'adamw'; it must be None or one of peftarray, such as",
        ),
        ({"schedule": 0.5}, "schedule of fit is 0.5; it must be a Schedule, such as cosine(warmup=10), or a function"),
        ({"batches": line()}, "it must be a list of batches, not a single one"),
        ({"eval_batches": line()}, "it must be a list of batches, not a single one"),
        ({"callbacks": early_stopping()}, "it must be a list of functions of a Moment"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(PeftError) as caught:
        fitted(**options)
    assert words in str(caught.value)
    assert isinstance(caught.value, (ConfigError, UnsupportedError)) or "params" in words or "loss" in words


def test_bad_models_are_refused():
    with pytest.raises(ConfigError, match="model is a int; give a tree of arrays, an object with params"):
        fit(3, squares, [line()])
    with pytest.raises(PeftError, match="n is int64, which has no gradient; name it in frozen"):
        fit({"n": np.arange(3)}, squares, [line()])
    with pytest.raises(ConfigError, match="the arrays of Batches have"):
        Batches({"x": np.zeros(3), "y": np.zeros(4)}, 2)
    with pytest.raises(ConfigError, match=r"Batches.size is 0"):
        Batches({"x": np.zeros(3)}, 0)
    with pytest.raises(ConfigError, match="patience of early_stopping is 0"):
        early_stopping(patience=0)
