"""What the tests of prompts share with those of the models: tiny models of transformers, offline and quiet."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before transformers is imported: nothing here may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest imports test modules by their path; these are found beside them.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "models")]


@pytest.fixture(scope="session", autouse=True)
def quiet_and_offline():
    """Whatever was imported before: no look-ups, no bars, one thread (the workers of a run share the cores)."""
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    hub.constants.HF_HUB_OFFLINE = True
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
