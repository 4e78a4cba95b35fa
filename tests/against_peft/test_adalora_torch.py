"""AdaLoRA's budget on torch modules: PEFT's over a whole training, and kept by `fit`; what is pruned is saved so."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

import peftarray as pa
from peftarray.errors import ConfigError, MatchError
from peftarray.model import PeftModel, get_peft_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

CHOSEN = {"init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": 36, "orth_reg_weight": 0.3}
CHOSEN |= {"target_modules": ["first", "second"]}
SHAPES = {"first": (12, 9), "second": (8, 12)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(9, 12), torch.nn.Linear(12, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch():
    draw = np.random.default_rng(1)
    return {
        name: torch.from_numpy(draw.standard_normal((32, n)).astype(np.float32)) for name, n in (("x", 9), ("y", 8))
    }


def loss(model, given, params):
    error = ((model(given["x"]) - given["y"]) ** 2).mean()
    return error + pa.orthogonality_penalty(params, weight=CHOSEN["orth_reg_weight"])


def layers(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def test_a_training_is_that_of_peft(tmp_path):
    live = peft.get_peft_model(Net(), peft.AdaLoraConfig(**CHOSEN))
    ours = get_peft_model(Net(), pa.AdaLoraConfig(**CHOSEN))
    ours.load_state_dict({name: array for name, array in live.state_dict().items() if "ranknum" not in name})
    optimizers = [torch.optim.AdamW(layers(model).values(), lr=0.02) for model in (live, ours)]
    for step in range(CHOSEN["total_step"]):
        for model, optimizer in zip((live, ours), optimizers, strict=True):
            loss(model, batch(), layers(model)).backward()
            optimizer.step()
            (live.base_model if model is live else ours).update_and_allocate(step)
            optimizer.zero_grad()
        for name, parameter in layers(live).items():
            torch.testing.assert_close(layers(ours)[name], parameter, atol=1e-5, rtol=1e-5)
    kept = {name.removesuffix(".default"): mask for name, mask in live.peft_config["default"].rank_pattern.items()}
    assert 0 < sum(map(sum, kept.values())) < 12

    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == kept
    wanted = ours(batch()["x"])
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert {name: p.shape[0] for name, p in layers(again).items() if "lora_A" in name} == {
        f"base_model.model.{name.removesuffix('.lora_E')}.lora_A.default": sum(mask) for name, mask in kept.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for model in (again, theirs):
        torch.testing.assert_close(model(batch()["x"]), wanted, atol=1e-5, rtol=1e-5)


def test_the_penalty_is_what_peft_adds_to_the_loss():
    live = peft.get_peft_model(Net(), peft.AdaLoraConfig(**CHOSEN, init_lora_weights=False))
    x = batch()["x"]
    live.base_model.model.forward = lambda x: type("Output", (), {"loss": torch.zeros(())})()
    penalty = pa.orthogonality_penalty(layers(live), weight=CHOSEN["orth_reg_weight"])
    torch.testing.assert_close(penalty, live.base_model(x).loss)


def weights():
    return {name: array.numpy() for name, array in Net().state_dict().items()}


def run(found, x):
    return np.tanh(x @ found["first.weight"].T + found["first.bias"]) @ found["second.weight"].T + found["second.bias"]


def test_fit_keeps_it_on_a_module_as_on_a_mapping(tmp_path):
    config = pa.AdaLoraConfig(**CHOSEN)
    options = {"steps": 36, "optimizer": pa.AdaLoraBudget(config, pa.AdamW(0.02)), "progress": False}
    module, mapping = get_peft_model(Net(), config), get_peft_model(weights(), config)

    def over_arrays(model, given):
        error = ((run(model.weights, given["x"]) - given["y"]) ** 2).mean()
        return error + pa.orthogonality_penalty(model.params, weight=CHOSEN["orth_reg_weight"])

    arrays = {name: array.numpy() for name, array in batch().items()}
    of_module = pa.fit(module, lambda m, given: loss(m, given, m.params), [batch()], **options)
    of_mapping = pa.fit(mapping, over_arrays, [arrays], **options)
    keep = of_module.state["keep"]
    assert keep == of_mapping.state["keep"]
    assert 0 < sum(map(sum, keep.values())) < 12
    np.testing.assert_allclose(of_module.losses, of_mapping.losses, rtol=1e-3)

    wanted = module(batch()["x"]).detach()
    module.prune(keep)
    small = mapping.prune(keep)
    for name, parameter in layers(module).items():
        assert parameter.requires_grad
        path, key = name.removeprefix("base_model.model.").removesuffix(".default").split(".")
        assert tuple(parameter.shape) == small.params[f"{path}.{key}"].shape
    torch.testing.assert_close(module(batch()["x"]), wanted)
    np.testing.assert_allclose(run(small.weights, arrays["x"]), wanted, atol=2e-3)
    for place, model in (("module", module), ("mapping", small)):
        model.save_pretrained(tmp_path / place)
        again = PeftModel.from_pretrained(Net(), tmp_path / place)
        torch.testing.assert_close(again(batch()["x"]), wanted, atol=2e-3, rtol=0)


def test_what_cannot_be_kept_is_refused():
    ours = get_peft_model(Net(), pa.AdaLoraConfig(**CHOSEN))
    with pytest.raises(ConfigError, match="has no gradient"):
        ours.update_and_allocate(0)
    with pytest.raises(MatchError, match="first"):
        ours.prune({"second": [True] * 6})
    lora = get_peft_model(Net(), pa.LoraConfig(target_modules=["first"]))
    for call in (lambda: lora.update_and_allocate(0), lambda: lora.prune({})):
        with pytest.raises(ConfigError, match="LoraConfig"):
            call()
    ours.prune({name: [True] * 5 + [False] for name in SHAPES})
    for call in (lambda: ours.update_and_allocate(0), lambda: ours.prune({})):
        with pytest.raises(ConfigError, match="pruned"):
            call()
