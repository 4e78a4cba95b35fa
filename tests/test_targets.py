"""Which modules a configuration targets: by the rules, and as PEFT itself decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftarray import ConfigError, LoraConfig, MatchError
from peftarray.targets import is_targeted, targeted

MODULES = [
    f"model.layers.{i}.{part}"
    for i in range(12)
    for part in ("self_attn.q_proj", "self_attn.xq_proj", "mlp.down_proj", "mlp.gate")
] + ["layers.1.q_proj", "q_proj", "lm_head", "score", "model.embed_tokens", "encoder.blocks.2.q_proj"]

TARGETS = st.one_of(
    st.lists(st.sampled_from(["q_proj", "down_proj", "layers.1.q_proj", "1.self_attn.q_proj", "q_proj.x", "lm_head"])),
    st.sampled_from([r".*q_proj", r"model\.layers\.\d+\.mlp\.(down_proj|gate)", "q_proj", r".*\.1\..*"]),
)
EXCLUDED = st.one_of(
    st.none(), st.lists(st.sampled_from(["layers.2.mlp.gate", "q_proj", "lm_head"])), st.just(r".*\.1\..*")
)


@settings(max_examples=150)
@given(
    target=TARGETS,
    excluded=EXCLUDED,
    layers=st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 11))),
    pattern=st.sampled_from([None, "layers", ["blocks", "layers"]]),
)
def test_peft_decides_alike(target, excluded, layers, pattern):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTuner

    layers = None if isinstance(target, str) else layers
    pattern = None if layers is None else pattern
    ours = LoraConfig(
        target_modules=target, exclude_modules=excluded, layers_to_transform=layers, layers_pattern=pattern
    )
    theirs = peft.LoraConfig(
        target_modules=target, exclude_modules=excluded, layers_to_transform=layers, layers_pattern=pattern
    )
    for name in MODULES:
        # PEFT answers with a match, a marker of exclusion, or a bool; only a true match adapts.
        answer = BaseTuner._check_target_module_exists(theirs, name)
        adapted = bool(answer) and type(answer).__name__ != "_ExcludedModule"
        assert is_targeted(name, ours) == adapted, name


def test_saved_modules_are_not_adapted():
    config = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    assert targeted(MODULES, config) == [name for name in MODULES if name.split(".")[-1] == "q_proj"]


def test_all_linear_leaves_heads_out():
    assert targeted(["a", "lm_head"], LoraConfig(target_modules="all-linear"), heads=["lm_head"]) == ["a"]


def test_a_target_that_matches_nothing_is_an_error_with_neighbours():
    with pytest.raises(MatchError, match=r"matches none of \d+ modules; nearest: .*q_proj"):
        targeted(MODULES, LoraConfig(target_modules=["q_prj"]))


def test_no_target_is_an_error():
    with pytest.raises(ConfigError, match="target_modules is None"):
        targeted(MODULES, LoraConfig())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("r", 0, "at least 1"),
        ("r", True, "at least 1"),
        ("r", "8", "at least 1"),
        ("lora_alpha", float("nan"), "finite number"),
        ("lora_alpha", None, "finite number"),
        ("bias", "some", "one of 'none', 'all', 'lora_only'"),
        ("use_dora", 1, "True or False"),
        ("rank_pattern", {"q": 0}, "at least 1"),
        ("rank_pattern", ["q"], "a mapping"),
        ("target_modules", 3, "a pattern"),
        ("target_parameters", "x", "a list of names"),
        ("init_lora_weights", "magic", "True, False, or one of"),
        ("trainable_token_indices", [-1], "token numbers"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(field, value, words):
    with pytest.raises(ConfigError, match=field) as caught:
        LoraConfig(**{field: value})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_contradict_each_other():
    with pytest.raises(ConfigError, match="lora_bias and use_dora"):
        LoraConfig(lora_bias=True, use_dora=True)
    with pytest.raises(ConfigError, match="needs target_modules as a list"):
        LoraConfig(target_modules=".*q", layers_to_transform=[1])
    with pytest.raises(ConfigError, match="without layers_to_transform"):
        LoraConfig(target_modules=["q"], layers_pattern="layers")
