"""torch modules with an adapter, against PEFT's, and against the same adapter on a mapping of weights."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftarray as pa
from peftarray import ConfigError, IA3Config, LoraConfig, MatchError, OFTConfig, PeftError, UnsupportedError, VeraConfig
from peftarray.model import PeftModel, get_peft_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from .cases import CONFIGS, base_weights, run  # noqa: E402
from .torch_net import Net, randomise  # noqa: E402

IDS = torch.tensor([[1, 7, 3], [0, 1, 10]])
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# PEFT calls this parameter by another name; and its AdaLoRA trains a number that it never saves.
_MAGNITUDE = ".lora_magnitude_vector.default"


def adapted(config: pa.AdapterConfig, **options: Any) -> Any:
    return randomise(get_peft_model(Net(**options), config))


def theirs(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(Net(**options), folder, is_trainable=True).double()


def gradients(model: Any, ids: Any = IDS) -> dict[str, Any]:
    model.zero_grad()
    (model(ids) ** 2).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "ranknum" not in n}
    return {name.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE): array for name, array in found.items()}


@every_config
def test_outputs_and_gradients_are_those_of_peft(config, tmp_path):
    ours = adapted(config)
    ours.save_pretrained(tmp_path)
    other = theirs(tmp_path)
    torch.testing.assert_close(ours(IDS), other(IDS), atol=1e-10, rtol=1e-8)
    mine, his = gradients(ours), gradients(other)
    assert mine.keys() == his.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, his[name], atol=1e-8, rtol=1e-6, msg=name)
    numbers = [p.numel() for name, p in other.named_parameters() if "ranknum" not in name]
    trained = sum(gradient.numel() for gradient in his.values())
    assert ours.get_nb_trainable_parameters() == (trained, sum(numbers))


@every_config
def test_it_is_the_mapping_of_weights(config, tmp_path):
    ours = adapted(config)
    ours.save_pretrained(tmp_path)
    mapping = PeftModel.from_pretrained(base_weights(), tmp_path)
    np.testing.assert_allclose(ours(IDS).detach().numpy(), run(mapping.weights, IDS.numpy()), atol=1e-10)


@every_config
def test_it_is_loaded_merged_and_unloaded(config, tmp_path):
    ours = adapted(config).eval()
    ours.save_pretrained(tmp_path)
    wanted = ours(IDS)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    torch.testing.assert_close(again(IDS), wanted, atol=0, rtol=0)
    torch.testing.assert_close(copy.deepcopy(again)(IDS), wanted, atol=0, rtol=0)
    merged = again.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(merged(IDS), wanted, atol=1e-10, rtol=1e-8)
    base = ours.unload()
    if config.trained_biases() == "none":  # biases are trained in their place
        torch.testing.assert_close(base(IDS), Net()(IDS), atol=0, rtol=0)


@every_config
def test_a_state_dict_restores_it(config):
    first, second = adapted(config), get_peft_model(Net(), config, seed=1)
    missing = second.load_state_dict(first.state_dict())
    assert not missing.missing_keys
    torch.testing.assert_close(first(IDS), second(IDS), atol=0, rtol=0)


@every_config
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_it_compiles_and_exports_whole(config):
    ours = adapted(config)
    torch._dynamo.reset()
    wanted = gradients(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), ours(IDS))
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, wanted[name.removeprefix("_orig_mod.")])
    exported = torch.export.export(ours, (IDS,), strict=False)
    torch.testing.assert_close(exported.module()(IDS), ours(IDS))


COLD = """
import torch, peftarray as pa
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
    def forward(self, x):
        return self.proj(x) + x @ self.proj.weight.T
model = pa.get_peft_model(Net().bfloat16(), pa.OFTConfig(oft_block_size=4, target_modules=["proj"]))
x = torch.ones(2, 8, dtype=torch.bfloat16)
torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
"""


def test_it_compiles_before_it_ever_ran():
    """Nothing that the compiler cannot trace waits for the first call."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COLD], check=True)


