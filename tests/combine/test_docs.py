"""The table in docs/combining.md names every combination."""

from __future__ import annotations

import re
from pathlib import Path

from peftarray.combining import COMBINATIONS

PAGE = (Path(__file__).parents[2] / "docs" / "combining.md").read_text(encoding="utf-8")


def test_the_table_names_every_combination():
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(COMBINATIONS)
