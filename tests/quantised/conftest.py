"""Makes the files beside this one importable, the cases of the laws, and the real models of the merging tests."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(_TESTS / "laws"), str(_TESTS / "merging")]
