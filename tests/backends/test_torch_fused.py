"""One step of autograd for a linear layer and its update gives what the two parts give, twice derived too."""

from __future__ import annotations

import pytest

import peftarray as pa

torch = pytest.importorskip("torch")
from peftarray.backends import torch_layers  # noqa: E402 - it needs torch
from peftarray.backends.torch_fused import fused_output  # noqa: E402


def network(bias: bool = True):
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16, bias=bias), torch.nn.Tanh(), torch.nn.Linear(16, 4, bias=bias)
    return torch.nn.Sequential(*layers).double()


def adapted(model, **changes):
    config = pa.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    return pa.get_peft_model(model, pa.LoraConfig(**{**config.__dict__, **changes}))


@pytest.fixture
def counted(monkeypatch):
    """Whether each call went the short way."""
    calls = []

    def spy(*arguments):
        found = fused_output(*arguments)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(torch_layers, "fused_output", spy)
    return calls


def all_gradients(model, x):
    """The output, its gradients, and the gradients of these."""
    places = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    y = model(x)
    first = torch.autograd.grad((y**2).sum(), places, create_graph=True)
    return [y, *first, *torch.autograd.grad(sum((array**2).sum() for array in first), places)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)])
def test_it_gives_what_the_parts_give(bias, trained, shape, counted, monkeypatch):
    model = adapted(network(bias))
    for parameter in model.base_model.model[0].base_layer.parameters():
        parameter.requires_grad = trained
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    short = all_gradients(model, x)
    assert counted == [True, True]
    monkeypatch.setattr(torch_layers, "fused_output", lambda *_: None)
    for found, expected in zip(short, all_gradients(model, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_works_inside_of_functional_transforms(counted):
    model = adapted(network())
    x = torch.randn((6, 8), dtype=torch.float64, requires_grad=True)
    found = torch.func.vmap(torch.func.grad(lambda row: (model(row) ** 2).sum()))(x.detach())
    assert counted == [True, True]
    (expected,) = torch.autograd.grad((model(x) ** 2).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("why", ["hook", "autocast", "two adapters", "bias", "DoRA"])
def test_where_torch_must_see_both_parts(why, counted):
    changes = {"bias": {"lora_bias": True}, "DoRA": {"use_dora": True}}
    model = adapted(network().float(), **changes.get(why, {}))
    x, heard = torch.randn((5, 8)), []
    if why == "hook":
        model.base_model.model[0].base_layer.register_forward_hook(lambda *_: heard.append(True))
    if why == "two adapters":
        model.add_adapter("other", pa.LoraConfig(r=2, target_modules=["0", "2"]))
        model.set_adapter(["default", "other"])
    with torch.autocast("cpu", enabled=why == "autocast"):
        y = model(x)
    assert counted[:1] in ([False], [])
    assert y.shape == (5, 4)
    assert len(heard) == (why == "hook")
