"""Merging LoHa and LoKr against PEFT's own merge: linear layers and convolutions, drawn configurations."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    store_in_half,
)

import peftarray as pa

from ..against_peft.draws import loha, lokr

# Ends of names of modules that both methods take. Any kind may be drawn, since a module has one of them.
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "resnet": ["convolution", "classifier.1"],
    "convolutions": ["line", "plane", "point", "down", "up"],
}


def ends(name: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(TARGETS[name]), min_size=1, max_size=3, unique=True)


@st.composite
def patterns(draw: st.DrawFn, name: str, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """In the order of the file, whose keys are sorted: the first match counts."""
    keys = st.sampled_from([*TARGETS[name], *(".*" + end for end in TARGETS[name])])
    return dict(sorted(draw(st.dictionaries(keys, values, max_size=2)).items()))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("method", [loha, lokr], ids=["loha", "lokr"])
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_product_merges_to_what_peft_merges(bases, name: str, method: ModuleType, data: st.DataObject):
    base = bases(name, sharded=data.draw(st.booleans(), label="sharded"))
    chosen = method.kwargs(data.draw, "conv2d") | {
        "target_modules": data.draw(ends(name)),
        "rank_pattern": data.draw(patterns(name, st.integers(2, 5))),
        "alpha_pattern": data.draw(patterns(name, st.sampled_from([0.5, 2, 7]))),
    }
    half = data.draw(st.sampled_from([None, None, "bfloat16", "float16"]), label="stored in")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        live = adapt(base, getattr(peft, method.PEFT)(**chosen), folder / "adapter")
        if half:
            live = store_in_half(base, folder / "adapter", half)
        wanted = live_outputs(live, base)

        report = pa.merge(base.folder, folder / "adapter", folder / "out")

        reference = merged_by_peft(live, folder / "reference")
        assert_same_weights(report, base.folder, folder / "out", reference)
        assert report.applied == report.given
        assert_same_outputs(loaded_outputs(base, folder / "out"), wanted)
        if name != "convolutions":
            assert_config(base.folder, folder / "out")
