"""The code in README.md runs, and what it promises of the command line exists."""

from __future__ import annotations

import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(block, tmp_path, monkeypatch, capsys):
    assets = Path(str(files("peftarray.demo"))) / "assets"
    shutil.copytree(assets / "base", tmp_path / "BASE")
    shutil.copytree(assets / "adapter", tmp_path / "ADAPTER")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) == 2


def test_every_option_that_the_docs_name_exists():
    import typer.main

    from peftarray.cli import app

    command = typer.main.get_command(app)
    known = {name for sub in command.commands.values() for parameter in sub.params for name in parameter.opts}
    for page in ("README.md", "docs/merging.md", "docs/combining.md", "docs/quantisation.md"):
        named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", (ROOT / page).read_text(encoding="utf-8")))
        assert named <= known | {"--help"}, page