DROPOUTS = {
    "lora": LoraConfig(r=2, lora_dropout=0.4, target_modules=["q_proj", "o_proj"]),
    "dora": LoraConfig(r=2, lora_dropout=0.4, use_dora=True, target_modules=["q_proj"]),
    "vera": VeraConfig(r=4, vera_dropout=0.4, target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.parametrize("config", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_in_training_is_that_of_peft(config, tmp_path):
    """The same numbers of torch's generator leave out the same inputs."""
    ours = adapted(config)
    ours.save_pretrained(tmp_path)
    other = theirs(tmp_path).train()
    outputs = []
    for model in (ours.train(), other):
        torch.manual_seed(5)
        outputs.append(model(IDS))
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-8)
    assert (outputs[0] - ours.eval()(IDS)).abs().max() > 1e-3


def test_rows_of_a_tied_head_follow_the_embedding(tmp_path):
    config = LoraConfig(r=2, trainable_token_indices=[7, 1], target_modules=["q_proj"])
    ours = adapted(config, tied=True)
    ours.save_pretrained(tmp_path)
    other = theirs(tmp_path, tied=True)
    torch.testing.assert_close(ours(IDS), other(IDS), atol=1e-10, rtol=1e-8)
    mine, his = gradients(ours), gradients(other)
    assert mine.keys() == his.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, his[name], atol=1e-8, rtol=1e-6, msg=name)
    wanted = ours(IDS)
    merged = ours.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(IDS), wanted, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("config", [CONFIGS["lora"], CONFIGS["dora"], CONFIGS["oft"]], ids=["lora", "dora", "oft"])
def test_a_short_base_keeps_its_dtype(config, tmp_path):
    """Products with the base are made in bfloat16, the adapter is kept and computed in float32."""
    ours = randomise(get_peft_model(Net().bfloat16(), config))
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)
    ours.save_pretrained(tmp_path)
    exact = PeftModel.from_pretrained(Net(), tmp_path)(IDS)
    short = ours(IDS)
    assert short.dtype == torch.bfloat16
    assert (short - exact).abs().max() <= 0.1 * exact.abs().max()
    ours(IDS).float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert (ours(IDS) - exact).abs().max() <= 0.1 * exact.abs().max()


class Scaled(torch.nn.Embedding):
    """An embedding with a forward of its own."""

    def forward(self, ids: Any) -> Any:
        return super().forward(ids) * 3.0


class Packed(torch.nn.Linear):
    """A linear layer that stores its weight in eight bits."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 127
        codes = torch.round(linear.weight.detach() / self.scale).to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("config", [CONFIGS["lora-embedding"], CONFIGS["oft"]], ids=["lora", "oft"])
def test_a_layer_of_its_own_keeps_its_ways(config):
    """What a subclass does in its forward, it does with the effective weight."""
    net = Net()
    net.model.embed_tokens.__class__ = Scaled
    net.model.layers[0]["self_attn"].q_proj.__class__ = type(
        "Doubled", (torch.nn.Linear,), {"forward": lambda self, x: 2 * torch.nn.Linear.forward(self, x)}
    )
    ours = randomise(get_peft_model(net, config))
    wanted = ours(IDS)
    torch.testing.assert_close(ours.merge_and_unload()(IDS), wanted, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("config", [CONFIGS["lora"], CONFIGS["dora"], CONFIGS["oft"]], ids=["lora", "dora", "oft"])
def test_hooks_of_a_layer_run(config):
    net, seen = Net(), []
    net.model.layers[0]["self_attn"].q_proj.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    randomise(get_peft_model(net, config))(IDS)
    assert len(seen) == 1


def test_a_model_that_is_not_loaded_is_refused():
    with pytest.raises(UnsupportedError, match="load the model's weights first"):
        get_peft_model(Net().to("meta"), CONFIGS["lora"])


def test_a_packed_weight_is_left_to_its_layer():
    def packed() -> Any:
        net = Net().float()
        for layer in net.model.layers:
            layer["self_attn"].q_proj = Packed(layer["self_attn"].q_proj)
        return net

    ours = randomise(get_peft_model(packed(), LoraConfig(r=2, target_modules=["q_proj"])))
    hidden, layer = torch.randn(4, 12), ours.model.layers[0]["self_attn"].q_proj
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.testing.assert_close(layer(hidden), layer.base_layer(hidden) + hidden @ a.T @ b.T * 4)
    with pytest.raises(UnsupportedError, match="stores it packed"):
        get_peft_model(packed(), OFTConfig(oft_block_size=4, target_modules=["q_proj"]))


def test_who_reads_a_weight_of_another_reads_the_effective_one():
    """MultiheadAttention multiplies by its child's weight without calling the child."""
    attention, x = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8)
    before = attention(x, x, x)[0]
    model = randomise(get_peft_model(attention, LoraConfig(target_modules=["out_proj"])))
    y = model(x, x, x)[0]
    assert (y - before).abs().max() > 1e-3
    torch.testing.assert_close(y, model.merge_and_unload()(x, x, x)[0])


