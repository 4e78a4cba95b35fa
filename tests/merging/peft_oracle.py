"""PEFT as the oracle: adapters that it makes and saves, what it merges them to, and the laws of our result."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Base, outputs

import peftarray as pa

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def quiet() -> Iterator[None]:
    """For calls of other people's code: PEFT warns of what a configuration does, and that is no error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(model: torch.nn.Module, seed: int = 1) -> None:
    """Move every parameter that PEFT would train, and no other, as if it had been trained."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
            if "lora_magnitude_vector" in name:
                parameter.mul_(torch.exp(0.2 * noise))
            else:
                parameter.add_(0.2 * noise)


def adapt(
    base: Base,
    config: peft.LoraConfig,
    folder: Path,
    model: torch.nn.Module | None = None,
    *,
    seed: int = 1,
    autocast: bool = True,
) -> Any:
    """A live PEFT model on a base, with an adapter as if trained, which is saved to `folder`.

    Args:
        base: the base.
        config: for PEFT.
        folder: where the adapter goes.
        model: what to adapt in place of the base's own model.
        seed: of the values.
        autocast: keep the adapter of a half-precision model in float32, as PEFT does unless told otherwise.
    """
    # PEFT draws the first values from torch's global stream.
    torch.manual_seed(seed)
    with quiet():
        model = model if model is not None else base.fresh()
        live = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
        train(live, seed)
        live.save_pretrained(folder)
    return live.eval()


def store_in_half(base: Base, folder: Path, dtype: str) -> Any:
    """Rewrite an adapter's file in a half dtype; returns the PEFT model that is loaded from it."""
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: tensor.to(HALVES[dtype]) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    with quiet():
        return peft.PeftModel.from_pretrained(base.fresh(), folder).eval()


def live_outputs(live: Any, base: Base) -> torch.Tensor:
    """The outputs of an unmerged model, in float64; in float32 where PEFT ties parameters, which torch cannot copy."""
    with quiet():
        tied = getattr(live.active_peft_config, "ensure_weight_tying", False)
        return outputs(live if tied else copy.deepcopy(live).double(), base.batch()).double()


def loaded_outputs(base: Base, out: Path, model_class: Any = None, **settings: Any) -> torch.Tensor:
    """The outputs of a merged folder in float64, through the loader that a user would take."""
    with quiet():
        return outputs(base.load(out, model_class, **settings).double(), base.batch())


def merged_by_peft(live: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges a live model to, as it is saved; a folder is written for models of transformers."""
    with quiet():
        merged = live.merge_and_unload()
        if not hasattr(merged, "save_pretrained"):
            return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}
        merged.save_pretrained(folder)
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_weights(
    report: pa.MergeReport,
    base: Path,
    out: Path,
    reference: dict[str, torch.Tensor],
    *,
    rename: Callable[[str], str] = str,
    tolerance: float = 1e-6,
) -> None:
    """The law: changed tensors agree with PEFT's to `tolerance` of max|W|, and nothing else changes by a bit.

    Args:
        report: of the merge; it names the tensors that were computed.
        base, out: folders.
        reference: what PEFT made.
        rename: PEFT's name of a tensor to the base's.
        tolerance: relative to the largest entry.
    """
    changed = {tensor.name for tensor in report.tensors}
    before, ours = tensors_of(base), tensors_of(out)
    wanted = {rename(name): tensor for name, tensor in reference.items()}
    assert ours.keys() == wanted.keys()
    assert changed <= ours.keys()
    for name, tensor in ours.items():
        other = wanted[name]
        assert tensor.dtype == (before[name].dtype if name in before else other.dtype), name
        assert tensor.shape == other.shape, name
        if name in changed:
            difference = (tensor.double() - other.double()).abs().max() if tensor.numel() else torch.zeros(())
            assert difference <= tolerance * other.double().abs().max(), f"{name} is off by {difference}"
        else:
            assert same_bits(tensor, other), f"PEFT changes {name}"
            if name in before and before[name].shape == tensor.shape:
                assert same_bits(tensor, before[name]), f"{name} was not to be changed"


def assert_same_outputs(ours: torch.Tensor, live: torch.Tensor, *, tolerance: float = 1e-4) -> None:
    """Equal but for the rounding of the merged weights to float32, which grows through the layers."""
    assert ours.shape == live.shape
    difference = (ours - live).abs().max() / live.abs().max()
    assert difference <= tolerance, f"the outputs are off by {difference:.3g}"


def assert_config(base: Path, out: Path, **changes: Any) -> None:
    """`config.json` is the base's, but for what the merge must change."""
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert after == before | changes
    if not changes:
        assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
