"""docs/write-your-own-method.md: its code runs, and the command line merges the method as a package announces it."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import peftarray
from peftarray.demo import accuracy, held_out
from peftarray.stores.checkpoint import Checkpoint

PAGE = (Path(__file__).parent.parent / "docs" / "write-your-own-method.md").read_text(encoding="utf-8")
ASSETS = Path(str(files("peftarray.demo"))) / "assets"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the page would be: its files, the base, and what its code wrote."""
    place = tmp_path_factory.mktemp("own")
    shutil.copytree(ASSETS / "base", place / "BASE")
    for name, _, text in re.findall(r"^`([\w.-]+)`:\n\n```(\w+)\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE):
        (place / name).write_text(text, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def trained(folder):
    """The folder after the page's code has run, in a process of its own."""
    code = "\n".join(re.findall(r"(?<!:\n\n)```python\n(.*?)```", PAGE, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"read rightly: \d+% before, \d+% after training\n", done.stdout)
    return folder


def environment(*paths: Path) -> dict[str, str]:
    """For a process that finds these folders, the package under test, and no user's settings."""
    package = Path(peftarray.__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, package)))}


def python(folder: Path, code: str, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def announce(folder: Path, text: str) -> None:
    """What an installer would write for the package of the page."""
    info = folder / "core_method-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: core-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(text)


def command(folder: Path, *arguments: str, on_path: bool = True) -> subprocess.CompletedProcess[str]:
    # The working folder would be on the path of imports by itself.
    env = environment(*([folder] if on_path else [])) | {"PYTHONSAFEPATH": "1"}
    return python(folder, "from peftarray.cli import main; main()", env, *arguments)


def announced() -> str:
    points = tomllib.loads(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL).group(1))["project"]["entry-points"]
    return "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for group, each in points.items())


def test_the_page_runs_and_the_command_line_merges_its_method(trained):
    announce(trained, announced())
    for line in re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL).group(1).splitlines():
        if line.startswith("peftarray "):
            done = command(trained, *line.split()[1:])
            assert done.returncode == 0, done.stderr
    assert "CORE" in command(trained, "inspect", "my-adapter").stdout
    with Checkpoint.open(trained / "my-adapter" / "adapter_model.safetensors") as tensors:
        numbers = sum(math.prod(info.shape) for name, info in tensors.items() if name.endswith("core_C"))
    assert f"{numbers} numbers in all" in " ".join(PAGE.split())
    images, labels = held_out(ASSETS)
    turned = images.transpose(0, 2, 1)[:, ::-1]
    assert accuracy(trained / "OUT", turned, labels) > accuracy(trained / "BASE", turned, labels) + 0.5


def test_a_method_that_is_not_installed_is_an_error(trained):
    done = command(trained, "inspect", "my-adapter", on_path=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "peft_type is 'CORE'; known are ADALORA" in done.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("core_method:NoSuchConfig", "cannot be imported"),
        ("no_such_module:CoreConfig", "cannot be imported"),
        ("core_method:LowRank", "whose peft_type is None"),
        ("pathlib:Path", "whose peft_type is None"),
    ],
)
def test_a_broken_announcement_is_an_error(trained, target, message):
    announce(trained, f"[peftarray.methods]\nCORE = {target}\n")
    done = command(trained, "inspect", "my-adapter")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert "CORE" in done.stderr


def test_the_methods_of_the_package_stay_its_own(trained):
    announce(trained, "[peftarray.methods]\nLORA = core_method:CoreConfig\n")
    program = "import peftarray; print(peftarray.METHODS['LORA'].__name__)"
    done = python(trained, program, environment(trained))
    assert done.stdout == "LoraConfig\n", done.stderr
