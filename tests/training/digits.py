"""LoRA on a small reader of handwritten digits, as plain functions: what the tests of training train."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from peftarray import Layer, LoraConfig, trees
from peftarray.arrays import namespace
from peftarray.draws import dropout

ASSETS = Path(str(files("peftarray.demo"))) / "assets"
CONFIG = LoraConfig(r=4, lora_alpha=8)
HIDDEN, CLASSES = 32, 10
LAYERS = {"embed": (HIDDEN, 64), "head": (CLASSES, HIDDEN)}


def images():
    """Pixels `(450, 64)` from 0 to 1, and one-hot labels."""
    held = np.load(ASSETS / "digits.npz")
    return held["images"].reshape(-1, 64).astype(np.float32) / 16, np.eye(CLASSES, dtype=np.float32)[held["labels"]]


def base():
    """Frozen weights, drawn at random."""
    draw = np.random.default_rng(0)
    return {name: (draw.standard_normal(shape) * shape[1] ** -0.5).astype(np.float32) for name, shape in LAYERS.items()}


def start():
    """The adapters' first parameters, and a bias."""
    adapters = {name: dict(CONFIG.init(weight, seed=1, name=name).params) for name, weight in base().items()}
    return {**adapters, "bias": np.zeros(CLASSES, np.float32)}


def batches(size=64):
    x, y = images()
    return [{"x": x[at : at + size], "y": y[at : at + size]} for at in range(0, len(x), size)]


def loss_over(weights, *, rate=0.0):
    """The loss over adapted `weights`: mean cross-entropy; with a key, dropout before the head."""

    shapes = {name: Layer(name, "linear", shape) for name, shape in LAYERS.items()}
    methods = {name: CONFIG.at(name) for name in LAYERS}

    def layer(params, x, name):
        method, shape = methods[name], shapes[name]
        return method.apply(method.prepare(params[name], shape), x, weights[name], shape)

    def loss(params, batch, key=None):
        xp = namespace(params["bias"], batch["x"])
        hidden = xp.tanh(layer(params, batch["x"], "embed"))
        scores = layer(params, dropout(hidden, rate, key), "head") + params["bias"]
        shifted = scores - xp.max(scores, axis=-1, keepdims=True)
        logs = shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
        return -xp.sum(logs * batch["y"]) / batch["y"].shape[0]

    return loss


def moved(convert, tree):
    return trees.refill(tree, [convert(leaf) for leaf in trees.leaves(tree)])
