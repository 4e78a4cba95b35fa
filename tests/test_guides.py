"""The code in the guides of docs runs, from a page's first block to its last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = {
    "autodiff": 5,
    "combining": 2,
    "many-adapters": 8,
    "models": 4,
    "prompts": 3,
    "quantisation": 7,
    "training": 5,
    "whole-models": 9,
}
"""Page -> how many blocks it has."""
TORCH = ("whole-models",)
ELSEWHERE = ("fine-tune-smollm2", "write-your-own-method")
"""Pages whose code runs in other tests, or needs a model that must be fetched."""


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


def run(page: str) -> None:
    names: dict[str, object] = {}
    for block in blocks_of(page):
        exec(compile(block, f"{page}.md", "exec"), names)


@pytest.mark.parametrize("page", BLOCKS)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    if page in TORCH:
        pytest.importorskip("torch")
    assert len(blocks_of(page)) == BLOCKS[page]
    monkeypatch.chdir(tmp_path)
    run(page)
    said = capsys.readouterr()
    if page == "prompts":
        assert "trainable params: 64 " in said.out
    if page == "training":
        assert (tmp_path / "merged" / "model.safetensors").exists()
        assert "samples/s" in said.err


def test_every_page_with_code_is_known():
    assert {page.stem for page in DOCS.glob("*.md") if blocks_of(page.stem)} == {*BLOCKS, *ELSEWHERE}
