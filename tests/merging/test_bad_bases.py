"""Bases that no adapter can be merged into: quantised, of odd shapes, or stacks that are none."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    PREFIX,
    base_shapes,
    data_of,
    header_of,
    lora_config,
    lora_tensors,
    random_tensors,
    targets_of,
    write_adapter,
    write_base,
    write_raw,
)
from refusals import CommandLine

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def refused(cli, tmp_path):
    """`refused(*words, base=, adapter=, config=, model=)`: the merge of these is refused with these words."""

    def check(*words, base, adapter=None, config=None, model=None):
        write_base(tmp_path / "base", base, config=model)
        write_adapter(tmp_path / "adapter", adapter, config)
        places = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
        return cli.refuses(tmp_path, *places, words=words)

    return check


@pytest.mark.parametrize("code", ["Q4_ZZ", "U8", "I8"])
def test_touched_tensor_that_is_not_floating(cli, tmp_path, code):
    tensors = random_tensors(base_shapes(), np.float32, 0)
    tensors[f"{QUERY}.weight"] = np.ones((8, 8), np.uint8)
    write_base(tmp_path / "base", tensors)
    header = header_of(tensors)
    header[f"{QUERY}.weight"]["dtype"] = code
    write_raw(tmp_path / "base" / "model.safetensors", header, data_of(tensors))
    write_adapter(tmp_path / "adapter")
    places = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    cli.refuses(tmp_path, *places, words=(f"{QUERY}.weight", f"stored as {code}", "quantised", "dequantise"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_untouched_tensor_of_unknown_dtype_passes_as_bytes(cli, tmp_path, dtype):
    tensors = random_tensors(base_shapes(), np.float32, 0)
    write_base(tmp_path / "base", tensors)
    header = header_of(tensors)
    header["model.norm.weight"] |= {"dtype": "Q4_ZZ", "shape": [3, 5, 1 << 60]}
    write_raw(tmp_path / "base" / "model.safetensors", header, data_of(tensors))
    write_adapter(tmp_path / "adapter")
    places = (tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert cli("merge", *places, *(("--dtype", dtype) if dtype else ())) == 0, cli.err
    path = tmp_path / "out" / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])["model.norm.weight"]
    assert (entry["dtype"], entry["shape"]) == ("Q4_ZZ", [3, 5, 1 << 60])
    begin, end = (start + at for at in entry["data_offsets"])
    assert data[begin:end] == tensors["model.norm.weight"].tobytes()


@pytest.mark.parametrize("scales", [f"{QUERY}.weight_scale_inv", f"{QUERY}.weight_scale"])
def test_eight_bit_weights_with_scales(refused, scales):
    base = random_tensors(base_shapes(), np.float32, 0)
    base[f"{QUERY}.weight"] = np.ones((8, 8), ml_dtypes.float8_e4m3fn)
    base[scales] = np.ones((1, 1), np.float32)
    refused(f"{QUERY}.weight", "F8_E4M3", scales, "dequantise", base=base)


def zeros(shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shape", "words"), [((), "a matrix"), ((8,), "a matrix"), ((0,), "a matrix"), ((9, 8), "wants")]
)
def test_weight_that_is_no_matrix_of_this_layer(refused, shape, words):
    refused(QUERY, words, base=random_tensors(base_shapes() | {f"{QUERY}.weight": shape}, np.float32, 0))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5), (0, 4, 4)])
def test_parameter_that_is_no_stack(refused, shape):
    factors = {f"{PREFIX}model.experts.lora_{name}.weight": (2, 8) for name in "AB"}
    refused(
        "model.experts.stack",
        f"is {shape}",
        "matrices and stacks",
        base=zeros(base_shapes() | {"model.experts.stack": shape}),
        adapter=lora_tensors(targets_of()) | zeros(factors),
        config=lora_config(target_parameters=["experts.stack"]),
    )


@pytest.mark.parametrize(
    "tensors", [{"odd.weight": ()}, {"odd.weight": (8,)}, {"odd.weight": (2, 8, 1)}, {"odd.bias": (8,)}]
)
def test_trained_rows_of_what_is_no_embedding(refused, tensors):
    base = zeros(base_shapes() | {f"model.{name}": shape for name, shape in tensors.items()})
    rows = zeros({f"{PREFIX}model.odd.token_adapter.trainable_tokens_delta": (1, 8)})
    config = lora_config(trainable_token_indices={"odd": [1]})
    refused("model.odd", "rows of an embedding", base=base, adapter=lora_tensors(targets_of()) | rows, config=config)


@pytest.mark.parametrize("rows", [[1, 1], [16], [10**30]])
def test_trained_rows_that_an_embedding_does_not_have(refused, rows):
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = lora_tensors(targets_of()) | zeros({name: (len(rows), 8)})
    refused("embed_tokens", base=None, adapter=adapter, config=lora_config(trainable_token_indices=rows))


def test_experts_of_different_sizes(refused):
    """The third expert's projections have each other's shapes: no stack can be made of the three."""
    head = "model.layers.0.mlp.experts"
    shapes = {}
    for i in range(3):
        wide, high = ((8, 12), (12, 8)) if i == 2 else ((12, 8), (8, 12))
        shapes |= {f"{head}.{i}.gate_proj.weight": (12, 8), f"{head}.{i}.up_proj.weight": wide}
        shapes[f"{head}.{i}.down_proj.weight"] = high
    factors = {"base_layer.lora_A": (6, 8), "base_layer.lora_B": (24, 6), "lora_A": (6, 12), "lora_B": (8, 6)}
    refused(
        f"{head}.2.up_proj.weight",
        "24 rows",
        base=zeros(shapes),
        model={"model_type": "qwen3_moe"},
        adapter=zeros({f"{PREFIX}{head}.{name}.weight": shape for name, shape in factors.items()}),
        config=lora_config(target_modules=None, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )


def test_bias_of_another_size(refused):
    base = zeros(base_shapes() | {f"{module}.bias": (3,) for module in targets_of()})
    biases = {f"{PREFIX}{module}.lora_B.bias": (shape[0],) for module, shape in targets_of().items()}
    adapter = lora_tensors(targets_of()) | zeros(biases)
    refused(f"{QUERY}.bias is (3,)", "8 outputs", base=base, adapter=adapter, config=lora_config(lora_bias=True))


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 0), (4, 0, 3)])
def test_weights_without_entries_are_copied(cli, tmp_path, shape):
    write_base(tmp_path / "base", zeros(base_shapes() | {"model.void.weight": shape}))
    factors = {"lora_A": (2, *shape[1:]), "lora_B": (shape[0], 2, *(1 for _ in shape[2:]))}
    more = zeros({f"{PREFIX}model.void.{name}.weight": size for name, size in factors.items()})
    write_adapter(tmp_path / "adapter", lora_tensors(targets_of()) | more)
    assert cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--verify") == 0, cli.err


def test_replacement_of_another_kind(refused):
    """Whole numbers in place of floating ones."""
    adapter = lora_tensors(targets_of()) | {f"{PREFIX}model.norm.weight": np.zeros(8, np.int64)}
    refused("model.norm.weight", "F32", "I64", base=None, adapter=adapter, config=lora_config(modules_to_save=["norm"]))
