"""What may import what: the package's arrows run one way, and no array library loads before somebody asks for it."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# Each part of the package, and the parts that it stands on: a part may import those and whatever they stand on.
# `peftarray` is the package's own `__init__`. Parts that are not written yet have their place already.
STANDS_ON = {
    "allocation": "",
    "errors": "",
    "arrays": "errors",
    "backend": "arrays",
    "trees": "",
    "gradients": "arrays trees",
    "draws": "arrays",
    "dtypes": "errors",
    "patterns": "errors",
    "settings": "errors",
    "random": "arrays dtypes",
    "layers": "arrays",
    "rotations": "arrays",
    "autodiff": "gradients",
    "stores": "dtypes",
    "quant": "arrays settings stores",
    "routes": "arrays",
    "stand_in": "routes",
    "widened": "stand_in",
    "quantised_weight": "autodiff backend quant stand_in",
    "method_dropout": "layers",
    "adapter": "method_dropout widened",
    "composition": "adapter",
    "adapted_weight": "composition",
    "method": "adapter patterns random settings",
    "method_kinds": "method",
    "methods": "method_kinds rotations",
    "slots": "method_kinds",
    "inits": "methods quant",
    "prompts": "autodiff method",
    "targets": "prompts",
    "formats": "methods prompts targets stores quant",
    "combining": "formats inits",
    "mixed": "adapted_weight slots",
    "stacked_weight": "mixed",
    "model": "backend combining draws quantised_weight stacked_weight trees",
    "quantising": "model quantised_weight trees",
    "models": "autodiff model quantising stores",
    "quantised_start": "inits model quantising stores",
    "zero_points": "adapter methods quantised_weight",
    "training": "allocation backend draws gradients model trees",
    "merging": "backend formats",
    "inspection": "formats",
    "plots": "inspection",
    "testing": "formats",
    "peftarray": "autodiff combining inspection merging models quantised_start testing training zero_points",
    "demo": "peftarray",
    "cli": "allocation demo plots",
    "__main__": "cli",
}

# NumPy is one of them: a method computes with the arrays that it is given, whatever made them.
ARRAY_LIBRARIES = {"numpy", "cupy", "torch", "jax", "array_api_strict", "dask", "mlx", "tensorflow"}
STANDARD_SHIMS = {"array_api_compat", "array_api_extra"}
NEVER_LOADED = ["torch", "jax", "cupy", "transformers", "peft", "matplotlib"]

PACKAGE = Path(importlib.util.find_spec("peftarray").origin).parent
# In a wheel the backends lie inside the package; they may import anything above them.
FILES = {
    ".".join(["peftarray", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] != "backends"
}


class Import(NamedTuple):
    """That a module imports another; `runs` is whether it happens when the program runs, or for type checkers alone."""

    module: str
    line: int
    name: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.name}"


def part_of(module: str) -> str:
    """`peftarray.stores.checkpoint` is in the part `stores`; `peftarray` itself is `peftarray`."""
    return module.split(".")[1] if "." in module else module


def nodes(tree: ast.AST, runs: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node beneath `tree`, and whether it runs: what stands under `if TYPE_CHECKING` does not."""
    for field, value in ast.iter_fields(tree):
        guarded = isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING") and field == "body"
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield node, runs and not guarded
                yield from nodes(node, runs and not guarded)


def imports(module: str, path: Path) -> Iterator[Import]:
    """What a file imports, at its top or within a function."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, runs in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(module, node.lineno, alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                is_module = full in FILES or full == "peftarray.backends"
                yield Import(module, node.lineno, full if is_module else source, runs)


IMPORTS = [found for module, path in FILES.items() for found in imports(module, path)]


def below(part: str) -> set[str]:
    """The parts that a part may import, itself included."""
    return {part}.union(*(below(other) for other in STANDS_ON[part].split()))


def refuse(found: list[Import]) -> None:
    assert not found, "\n".join(map(str, found))


def test_files_were_read():
    assert {"peftarray", "peftarray.errors", "peftarray.arrays", "peftarray.methods.lora"} <= set(FILES)
    assert ("peftarray.layers", "peftarray.arrays") in {(found.module, found.name) for found in IMPORTS}


def test_no_arrow_runs_backwards():
    graphlib.TopologicalSorter({part: others.split() for part, others in STANDS_ON.items()}).prepare()
    without_a_place = {part_of(module) for module in FILES} - set(STANDS_ON)
    assert not without_a_place, f"give them a place in STANDS_ON: {sorted(without_a_place)}"
    inside = [found for found in IMPORTS if found.runs and found.name.split(".")[0] == "peftarray"]
    refuse([found for found in inside if part_of(found.name) not in below(part_of(found.module))])


def test_backends_are_imported_by_name_alone():
    refuse([found for found in IMPORTS if found.name.startswith("peftarray.backends")])


def test_every_announced_backend_is_installed():
    announced = importlib.metadata.entry_points(group="peftarray.backends")
    assert announced
    missing = [point.value for point in announced if importlib.util.find_spec(point.module) is None]
    assert not missing, f"no such module: {missing}"


def test_no_method_names_an_array_library():
    of_methods = [found for found in IMPORTS if part_of(found.module) == "methods"]
    assert of_methods
    refuse([found for found in of_methods if found.name.split(".")[0] in ARRAY_LIBRARIES])


def test_one_module_knows_how_the_libraries_differ():
    shims = [found for found in IMPORTS if found.name.split(".")[0] in STANDARD_SHIMS]
    assert shims
    refuse([found for found in shims if found.module != "peftarray.arrays"])


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import peftarray", id="import"),
        pytest.param("sys.argv = ['peftarray', '--help']; import peftarray.cli; peftarray.cli.main()", id="help"),
        # It merges, verifies and reports: the main job from end to end.
        pytest.param("sys.argv = ['peftarray', 'demo']; import peftarray.cli; peftarray.cli.main()", id="demo"),
    ],
)
def test_nothing_heavy_is_loaded(program, tmp_path):
    probe = f"""
import json, sys
try:
    {program}
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = sorted({{name.split(".")[0] for name in sys.modules}})
open("loaded.json", "w").write(json.dumps(loaded))
"""
    # Not in the checkout, whose folder would be found before what is installed.
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = json.loads((tmp_path / "loaded.json").read_text())
    assert "peftarray" in loaded
    assert [name for name in NEVER_LOADED if name in loaded] == []


def test_a_merge_loads_no_training(tmp_path):
    probe = "import sys, peftarray; peftarray.merge; print(*(m for m in sys.modules if m.startswith('peftarray.')))"
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in run.stdout.split()}
    assert "merging" in loaded
    assert not loaded & {"autodiff", "models", "prompts", "training"}
