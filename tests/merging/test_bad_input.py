"""Adapters that do not belong to a base, or whose configuration cannot be carried out: refused in one line."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    base_shapes,
    lora_config,
    lora_tensors,
    merged_tensors,
    random_tensors,
    read_tensors,
    targets_of,
    tree,
    write_adapter,
    write_base,
)
from refusals import CommandLine, run_process

from peftarray import patterns

QUERY = "model.layers.0.self_attn.q_proj"
DOWN, UP = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def refused(cli, tmp_path):
    """`refused(*words, adapter=, config=, base=, layers=, options=)`: their merge is refused with these words."""

    def check(*words, adapter=None, config=None, base=None, layers=2, options=()):
        write_base(tmp_path / "base", base, layers=layers)
        write_adapter(tmp_path / "adapter", adapter, config)
        places = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
        return cli.refuses(tmp_path, *places, *options, words=words)

    return check


def changed(**tensors):
    """The usual adapter with some tensors replaced, by the short names `down` and `up` of the first layer."""
    keys = {"down": DOWN, "up": UP}
    return lora_tensors(targets_of()) | {keys.get(name, name): array for name, array in tensors.items()}


def test_what_is_refused_below_is_merged_when_it_is_sound(cli, tmp_path):
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    assert cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out") == 0, cli.err
    assert not cli.err
    wanted = merged_tensors(base, adapter)
    found = read_tensors(tmp_path / "out")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)


# Adapters that belong to another base.


def test_wrong_prefix(refused):
    other = {key.replace("model.layers", "decoder.blocks"): array for key, array in lora_tensors(targets_of()).items()}
    refused("none of the adapter's 8 tensors", "decoder.blocks.0", "belong together", adapter=other)


def test_prefix_that_no_tool_writes(refused):
    other = {f"elsewhere.{key}": array for key, array in lora_tensors(targets_of()).items()}
    refused("none of the adapter's 8 tensors", "elsewhere.", "belong together", adapter=other)


def test_adapter_with_more_layers(refused):
    refused("4 of 12 adapter tensors", "model.layers.2", "nearest", adapter=lora_tensors(targets_of(layers=3)))


def test_adapter_with_fewer_layers(refused):
    refused("nothing for 2 modules", "model.layers.2", "--allow-unmatched", layers=3)


def test_disjoint_targets(refused):
    other = {f"transformer.h.{i}.attn.c_attn": (24, 8) for i in range(2)}
    refused(
        "none of the adapter's 4 tensors", adapter=lora_tensors(other), config=lora_config(target_modules=["c_attn"])
    )


def test_targets_that_the_file_has_nothing_for(refused):
    refused("nothing for 2 modules", "v_proj", config=lora_config(target_modules=["q_proj", "down_proj", "v_proj"]))


def test_other_width(refused):
    wide = {module: tuple(2 * n for n in shape) for module, shape in targets_of().items()}
    refused(QUERY, "lora_A is (2, 16)", "in=8", "check r", adapter=lora_tensors(wide))


@pytest.mark.parametrize("shape", [(), (2,), (2, 7), (2, 8, 1), (0, 8), (3, 8)])
def test_shape_that_does_not_fit(refused, shape):
    refused(QUERY, f"lora_A is {shape}", "r=2, in=8", adapter=changed(down=np.zeros(shape, np.float32)))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("left_over", ("1 of 9 adapter tensors", "left_over", "--allow-unmatched")),
        (f"{PREFIX}{QUERY}.lora_E", ("lora_E", "no place", QUERY)),
        (
            f"{PREFIX}model.layers.0.self_attn.q_prok.lora_A.weight",
            ("q_prok", "nearest: model.layers.0.self_attn.q_proj"),
        ),
        (f"{PREFIX}model.norm.lora_A.weight", ("model.norm", "shape (8,)")),
    ],
)
def test_tensor_left_over(refused, key, words):
    refused(*words, adapter=changed(**{key: np.zeros((2, 8), np.float32)}))


def test_same_tensor_with_and_without_the_prefix(refused):
    refused("with and without the prefix", adapter=changed(**{DOWN.removeprefix(PREFIX): np.zeros((2, 8), np.float32)}))


def test_half_of_the_factors(refused):
    tensors = lora_tensors(targets_of())
    del tensors[UP]
    refused(QUERY, "lacks lora_B", adapter=tensors)


def test_adapter_without_tensors(refused):
    refused("none of the adapter's 0 tensors", adapter={})


# Configurations that disagree with the file, or that cannot be carried out.


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"r": 4}, ("lora_A is (2, 8)", "r=4", "check r")),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 4}}, ("layers.1.self_attn.q_proj", "r=4", "patterns")),
        ({"use_dora": True}, ("lacks lora_magnitude_vector",)),
        ({"lora_bias": True}, ("bias", "q_proj")),
        ({"r": 10**400}, ("lora_A",)),
    ],
)
def test_configuration_that_disagrees_with_the_file(refused, field, words):
    refused(*words, config=lora_config(**field))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"modules_to_save": ["lm_head", "score"]}, ("nothing for 1 modules", "the first is lm_head")),
        ({"trainable_token_indices": [1, 2]}, ("nothing for 1 modules", "embed_tokens (trainable_token_indices)")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration_that_promises_values_the_file_lacks(refused, field, words):
    refused(*words, config=lora_config(**field))


@pytest.mark.parametrize("kind", ["TELEPATHY", "lora", "", None, 5, ["LORA"], {"LORA": 1}, True])
def test_unknown_method(refused, kind):
    refused("adapter_config.json", "peft_type is", "known are ADALORA, BOFT", config=lora_config(peft_type=kind))


def test_no_method(refused):
    config = lora_config()
    del config["peft_type"]
    refused("peft_type is 'None'", "known are", config=config)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("PROMPT_TUNING", "soft prompt"), ("PREFIX_TUNING", "soft prompt"), ("XLORA", "depends on the input")],
)
def test_method_without_a_merged_weight(refused, kind, why):
    refused(f"peft_type {kind} cannot be merged", why, config=lora_config(peft_type=kind))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("alora_invocation_tokens", [1, 2], "serve it unmerged"),
        ("arrow_config", {"top_k": 3}, "routes each token"),
        ("layer_replication", [[0, 2], [1, 2]], "write the copies out"),
        ("megatron_config", {"num_layers": 2}, "parallel layers"),
    ],
)
def test_field_that_changes_the_result_and_is_not_supported(refused, name, value, why):
    refused(f"LoraConfig.{name} is", "not supported", why, config=lora_config(**{name: value}))


def test_unknown_field_that_is_set(refused):
    refused("no field 'use_moonlight'", "'0.5'", "--allow-unmatched", config=lora_config(use_moonlight=0.5))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga"])
def test_initialisation_that_changed_the_base(refused, init):
    refused(
        f"init_lora_weights is '{init}'",
        "changed the base",
        "save it converted",
        config=lora_config(init_lora_weights=init),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "2"), ("r", 2.0), ("r", 0), ("r", -1), ("r", True), ("r", None), ("r", [2]),
        ("lora_alpha", "4"), ("lora_alpha", None), ("lora_alpha", True), ("lora_alpha", 10**400), ("lora_alpha", [4]),
        ("use_rslora", 1), ("use_dora", "true"), ("bias", "some"), ("bias", True), ("init_lora_weights", "magic"),
        ("target_modules", 5), ("target_modules", {"q_proj": 1}), ("target_modules", ["q_proj", 5]),
        ("rank_pattern", {"q_proj": "2"}), ("rank_pattern", ["q_proj"]), ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": None}), ("layers_to_transform", "0"), ("layers_to_transform", [-1]),
        ("layers_pattern", 5), ("modules_to_save", 5), ("target_parameters", [5]), ("fan_in_fan_out", "no"),
        ("use_bdlora", "x"), ("use_bdlora", ["a", 2]), ("use_bdlora", {"target_modules_bd_a": 5}),
        ("use_bdlora", {"target_modules_bd_b": [5]}),
        ("trainable_token_indices", [-1]), ("trainable_token_indices", {"embed_tokens": "1"}), ("task_type", 5),
    ],
)  # fmt: skip
def test_value_of_a_wrong_type(refused, name, value):
    refused(f"LoraConfig.{name} is", "must be", config=lora_config(**{name: value}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_number_that_is_none(refused, number):
    text = json.dumps(lora_config()).replace('"lora_alpha": 4', f'"lora_alpha": {number}')
    refused("LoraConfig.lora_alpha is", "a finite number", config=text.encode())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b"[" * 100_000, b'{"r": ' * 50_000, b"\xff\xfe{}", b'{"r": 1' + b"0" * 5000 + b"}"],
    ids=["empty", "cut", "null", "list", "deep", "deep objects", "not utf-8", "endless number"],
)
def test_configuration_that_is_no_json_object(refused, text):
    refused("adapter_config.json", "JSON", config=text)


def test_configuration_with_a_field_twice(refused):
    text = json.dumps(lora_config()).replace('"r": 2', '"r": 2, "r": 3')
    refused("adapter_config.json", "'r' twice", config=text.encode())


def test_configuration_with_half_a_character(refused):
    refused("adapter_config.json", "surrogate", config=lora_config(target_modules=["\ud800"]))


def test_huge_configuration_is_not_read(refused):
    refused("adapter_config.json", "bytes", "right file", config=b" " * (65 << 20))


def test_no_configuration(cli, tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    places = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    cli.refuses(tmp_path, *places, words=("no adapter_config.json", "save_pretrained"))


# Patterns of strangers.

ENDLESS, SLOW = r"(.|..)+(?<!.)", r"(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5[A-Z]"
BOMB = "(?:(?:(?:a){1000}){1000}){1000}"


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", ("not a regular expression", "correct it")),
        ("[a", ("not a regular expression",)),
        ("(?P<", ("not a regular expression",)),
        (ENDLESS, ("takes more than", "list of names")),
        (BOMB, ("counts of repetition",)),
        ("a" * 10_001, ("characters", "at most 10000")),
        ("(?:" * 2000 + ")" * 2000, ("not a regular expression",)),
    ],
    ids=["open", "set", "name", "endless", "bomb", "long", "deep"],
)
def test_pattern(refused, field, pattern, words, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)  # a fast machine may get through a short name in half a second
    value = {pattern: 2} if field in ("rank_pattern", "alpha_pattern") else pattern
    # A pattern of layers is asked only for modules whose name is a target, and that the file has nothing for.
    layers = {"layers_to_transform": [0, 1], "target_modules": ["q_proj", "down_proj", "v_proj"]}
    refused(field, *words, config=lora_config(**{field: value}, **(layers if field == "layers_pattern" else {})))


def test_pattern_that_is_slow_on_each_of_many_names(refused, monkeypatch):
    """Below the budget for one name, and above what all may take."""
    monkeypatch.setattr(patterns, "_SECONDS_IN_ALL", 0.3)
    base, adapter = random_tensors(base_shapes(layers=12), np.float32, 0), lora_tensors(targets_of(layers=12))
    config = lora_config(target_modules=SLOW)
    refused("target_modules", "0.3 s in all", base=base, layers=12, adapter=adapter, config=config)


# Numbers that do not belong there.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_no_number_in_the_adapter(refused, value, dtype):
    down = np.zeros((2, 8))
    down[1, 3] = value
    refused(DOWN, "1 NaN or infinite", "diverged", adapter=changed(down=down.astype(dtype)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_factors_that_are_not_floating(refused, dtype):
    refused(DOWN, "must be floating", adapter=changed(down=np.zeros((2, 8), dtype)))


def test_overflow_of_the_output(refused):
    loud = {key: 1000 * array for key, array in lora_tensors(targets_of()).items()}
    refused(".weight", "overflow F16", "--dtype bfloat16", adapter=loud, options=("--dtype", "float16"))


@pytest.mark.parametrize("alpha", [1e308, 1e39])
def test_overflow_of_the_scale(refused, alpha):
    refused(".weight", "overflow F32", "lower the scale", config=lora_config(lora_alpha=alpha))


def test_dora_on_a_row_without_a_direction(refused):
    """A row of zeros has no direction: the result is no number, and says so."""
    base = random_tensors(base_shapes(), np.float32, 0)
    adapter = lora_tensors(targets_of())
    base[f"{QUERY}.weight"][2], adapter[UP][2] = 0, 0
    magnitudes = {
        f"{PREFIX}{module}.lora_magnitude_vector": np.ones(shape[0], np.float32)
        for module, shape in targets_of().items()
    }
    refused(f"{QUERY}.weight", base=base, adapter=adapter | magnitudes, config=lora_config(use_dora=True))


# And the command itself.


def test_process_says_one_line_and_leaves_nothing(tmp_path):
    """The entry point itself, with Python's own warnings shown."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", config=lora_config(lora_alpha=1e308))
    before = tree(tmp_path)
    done = run_process("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "overflow" in done.stderr
    assert tree(tmp_path) == before
