"""Mixed precision: what the loss sees, what is kept in float32, and the loss scale of float16."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from peftarray import trees
from peftarray.errors import ConfigError, NumberError
from peftarray.training import SGD, AdamW, LossScale, Precision, fit

sys.path.insert(0, str(Path(__file__).parent))
import digits


def squares(params, batch):
    return np.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def line(factor=1.0):
    x = np.random.default_rng(0).standard_normal((12, 3))
    return {"x": (x * factor).astype(np.float32), "y": (x @ np.asarray([1.0, -2.0, 0.5]) * factor).astype(np.float32)}


def trained(scale, batches, **options):
    """On NumPy: the loss scale is a matter of the loop, not of the library."""
    options = {"optimizer": SGD(0.1), "progress": False, **options}
    return fit({"w": np.zeros(3, np.float32)}, squares, batches, precision=Precision("float16", scale), **options)


def exact(batches, **options):
    return fit({"w": np.zeros(3, np.float32)}, squares, batches, optimizer=SGD(0.1), progress=False, **options)


def test_a_step_that_overflows_is_skipped_and_said(capsys):
    batches = [line(), line(100), line()]
    history = trained(LossScale(2.0**12), batches)
    assert (history.skipped, history.steps) == ([1], 3)
    np.testing.assert_allclose(history.params["w"], exact([line(), line()]).params["w"], rtol=1e-2)
    trained(LossScale(2.0**12), batches, progress=True)
    said = capsys.readouterr().err
    assert "step 1 changed nothing: its gradients overflow; loss scale 4096 -> 2048" in said


def test_it_recovers_from_a_scale_that_is_too_large():
    history = trained(LossScale(2.0**24), [line()], steps=60)
    count = len(history.skipped)
    assert history.skipped == list(range(count))
    assert 5 < count < 20
    np.testing.assert_allclose(history.params["w"], exact([line()], steps=60 - count).params["w"], atol=5e-3)


def test_small_gradients_are_not_lost():
    tiny = [line(1e-4)]
    assert trained(LossScale(1.0), tiny).norms[0] == 0
    assert trained(LossScale(2.0**14), tiny).norms[0] == pytest.approx(exact(tiny).norms[0], rel=1e-2)


def test_it_ends_where_no_scale_helps():
    with pytest.raises(NumberError, match="the loss of step 20"):
        trained(LossScale(2.0**10), [line(1e4)], steps=50)


def test_the_scale_grows_after_good_steps():
    scale = LossScale(8.0, interval=3)
    values = [(scale := scale.after(finite)).value for finite in (True, True, True, False, True)]
    assert values == [8, 8, 16, 8, 8]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_parameters_stay_float32_and_the_loss_sees_none(precision, xp, asarray, to_numpy):
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    if not hasattr(xp, dtype) or xp.__name__ == "array_api_compat.numpy":
        pytest.skip(f"it has no {dtype} to compute in")
    seen = set()

    def loss(params, batch):
        seen.update(str(leaf.dtype).rpartition(".")[2] for leaf in (*trees.leaves(params), *batch.values()))
        return digits.loss_over(weights)(params, batch)

    weights = digits.moved(lambda x: xp.astype(asarray(x), getattr(xp, dtype)), digits.base())
    batches, start = (digits.moved(asarray, tree) for tree in (digits.batches()[:1], digits.start()))
    options = {"optimizer": AdamW(1e-2), "steps": 20, "progress": False}
    history = fit(start, loss, batches, precision=precision, **options)
    wide = fit(digits.start(), digits.loss_over(digits.base()), digits.batches()[:1], **options)
    assert seen == {dtype}
    assert {to_numpy(leaf).dtype for leaf in trees.leaves(history.params)} == {np.dtype(np.float32)}
    good = [step for step in range(20) if step not in history.skipped]
    assert len(good) > 15
    np.testing.assert_allclose(np.asarray(history.losses)[good], wide.losses[: len(good)], atol=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LossScale(-1.0), "LossScale.value is -1.0"),
        (lambda: LossScale(growth=1.0), "LossScale.growth is 1.0; it must be a number above 1"),
        (lambda: LossScale(backoff=1.5), "LossScale.backoff is 1.5; it must be a number between 0 and 1"),
        (lambda: LossScale(interval=0), "LossScale.interval is 0"),
        (lambda: Precision("float8"), "Precision.dtype is 'float8'"),
    ],
)
def test_bad_settings_are_refused(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value)
