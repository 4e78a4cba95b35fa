"""What every refusal must look like: one line on standard error, its exit status, and nothing written anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree

import peftarray
from peftarray.cli import main

# Tests run on an installed wheel or on the tree; a child process must find the same package.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(peftarray.__file__).parents[1])}


class CommandLine:
    """`peftarray` called in this process, as its entry point calls it.

    Attributes:
        status: exit status of the last call.
        out, err: what it wrote.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self.status: int = -1
        self.out = self.err = ""

    def __call__(self, *arguments: Any) -> int:
        self._monkeypatch.setattr(sys, "argv", ["peftarray", *map(str, arguments)])
        self._capsys.readouterr()
        try:
            main()
            self.status = 0
        except SystemExit as end:
            self.status = end.code if isinstance(end.code, int) else int(bool(end.code))
        self.out, self.err = self._capsys.readouterr()
        return self.status

    def refuses(self, place: Path, *arguments: Any, words: tuple[str, ...], status: int = 1) -> str:
        """Assert that a merge is refused as it must be, and that everything below `place` stays as it is."""
        before = tree(place)
        assert self("merge", *arguments) == status, (self.status, self.out, self.err)
        line = one_line(self.err, words)
        assert not self.out
        assert tree(place) == before
        return line


def one_line(err: str, words: tuple[str, ...]) -> str:
    """The only line of `err`, which holds all of `words`."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("peftarray: ")
    assert "Traceback" not in err
    for word in words:
        assert word.lower() in err.lower(), (word, err)
    return lines[0]


def run_process(*arguments: Any, limit: int = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    """`peftarray` in a process of its own."""
    command = [sys.executable, "-m", "peftarray", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit, check=False, **options
    )
