"""Merging against PEFT's own merge, for drawn architectures and configurations."""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_draws import lora_settings
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "resnet"])
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_merges_to_what_peft_merges(bases, name, data):
    base = bases(name, sharded=data.draw(st.booleans(), label="sharded"))
    config = peft.LoraConfig(**data.draw(lora_settings(base), label="config"))
    half = data.draw(st.sampled_from([None, None, "bfloat16", "float16"]), label="stored in")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        live = adapt(base, config, folder / "adapter")
        if half:
            live = store_in_half(base, folder / "adapter", half)
        wanted = live_outputs(live, base)

        report = pa.merge(base.folder, folder / "adapter", folder / "out")

        reference = merged_by_peft(live, folder / "reference")
        assert_same_weights(report, base.folder, folder / "out", reference)
        # The largest scales that are drawn make T5 multiply a rounding error by a thousand.
        tolerance = 1e-3 if name == "t5" else 1e-4
        assert_same_outputs(loaded_outputs(base, folder / "out"), wanted, tolerance=tolerance)
        assert_config(base.folder, folder / "out")
