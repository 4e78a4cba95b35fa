"""What the tests of merging share: tiny checkpoints that are built once, and libraries that ask no hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before transformers is imported: nothing here may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# pytest imports test modules by their path; the modules beside them are found here.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
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
def bases(quiet_and_offline, tmp_path_factory):
    """`bases(name, sharded=False, dtype=None)`: a tiny base with its folder, built at its first use."""
    tiny_models = pytest.importorskip("tiny_models")
    return tiny_models.Bases(tmp_path_factory.mktemp("bases"))
