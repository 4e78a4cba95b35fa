"""Bad settings of every method: an error that names the field, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from peftarray import METHODS, ConfigError, MatchError, UnsupportedError
from peftarray.formats.peft_config import config_from_dict, config_to_dict
from peftarray.targets import targeted

CLASSES = list(METHODS.values())
every_method = pytest.mark.parametrize("method", CLASSES, ids=[method.__name__ for method in CLASSES])
JUNK = (
    0,
    -1,
    2,
    1.5,
    -0.5,
    math.nan,
    math.inf,
    True,
    None,
    "junk",
    b"junk",
    [0],
    ["junk", 3],
    [-1],
    {"x": "junk"},
    {3: 4},
)
# Method, settings, and what the message must hold.
REFUSED = [
    ("LORA", {"r": 0}, "LoraConfig.r is 0; it must be a whole number of at least 1"),
    ("LORA", {"r": 2.0}, "LoraConfig.r is 2.0; it must be a whole number of at least 1"),
    ("LORA", {"lora_alpha": math.nan}, "LoraConfig.lora_alpha is nan; it must be a finite number"),
    ("LORA", {"lora_dropout": 1.5}, "LoraConfig.lora_dropout is 1.5; it must be a number from 0 to 1"),
    ("LORA", {"bias": "some"}, "LoraConfig.bias is 'some'; it must be one of 'none', 'all', 'lora_only'"),
    ("LORA", {"rank_pattern": {"q": 0}}, "LoraConfig.rank_pattern is {'q': 0}; it must be None or a mapping"),
    (
        "LORA",
        {"init_lora_weights": "zero"},
        "LoraConfig.init_lora_weights is 'zero'; it must be True, False, or",
    ),
    ("LORA", {"layers_pattern": "layers"}, "LoraConfig.layers_pattern is 'layers' without layers_to_transform"),
    ("LORA", {"target_modules": "q", "layers_to_transform": 1}, "layers_to_transform needs target_modules as a list"),
    ("LORA", {"lora_bias": True, "use_dora": True}, "lora_bias and use_dora are both True; choose one"),
    ("LOHA", {"r": 0}, "LoHaConfig.r is 0; it must be a whole number of at least 1"),
    ("LOHA", {"rank_dropout": -0.1}, "LoHaConfig.rank_dropout is -0.1; it must be a number from 0 to 1"),
    ("LOKR", {"r": 0}, "LoKrConfig.r is 0; it must be a whole number of at least 1"),
    ("LOKR", {"decompose_factor": 1.5}, "LoKrConfig.decompose_factor is 1.5; it must be a whole number"),
    (
        "LOKR",
        {"init_weights": "lycorys"},
        "LoKrConfig.init_weights is 'lycorys'; it must be one of True, False",
    ),
    ("OFT", {"r": 4}, "OFTConfig.r is 4 and oft_block_size 32; one must be 0"),
    ("OFT", {"oft_block_size": 0}, "OFTConfig.r is 0 and oft_block_size 0; one must be 0"),
    ("OFT", {"eps": -1e-5}, "OFTConfig.eps is -1e-05; it must be a finite number of at least 0"),
    ("OFT", {"num_cayley_neumann_terms": 0}, "OFTConfig.num_cayley_neumann_terms is 0; it must be a whole number"),
    ("BOFT", {"boft_block_num": 4}, "BOFTConfig.boft_block_size is 4 and boft_block_num 4"),
    ("BOFT", {"boft_n_butterfly_factor": 0}, "BOFTConfig.boft_n_butterfly_factor is 0; it must be a whole number"),
    ("VERA", {"r": 0}, "VeraConfig.r is 0; it must be a whole number of at least 1"),
    (
        "VERA",
        {"projection_prng_key": 2**64},
        "VeraConfig.projection_prng_key is 18446744073709551616; it must",
    ),
    ("ADALORA", {"init_r": 0}, "AdaLoraConfig.init_r is 0; it must be a whole number of at least 1"),
    ("ADALORA", {"beta1": 1}, "AdaLoraConfig.beta1 is 1; it must be a number between 0 and 1"),
    ("ADALORA", {"total_step": 5, "tinit": 3, "tfinal": 2}, "AdaLoraConfig has total_step 5, tinit 3 and tfinal 2"),
    (
        "ADALORA",
        {"rank_pattern": {"q.lora_E": [True]}},
        "AdaLoraConfig.rank_pattern has 1 entries for q.lora_E",
    ),
    ("IA3", {"target_modules": ["q"], "feedforward_modules": ["fc"]}, "IA3Config.feedforward_modules names 'fc'"),
    ("TRAINABLE_TOKENS", {"token_indices": [-1]}, "TrainableTokensConfig.token_indices is [-1]; it must be a list"),
]
# Method, settings, shape of a weight that its blocks do not fit, and what the message must hold.
DO_NOT_FIT = [
    ("BOFT", {"boft_block_size": 4}, (6, 10), "boft_block_size"),
    ("BOFT", {"boft_block_size": 0, "boft_block_num": 3}, (6, 10), "boft_block_num"),
    ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, (6, 12), "boft_n_butterfly_factor"),
    ("LORA", {"r": 4, "use_bdlora": {"target_modules_bd_a": ["proj"], "nblocks": 3}}, (6, 10), "use_bdlora"),
    ("LORA", {"r": 4, "use_bdlora": {"target_modules_bd_b": ["proj"], "nblocks": 3}}, (6, 10), "use_bdlora"),
    ("TRAINABLE_TOKENS", {"token_indices": [1, 6]}, (6, 10), "token_indices"),
    ("TRAINABLE_TOKENS", {"token_indices": [1, 1]}, (6, 10), "token_indices"),
]


def named(kind, settings):
    return f"{kind.lower()}-{'-'.join(settings)}"


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED, ids=[named(*row[:2]) for row in REFUSED])
def test_a_value_is_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        METHODS[kind](**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "shape", "field"), DO_NOT_FIT, ids=[named(k, s) for k, s, *_ in DO_NOT_FIT]
)
def test_a_layer_that_blocks_do_not_fit_is_refused(kind, settings, shape, field):
    with pytest.raises(ConfigError, match=field) as caught:
        METHODS[kind](**settings).init(np.ones(shape, np.float32), name="block.0.proj")
    assert "block.0.proj" in str(caught.value)


@every_method
def test_every_field_refuses_what_its_rule_does_not_allow(method):
    for field in dataclasses.fields(method):
        rule = field.metadata.get("rule")
        for value in JUNK if rule is not None else ():
            if not rule.allows(value):
                message = f"{method.__name__}.{field.name} is {value!r}; it must be {rule.words}"
                with pytest.raises(ConfigError, match=re.escape(message)):
                    method(**{field.name: value})


@every_method
def test_a_field_that_is_refused_says_why(method):
    for field in dataclasses.fields(method):
        if "refused" in field.metadata:
            with pytest.raises(UnsupportedError, match=re.escape(field.metadata["refused"])):
                method(**{field.name: True})


@every_method
def test_an_unknown_field_is_refused_by_name(method):
    known = config_to_dict(method())
    assert config_from_dict(known, "a file") is not None
    nearly = next(name for name in known if name.startswith("target_"))
    for name in ("surprise", nearly[:-1]):
        with pytest.raises(ConfigError, match=rf"a file: {method.__name__} has no field '{name}' here.*set to '7'"):
            config_from_dict(known | {name: 7}, "a file")
    with pytest.raises(ConfigError, match=rf"nearest: .*{nearly}"):
        config_from_dict(known | {nearly[:-1]: 7}, "a file")
    assert config_from_dict(known | {"surprise": None}, "a file") is not None  # off, so it changes nothing


@every_method
def test_targets_that_match_nothing_are_refused(method):
    modules = ["model.layers.0.q_proj", "model.layers.0.v_proj"]
    for wanted in (["q_prog"], ["layers.0"], r".*\.q_prog"):
        with pytest.raises(
            MatchError, match=re.escape(f"{method.__name__}.target_modules is {wanted!r}, which matches")
        ):
            targeted(modules, method(target_modules=wanted))
    with pytest.raises(MatchError, match=r"nearest: model\.layers\.0\.q_proj"):
        targeted(modules, method(target_modules=["q_prog"]))
    with pytest.raises(ConfigError, match=f"{method.__name__}.target_modules is None; give"):
        targeted(modules, method())