class Images(torch.nn.Module):
    """Convolutions of every rank, windows and padding that PEFT takes or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2))
        self.mirrored = torch.nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.same = torch.nn.Conv1d(6, 4, 3, padding="same")
        self.double()

    def forward(self, x: Any) -> Any:
        return self.same(torch.flatten(self.mirrored(self.flat(x)), 2))


CONVOLVED = {
    "lora": LoraConfig(r=2, target_modules=["flat", "mirrored", "same"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["flat", "mirrored", "same"]),
    "loha": pa.LoHaConfig(r=2, target_modules=["flat", "mirrored", "same"]),
    "ia3": IA3Config(target_modules=["flat", "mirrored"]),
}


@pytest.mark.parametrize("config", CONVOLVED.values(), ids=CONVOLVED)
def test_convolutions_are_what_they_merge_to(config):
    torch.manual_seed(0)
    ours = randomise(get_peft_model(Images(), config))
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    wanted = ours(x)
    torch.testing.assert_close(ours.merge_and_unload()(x), wanted, atol=1e-10, rtol=1e-8)


def test_freezing_and_attributes(capsys):
    ours = get_peft_model(Net(), CONFIGS["lora-saved"])
    trained, total = ours.get_nb_trainable_parameters()
    assert ours.freeze().get_nb_trainable_parameters() == (0, total)
    assert ours.unfreeze().get_nb_trainable_parameters() == (trained, total)
    ours.print_trainable_parameters()
    assert f"trainable params: {trained:,d} ||" in capsys.readouterr().out
    assert ours.get_input_embeddings() is ours.base_model.model.model.embed_tokens
    assert ours.get_base_model() is ours.base_model.model
    assert ours.lm_head.in_features == ours.model.layers[0]["self_attn"].q_proj.in_features == 12
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ours.nothing  # noqa: B018


def test_an_adapter_has_a_name_and_a_folder(tmp_path):
    ours = randomise(get_peft_model(Net(), CONFIGS["lora"], adapter_name="poet"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.poet.weight" in ours.state_dict()
    ours.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path / "poet")
    torch.testing.assert_close(again(IDS), ours(IDS), atol=0, rtol=0)
    with pytest.raises(ConfigError, match="without dots"):
        get_peft_model(Net(), CONFIGS["lora"], adapter_name="a.b")


REFUSED: dict[str, tuple[pa.AdapterConfig, str]] = {
    "a container": (LoraConfig(target_modules=["self_attn"]), "is a _Attention; adapters go on linear"),
    "a norm": (LoraConfig(target_modules=r".*\.norm"), "is a _Norm"),
    "nothing": (LoraConfig(target_modules=["q_prj"]), "nearest"),
    "a kind without meaning": (VeraConfig(target_modules=["embed_tokens"]), "embedding layers"),
    "no bias": (LoraConfig(lora_bias=True, target_modules=["o_proj"]), "has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case):
    config, words = REFUSED[case]
    net = Net()
    with pytest.raises(PeftError, match=words):
        get_peft_model(net, config)
    assert net.state_dict().keys() == Net().state_dict().keys()


def test_two_adapters_of_two_calls_are_refused(tmp_path):
    ours = get_peft_model(Net(), CONFIGS["lora"])
    for model in (ours, ours.get_base_model()):
        with pytest.raises(ConfigError, match="has an adapter already"):
            get_peft_model(model, CONFIGS["lora"])
    ours.save_pretrained(tmp_path)
    with pytest.raises(MatchError):
        PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(3, 3)), tmp_path)
