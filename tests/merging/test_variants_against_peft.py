"""What PEFT makes of LoRA: block-diagonal factors, KaSA, initial values, training aids, and a change of the base."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peft_oracle import (
    adapt,
    assert_config,
    assert_same_outputs,
    assert_same_weights,
    live_outputs,
    loaded_outputs,
    merged_by_peft,
    quiet,
    train,
)

import peftarray as pa

PROJECTIONS = ["q_proj", "gate_proj", "o_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "block-diagonal": {
        "use_bdlora": peft.BdLoraConfig(
            target_modules_bd_a=["q_proj", "gate_proj"], target_modules_bd_b=["o_proj", "down_proj"], nblocks=2
        ),
        "target_modules": PROJECTIONS,
        "rank_pattern": {"o_proj": 6},
    },
    "block-diagonal-in-part": {
        "use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["layers.1"], nblocks=4, match_strict=False),
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
    },
    "kasa": {"kasa_config": peft.KasaConfig(), "target_modules": PROJECTIONS},
    "kasa-by-rank": {
        "kasa_config": peft.KasaConfig(),
        "target_modules": ["v_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 7},
    },
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj", "embed_tokens"]},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": PROJECTIONS},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(), "target_modules": PROJECTIONS},
    "velora": {"velora_config": peft.VeloraConfig(num_groups=4), "target_modules": PROJECTIONS},
    "monteclora": {"monteclora_config": peft.MontecloraConfig(), "target_modules": PROJECTIONS},
    "dropout": {"lora_dropout": 0.3, "target_modules": PROJECTIONS, "use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_update(bases, tmp_path, variant):
    base = bases("llama")
    live = adapt(base, peft.LoraConfig(r=4, lora_alpha=6, **VARIANTS[variant]), tmp_path / "adapter")
    wanted = live_outputs(live, base)
    report = pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    reference = merged_by_peft(live, tmp_path / "reference")
    # KaSA decomposes the base in float32, here and there, by different libraries.
    tolerance = 4e-6 if "kasa" in variant else 1e-6
    assert_same_weights(report, base.folder, tmp_path / "out", reference, tolerance=tolerance)
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), wanted)
    assert_config(base.folder, tmp_path / "out")
    assert report.applied == report.given


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_was_converted_to_the_original_base(bases, tmp_path, init, rslora):
    """These change the base before training; PEFT can save an adapter of twice the rank for the base as it was."""
    base = bases("llama")
    config = peft.LoraConfig(
        r=3,
        init_lora_weights=init,
        use_rslora=rslora,
        target_modules=PROJECTIONS,
        rank_pattern={} if rslora else {"q_proj": 2},
    )
    with quiet():
        live = peft.get_peft_model(base.fresh(), config)
        live.peft_config["default"].init_lora_weights = True
        live.save_pretrained(tmp_path / "initial")
        live.peft_config["default"].init_lora_weights = init
        train(live)
        live.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert_same_outputs(loaded_outputs(base, tmp_path / "out"), live_outputs(live, base))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_to_a_base_that_is_in_no_file_is_refused(bases, tmp_path, init):
    base = bases("llama")
    adapt(base, peft.LoraConfig(r=3, init_lora_weights=init, target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(pa.UnsupportedError, match=f"init_lora_weights is '{init}'.*convert"):
        pa.merge(base.folder, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
