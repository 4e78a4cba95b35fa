"""DoRA's gradients against PEFT's: both take the norms as constants, which an effective weight by itself does not."""

from __future__ import annotations

import numpy as np
import pytest

from peftarray import Adapter, LoraConfig
from peftarray.layers import Layer, Window

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

LAYERS = {
    "linear": (lambda: torch.nn.Linear(10, 6, bias=False), (2, 3, 10), "linear"),
    "conv1d": (lambda: torch.nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9), "conv"),
    "conv2d": (lambda: torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=False), (2, 4, 9, 7), "conv"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_pefts(name):
    torch.manual_seed(0)
    build, shape, kind = LAYERS[name]
    base = build().double()
    window = Window(base.stride, base.padding, base.dilation) if kind == "conv" else Window()
    config = peft.LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["0"], init_lora_weights=False)
    live = peft.get_peft_model(torch.nn.Sequential(base), config).double()
    trained = {n.partition(".0.")[2].replace(".default", ""): p for n, p in live.named_parameters() if p.requires_grad}
    magnitude = trained.pop("lora_magnitude_vector.weight")
    magnitude.data.mul_(1 + torch.rand_like(magnitude))
    theirs = [*trained.values(), magnitude]

    params = [p.detach().clone().requires_grad_() for p in theirs]
    names = [*(n.removesuffix(".weight") for n in trained), "lora_magnitude_vector"]
    layer = Layer("0", kind, tuple(base.weight.shape), window=window)
    adapter = Adapter(
        LoraConfig(r=2, lora_alpha=5, use_dora=True).at("0"), layer, dict(zip(names, params, strict=True))
    )

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = adapter.forward(x, base.weight.detach()), live(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, [*params, x], weights)
    wanted = torch.autograd.grad(expected, [*theirs, x], weights)
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), atol=1e-11)
