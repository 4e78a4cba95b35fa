"""Every method against PEFT, over drawn layers and settings: counts, merged weights, outputs, and files both ways.

What is drawn for a method stands in `draws/`. Where PEFT's unmerged model disagrees with its own merge, the merge
counts.
"""

from __future__ import annotations

import copy
import importlib
import json
import pkgutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

import peftarray as pa

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")

from . import draws  # noqa: E402
from .layers import NAMES, Model, models  # noqa: E402

METHODS = [importlib.import_module(f"{draws.__name__}.{found.name}") for found in pkgutil.iter_modules(draws.__path__)]
CASES = [pytest.param(method, kind, id=f"{method.PEFT}-{kind}") for method in METHODS for kind in method.KINDS]
# What PEFT raises for settings and layers that it does not take.
REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError)


@contextmanager
def quiet() -> Iterator[None]:
    """For calls of other people's code: PEFT warns of what a configuration does, and that is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted(model: Model, config: Any, folder: Path) -> Any:
    """A live PEFT model with every trained parameter moved from its first value, saved to a folder."""
    draw = torch.Generator().manual_seed(1)
    with quiet():
        live = peft.get_peft_model(copy.deepcopy(model.module), config)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
        live.eval().save_pretrained(folder)
    return live


def attempt(act: Callable[[], Any]) -> Any:
    """What `act` returns, or None if PEFT cannot do it."""
    try:
        with quiet():
            return act()
    except REFUSALS:
        return None


def count(adapters: Any) -> int:
    """Trained numbers, those that layers share once."""
    found = {}
    for module, adapter in adapters.items():
        for name, row in adapter.config.params(adapter.layer).items():
            if not row.frozen:
                found[row.shared or (module, name)] = int(np.prod(adapter.params[name].shape))
    return sum(found.values())


def all_close(some: Any, others: Any) -> bool:
    return all(map(torch.allclose, some, others))


def close(ours: np.ndarray, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    """Equal to `tolerance` of the largest entry."""
    reference = wanted.detach().double().numpy()
    assert ours.shape == reference.shape, what
    off = np.abs(ours - reference).max(initial=0)
    assert off <= tolerance * np.abs(reference).max(initial=0), f"{what} is off by {off:.3g}"


def same_files(ours: Path, theirs: Path) -> None:
    """The same tensors, bit for bit, and the same settings in the fields that we know."""
    one, other = (safetensors.load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key
    mine, his = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs))
    for field, value in mine.items():
        expected = his[field]
        if field in ("rank_pattern", "alpha_pattern"):
            value, expected = value or {}, expected or {}
        assert (sorted(value) if field == "target_modules" and isinstance(value, list) else value) == (
            sorted(expected) if field == "target_modules" and isinstance(expected, list) else expected
        ), field


@pytest.mark.parametrize(("method", "kind"), CASES)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_peft_agrees(method: ModuleType, kind: str, data: st.DataObject):
    model = data.draw(models(kind), label="model")
    targets = data.draw(st.sampled_from(["first", ["first", "second"], [NAMES[1]], r"block\..*"]), label="targets")
    chosen = method.kwargs(data.draw, kind) | {"target_modules": [targets] if targets == "first" else targets}
    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = Path(temporary) / "peft", Path(temporary) / "peftarray"
        live = attempt(lambda: adapted(model, getattr(peft, method.PEFT)(**chosen), theirs))
        if live is None:
            event("PEFT refuses")
            assume(False)
        weights = model.tensors(np.float64)
        exact = copy.deepcopy(live).double()
        merged = attempt(lambda: copy.deepcopy(exact).merge_and_unload())
        unmerged = attempt(lambda: exact(*model.inputs(torch.float64)))
        try:
            loaded = pa.load_adapters(theirs, weights, layers=model.described())
        except pa.PeftError:
            assert merged is None
            event("nobody can merge it")
            return

        assert count(loaded.adapters) == live.get_nb_trainable_parameters()[0]
        if merged is not None:
            outputs = merged(*model.inputs(torch.float64))
        else:
            outputs = None if model.is_dilated else unmerged  # PEFT's convolutions pass over dilation until merged
        event(f"PEFT merges: {merged is not None}, and agrees: {attempt(lambda: all_close(unmerged, outputs))}")
        for name, adapter in loaded.adapters.items():
            weight, bias, place = weights[f"{name}.weight"], weights.get(f"{name}.bias"), NAMES.index(name)
            if merged is not None:
                reference = merged.get_submodule(name)
                close(adapter.merge(weight), reference.weight, 1e-6, f"the merged weight of {name}")
                if bias is not None:
                    close(adapter.merge_bias(bias, weight), reference.bias, 1e-6, f"the merged bias of {name}")
            if outputs is not None:
                y = adapter.forward(model.inputs(torch.float64)[place].numpy(), weight, bias=bias)
                close(y, outputs[place], 1e-5, f"the output of {name}")

        found = pa.load_adapters(theirs, model.tensors(np.float32), layers=model.described())
        pa.save_adapters(ours, found.config, found.adapters)
        same_files(ours, theirs)
        with quiet():
            again = peft.PeftModel.from_pretrained(copy.deepcopy(model.module), ours).eval()
        before, after = (attempt(lambda m=m: m(*model.inputs(torch.float32))) for m in (live, again))
        assert (before is None) == (after is None)
        assert before is None or all(map(torch.equal, before, after))
