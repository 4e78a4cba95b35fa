"""A training that is killed and started again makes the same bytes as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from peftarray.errors import ConfigError, FormatError, OutputError
from peftarray.training import SGD, AdamW, Batches, LossScale, Precision, constant, fit, linear

PROGRAM = Path(__file__).parent / "killed.py"


def start(*arguments):
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return subprocess.Popen([sys.executable, str(PROGRAM), *map(str, arguments)], env=os.environ | threads)


def steps_in(folder):
    """How many steps the newest checkpoint has behind it."""
    return max((int(file.stem.split("-")[1]) for file in folder.glob("*.safetensors")), default=0)


def contents(file):
    with np.load(file) as held:
        return {name: held[name] for name in held.files}


@pytest.mark.parametrize(("library", "kills"), [("numpy", 8), ("torch", 2), ("jax", 2)])
def test_a_killed_training_makes_the_same_bytes(library, kills, tmp_path):
    pytest.importorskip(library)
    assert start(library, tmp_path / "one", tmp_path / "whole.npz").wait() == 0
    draw = random.Random(library)
    for kill in range(kills):
        before = steps_in(tmp_path / "two")
        running = start(library, tmp_path / "two", tmp_path / "parts.npz", 0.03, 3 * (kill + 1))
        while steps_in(tmp_path / "two") == before:
            assert running.poll() is None, "it ended by itself"
            time.sleep(0.003)
        time.sleep(draw.uniform(0, 0.08))
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert 0 < steps_in(tmp_path / "two") < 30
    assert start(library, tmp_path / "two", tmp_path / "parts.npz").wait() == 0
    whole, parts = contents(tmp_path / "whole.npz"), contents(tmp_path / "parts.npz")
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        assert array.dtype == parts[name].dtype, name
        assert array.tobytes() == parts[name].tobytes(), name
    assert len(whole["losses"]) == 30
    assert len(whole["evaluations"]) == 6


def squares(params, batch):
    return np.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def line(rows=12, dtype=np.float64):
    x = np.random.default_rng(0).standard_normal((rows, 3))
    return {"x": x.astype(dtype), "y": (x @ np.asarray([1.0, -2.0, 0.5])).astype(dtype)}


def fitted(folder, **options):
    options = {"optimizer": AdamW(0.1), "progress": False, "checkpoint_every": 2, **options}
    given = {"start": {"w": np.zeros(3)}, "loss": squares, "batches": Batches(line(), 3)}
    given = {name: options.pop(name, value) for name, value in given.items()}
    return fit(*given.values(), checkpoint_dir=folder, **options)


def test_a_longer_training_goes_on_from_a_shorter_one(tmp_path):
    fitted(tmp_path / "run", steps=5)
    history = fitted(tmp_path / "run", steps=11)
    expected = fitted(None, steps=11)
    assert history.losses == expected.losses
    assert history.params["w"].tobytes() == expected.params["w"].tobytes()


def test_a_finished_training_does_nothing_more(tmp_path):
    first = fitted(tmp_path / "run", steps=5)
    again = fitted(tmp_path / "run", steps=5, loss=lambda params, batch: 1 / 0)
    assert again.losses == first.losses
    assert again.params["w"].tobytes() == first.params["w"].tobytes()


def test_two_checkpoints_are_kept(tmp_path):
    fitted(tmp_path / "run", steps=9)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "step-00000008.safetensors",
        "step-00000009.safetensors",
    ]


def test_the_loss_scale_goes_on(tmp_path):
    """Each run is one step long, so that everything goes through a file."""
    options = {
        "start": {"w": np.zeros(3, np.float32)},
        "batches": [line(dtype=np.float32)],
        "optimizer": SGD(0.1, momentum=0.5),
        "precision": Precision("float16", LossScale(2.0**17, interval=3)),
    }
    for steps in range(1, 9):
        history = fitted(tmp_path / "run", steps=steps, **options)
    expected = fitted(None, steps=8, **options)
    assert history.skipped == expected.skipped
    assert len(history.skipped) > 1
    assert history.losses == expected.losses
    assert history.params["w"].tobytes() == expected.params["w"].tobytes()


def test_bfloat16_arrays_come_back(tmp_path):
    torch = pytest.importorskip("torch")
    first = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    batch = {name: torch.asarray(array).to(torch.bfloat16) for name, array in line().items()}
    options = {"start": first, "batches": [batch], "loss": lambda p, b: ((b["x"] @ p["w"] - b["y"]) ** 2).mean()}
    fitted(tmp_path / "run", steps=3, **options)
    history = fitted(tmp_path / "run", steps=6, **options)
    assert history.params["w"].dtype == torch.bfloat16
    assert torch.equal(history.params["w"], fitted(None, steps=6, **options).params["w"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": AdamW(0.2)}, "of a training with optimizer "),
        ({"schedule": linear()}, "with schedule "),
        ({"clip_norm": 1.0}, "with clip_norm null, and this one has 1.0"),
        ({"accumulate": 2}, "with accumulate 1, and this one has 2"),
        ({"start": {"w": np.zeros(3, np.float32)}}, "with arrays "),
        ({"start": {"v": np.zeros(3)}}, "with arrays "),
    ],
)
def test_another_training_is_refused(options, words, tmp_path):
    fitted(tmp_path / "run", steps=2)
    with pytest.raises(ConfigError) as caught:
        fitted(tmp_path / "run", steps=4, **options)
    assert words in str(caught.value)
    assert "give it the same, or another checkpoint_dir" in str(caught.value)


def test_a_schedule_without_an_end_may_go_on_for_longer(tmp_path):
    fitted(tmp_path / "run", steps=2, schedule=constant(warmup=3))
    assert fitted(tmp_path / "run", steps=6, schedule=constant(warmup=3)).steps == 6
    with pytest.raises(ConfigError, match="with schedule"):
        fitted(tmp_path / "run", steps=6, schedule=constant(warmup=0.5))


def test_to_begin_anew_takes_another_folder(tmp_path):
    fitted(tmp_path / "run", steps=2)
    with pytest.raises(OutputError, match="holds a training; remove it, give another, or resume"):
        fitted(tmp_path / "run", steps=2, resume=False)
    assert fitted(tmp_path / "other", steps=2, resume=False).steps == 2


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    fitted(tmp_path / "run", steps=4)
    newest = sorted((tmp_path / "run").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.raises(FormatError, match="is truncated"):
        fitted(tmp_path / "run", steps=6)
    newest.unlink()
    assert fitted(tmp_path / "run", steps=6).losses == fitted(None, steps=6).losses


def test_a_folder_is_for_one_process(tmp_path):
    def second(moment):
        with pytest.raises(OutputError, match="another process trains with checkpoint_dir"):
            fitted(tmp_path / "run", steps=2)

    assert fitted(tmp_path / "run", steps=2, callbacks=[second]).steps == 2


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="which cannot be a folder"):
        fitted(tmp_path / "file", steps=2)
