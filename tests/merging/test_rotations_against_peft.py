"""Merging OFT and BOFT against PEFT's own merge: linear layers, convolutions and embeddings, drawn configurations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    store_in_half,
)

import peftarray as pa

from ..against_peft.draws import boft, oft

LINEAR = {
    "llama": ["q_proj", "v_proj", "down_proj", "lm_head"],
    "bert": ["query", "intermediate.dense", "classifier"],
    "resnet": ["embedder.convolution", "0.convolution", "1.convolution", "shortcut.convolution", "classifier.1"],
    "convolutions": ["point", "down", "up"],
}
EMBEDDINGS = {"llama": ["embed_tokens"], "bert": ["word_embeddings"], "resnet": [], "convolutions": ["tokens"]}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("method", [oft, boft], ids=["oft", "boft"])
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_rotation_merges_to_what_peft_merges(bases, name: str, method: ModuleType, data: st.DataObject):
    base = bases(name, sharded=data.draw(st.booleans(), label="sharded"))
    pool = LINEAR[name] + (EMBEDDINGS[name] if method is oft else [])
    chosen = method.kwargs(data.draw, "linear") | {
        "target_modules": data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True)),
        "bias": data.draw(st.sampled_from(["none", "all", f"{method.__name__.rpartition('.')[2]}_only"])),
    }
    if method is boft and chosen["boft_block_size"] == 2:
        chosen["boft_block_size"] = data.draw(st.sampled_from([2, 3, 4, 8]))
    half = data.draw(st.sampled_from([None, None, "bfloat16", "float16"]), label="stored in")
    with tempfile.TemporaryDirectory() as temporary, quiet():
        folder = Path(temporary)
        try:
            live = adapt(base, getattr(peft, method.PEFT)(**chosen), folder / "adapter")
        except ValueError as error:  # BOFT's blocks must divide the inputs of every layer
            if "must be divisible by boft_block" not in str(error):
                raise
            reject()
        if half:
            live = store_in_half(base, folder / "adapter", half)
        wanted = live_outputs(live, base)

        report = pa.merge(base.folder, folder / "adapter", folder / "out")

        reference = merged_by_peft(live, folder / "reference")
        assert_same_weights(report, base.folder, folder / "out", reference)
        assert report.applied == report.given
        # PEFT's unmerged OFT adds up the overlapping patches of larger kernels.
        if method is boft or not any("convolution" in target for target in chosen["target_modules"]):
            assert_same_outputs(loaded_outputs(base, folder / "out"), wanted)
        if name != "convolutions":
            assert_config(base.folder, folder / "out")


def test_a_series_that_peft_cut_off_otherwise_is_refused(bases, tmp_path):
    """PEFT before 0.18 wrote no version, and took the last power twice."""
    base, folder = bases("llama"), tmp_path / "adapter"
    adapt(base, peft.OFTConfig(target_modules=["q_proj"]), folder)
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    for version in (None, "0.17.1"):
        file.write_text(json.dumps(values | {"peft_version": version}))
        with pytest.raises(pa.UnsupportedError, match=r"before 0\.18 PEFT cut the series off otherwise"):
            pa.merge(base.folder, folder, tmp_path / "out")
    file.write_text(json.dumps(values | {"peft_version": None, "use_cayley_neumann": False}))
    pa.merge(base.folder, folder, tmp_path / "out")


def test_the_first_oft_of_peft_is_refused(bases, tmp_path):
    base, folder = bases("llama"), tmp_path / "adapter"
    adapt(base, peft.OFTConfig(target_modules=["q_proj"]), folder)
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    del values["oft_block_size"]
    file.write_text(json.dumps(values | {"r": 8}))
    with pytest.raises(pa.ConfigError, match=r"of PEFT before 0\.14"):
        pa.merge(base.folder, folder, tmp_path / "out")


def test_several_factors_are_those_of_peft_s_kernel(tmp_path):
    """PEFT multiplies them as dense matrices where it has its kernel; here from its own permutations and rotations."""
    from peft.tuners.boft.layer import BOFTLayer

    torch.manual_seed(0)
    for factors, blocks, size in [(2, 4, 4), (3, 4, 2), (3, 12, 6), (4, 8, 4), (2, 2, 72), (4, 16, 32), (7, 64, 4)]:
        n, numbers = blocks * size, torch.randn(factors, blocks, size, size, dtype=torch.float64)
        gain, weight = torch.randn(7, 1, dtype=torch.float64) + 2, torch.randn(7, n, dtype=torch.float64)
        rotations = BOFTLayer.cayley_batch(None, numbers.reshape(-1, size, size)).reshape(numbers.shape)
        product = torch.eye(n, dtype=torch.float64)
        for level in range(factors):
            order = BOFTLayer.block_butterfly_perm(None, n, blocks >> level, size // 2, factors - 1)
            swap = BOFTLayer.perm2mat(None, order).double()
            product = swap @ torch.block_diag(*rotations[level]) @ swap.T @ product

        config = pa.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors)
        adapter = pa.Adapter(config, pa.Layer("", "linear", (7, n)), {"boft_R": numbers, "boft_s": gain})
        torch.testing.assert_close(adapter.merge(weight), (product @ weight.T).T * gain, rtol=0, atol=1e-12)
        x = torch.randn(2, 3, n, dtype=torch.float64)
        torch.testing.assert_close(adapter.forward(x, weight), x @ adapter.merge(weight).T, rtol=0, atol=1e-11)
