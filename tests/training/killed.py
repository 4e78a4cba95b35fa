"""A training in a process of its own, to be killed: `python killed.py LIBRARY CHECKPOINTS OUT [SECONDS LAST]`.

It takes so many seconds for a step, and goes no further than the last, however late the signal is."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import digits
import numpy as np

from peftarray import trees
from peftarray.backend import load_backend
from peftarray.training import AdamW, Batches, cosine, early_stopping, fit, lora_plus


def paced(seconds, last):
    """A callback that makes steps slow, and waits for its end once the last one is done."""
    return lambda progress: time.sleep(seconds if progress.step < last else 600)


def train(library, checkpoints, out, seconds=0.0, last=float("inf")):
    backend = load_backend(library)
    x, y = digits.images()
    batches = Batches(digits.moved(backend.from_host, {"x": x[:400], "y": y[:400]}), 48, seed=1)
    held_out = [digits.moved(backend.from_host, {"x": x[400:], "y": y[400:]})]
    history = fit(
        digits.moved(backend.from_host, digits.start()),
        digits.loss_over(digits.moved(backend.from_host, digits.base()), rate=0.1),
        batches,
        optimizer=AdamW(1e-2, groups=lora_plus(4.0)),
        schedule=cosine(warmup=0.1),
        epochs=6,
        accumulate=2,
        clip_norm=1.0,
        seed=2,
        callbacks=[paced(seconds, last), early_stopping(patience=4)],
        eval_batches=held_out,
        checkpoint_dir=checkpoints,
        checkpoint_every=1,
        progress=False,
    )
    arrays = {f"params/{name}": leaf for name, leaf in trees.named(history.params)}
    arrays |= {f"slots/{name}": leaf for name, leaf in trees.named(history.state["slots"])}
    numbers = {name: np.asarray(getattr(history, name)) for name in ("losses", "norms", "rates", "evaluations")}
    np.savez(out, **{name: backend.to_host(array) for name, array in arrays.items()}, **numbers)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], sys.argv[3], *map(float, sys.argv[4:]))
