"""Makes the files beside this one, and the real models of the merging tests, importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "merging")]
