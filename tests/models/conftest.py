"""What the tests of the models share: checkpoints of transformers' own models, and models of every library."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from peftarray import models
from peftarray.backend import backend_of, load_backend

# Before transformers is imported: nothing here may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# pytest imports test modules by their path; modules beside them are found here, the real models in a folder of others.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "merging")]


@pytest.fixture(scope="session", autouse=True)
def quiet_and_offline():
    """Whatever was imported before: no look-ups, no bars, one thread (the workers of a run share the cores)."""
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    hub.constants.HF_HUB_OFFLINE = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def backend(asarray):
    """The name of the test's library among the backends."""
    return backend_of(asarray([0.0]))


@pytest.fixture(scope="session")
def loaded(backend, device):
    """`loaded(folder, **options)`: the reference model of a folder, on the library and the device of the test."""
    place = {"device": device} if backend in ("torch", "cupy") else {}
    return lambda folder, **options: models.load(folder, backend=backend, **place, **options)


@pytest.fixture(scope="session")
def run(backend):
    """`run(function, weights)`: the function's value; compiled by the library whose users compile everything."""
    jit = load_backend(backend).jit if backend == "jax" else lambda function: function
    return lambda function, weights: jit(function)(weights)


@pytest.fixture(scope="session")
def examples(backend):
    """How many models a test draws: few for the library that compiles for each shape."""
    return settings(max_examples=2 if backend == "jax" else 40)
