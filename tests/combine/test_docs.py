"""The code in docs/combining.md runs, from its first block to its last, and its table names every combination."""

from __future__ import annotations

import re
from pathlib import Path

from peftarray.combining import COMBINATIONS

PAGE = (Path(__file__).parents[2] / "docs" / "combining.md").read_text(encoding="utf-8")


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "combining.md", "exec"), names)


def test_the_table_names_every_combination():
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(COMBINATIONS)
