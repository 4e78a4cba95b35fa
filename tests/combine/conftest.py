"""pytest imports test modules by their path; the modules beside them are found here, and the tests of merging lend
theirs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before transformers is imported: nothing here may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "merging")]
