"""What is in a file: an adapter's method, ranks, scales and spectra, or a checkpoint's tensors. Needs no base."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftarray.dtypes import dtype_name
from peftarray.errors import MatchError, PeftError, ShapeError
from peftarray.formats.peft import open_weights
from peftarray.formats.peft_config import read_config
from peftarray.formats.prompts import holds_prompt, read_prompt_config
from peftarray.layers import Layer
from peftarray.method import AdapterConfig
from peftarray.prompts.prompt import EMBEDDINGS
from peftarray.quant.layouts import StoredWeight, find_quantised
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["AdaptedModule", "Inspection", "inspect"]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module, as far as its own tensors tell.

    Attributes:
        name: the module.
        shapes: its arrays' names, as the method calls them -> their shapes.
        scale: the factor s of the update.
        rank: inner size of the factors s B A; None of a method without such factors.
        norm: the Frobenius norm of s B A; NaN where it does not follow from the adapter alone.
        spectrum: the singular values of s B A, the largest first; empty where they do not follow.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    scale: float
    rank: int | None = None
    norm: float = math.nan
    spectrum: tuple[float, ...] = ()

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the normalised squared spectrum: how many directions the update really uses
        (Roy and Vetterli, The effective rank, 2007)."""
        energy = np.square(self.spectrum)
        share = energy[energy > 0] / energy.sum() if energy.any() else np.ones(1)
        return float(np.exp(-(share * np.log(share)).sum()))


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        path: where.
        kind: `"adapter"` or `"checkpoint"`.
        tensors: how many.
        parameters: how many numbers they hold; those of quantised weights are counted as the model has them.
        nbytes: their bytes.
        dtypes: dtype -> how many tensors have it.
        facts: what the configuration says, in words -> values.
        modules: adapted modules.
        shared: arrays that all of them share -> their shapes.
        replaced: tensors of an adapter that replace the base's whole.
        largest: name -> shape of the largest tensors.
    """

    path: str
    kind: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    facts: dict[str, Any]
    modules: tuple[AdaptedModule, ...]
    shared: dict[str, tuple[int, ...]]
    replaced: tuple[str, ...]
    largest: dict[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = dataclasses.asdict(self)
        for module in found["modules"]:
            module["norm"] = module["norm"] if math.isfinite(module["norm"]) else None  # JSON has no NaN
        return found


def inspect(path: str | Path) -> Inspection:
    """Look into an adapter folder, a checkpoint folder or a `.safetensors` file.

    Raises:
        PeftError: nothing readable is there.
    """
    folder = Path(path)
    if holds_prompt(folder):
        return _prompt(folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    return _checkpoint(Checkpoint.open(folder))


def _adapter(folder: Path) -> Inspection:
    config = read_config(folder, allow_unknown=True)
    tensors = open_weights(folder)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    shared, replaced = {}, []
    # Every name of a method begins with its own word: lora_, hada_, oft_.
    table = type(config)().params(Layer("", "linear", (64, 64)))
    words = tuple({f"{name.partition('_')[0]}_" for name in table})
    for key, info in tensors.items():
        path = key.removeprefix(_PREFIX).split(".")
        place = next((i for i, word in enumerate(path) if word.startswith(words)), None)
        if place is None:
            replaced.append(key)
            continue
        local = ".".join(path[place:]).removesuffix(".weight").replace("_embedding_", "_")
        if path[:place] == ["base_model"]:
            shared[local] = info.shape
        else:
            groups[".".join(path[:place])][local] = key
    modules = tuple(_module(name, group, config, tensors) for name, group in groups.items())
    facts = {"method": config.peft_type} | _changed(config)
    return _summary(folder, "adapter", tensors, facts, modules, shared, tuple(replaced))


def _prompt(folder: Path) -> Inspection:
    config = read_prompt_config(folder, allow_unknown=True)
    tensors = open_weights(folder)
    arrays = [name for name in tensors if not name.startswith("base_model.") or ".adaption_" in name]
    shapes = [f"{name} {'x'.join(map(str, tensors[name].shape))}" for name in arrays]
    facts: dict[str, Any] = {"method": f"{config.peft_type} (a soft prompt: it has no merged weight)"}
    facts |= _changed(config)
    facts["arrays"] = ", ".join(shapes)
    if EMBEDDINGS in tensors and tensors[EMBEDDINGS].shape:
        norms = np.linalg.norm(tensors.read(EMBEDDINGS), axis=-1)
        facts["norms of the rows"] = [float(f"{norm:.4g}") for norm in norms.reshape(-1)]
    return _summary(folder, "adapter", tensors, facts, (), {}, tuple(name for name in tensors if name not in arrays))


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are not as by default."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != _default(field)
    }


def _module(name: str, group: dict[str, str], config: AdapterConfig, tensors: Checkpoint) -> AdaptedModule:
    method = config.at(name)
    shapes = {local: tensors[key].shape for local, key in group.items()}
    if not {"lora_A", "lora_B"} <= set(group):
        return AdaptedModule(name, shapes, method.scale)
    if min(len(shapes["lora_A"]), len(shapes["lora_B"])) < 2:
        message = f"{name}: lora_A is {shapes['lora_A']} and lora_B {shapes['lora_B']}; both must be matrices"
        raise ShapeError(message)
    raw = {local: tensors.read(key) for local, key in group.items()}
    rank, kernel = shapes["lora_A"][0], shapes["lora_A"][2:]
    layer = Layer(name, "conv" if kernel else "linear", (shapes["lora_B"][0], shapes["lora_A"][1], *kernel))
    if not _is_plain(method, raw, layer) or any(not param.stored for param in method.params(layer).values()):
        # The update needs the base's weight, or holds many experts: its spectrum does not follow from these factors.
        return AdaptedModule(name, shapes, method.scale, rank)
    with np.errstate(all="ignore"):
        factors = method.prepare(raw, layer)
        # The product's singular values are those of the small product of the factors' triangles.
        left, right = (np.linalg.qr(factor).R for factor in (factors["up"], factors["down"].T))
        product = left @ right.T
    if not np.isfinite(product).all():
        return AdaptedModule(name, shapes, method.scale, rank)
    spectrum = np.linalg.svd(product, compute_uv=False).astype(np.float64)
    return AdaptedModule(name, shapes, method.scale, rank, float(np.linalg.norm(spectrum)), tuple(map(float, spectrum)))


def _is_plain(method: AdapterConfig, raw: dict[str, np.ndarray], layer: Layer) -> bool:
    """Whether the tensors are those of one layer, by the method's own table."""
    if not all(array.size for array in raw.values()):
        return False
    try:
        method.check_shapes({name: array.shape for name, array in raw.items()}, layer)
    except MatchError:
        return False
    return True


def _checkpoint(tensors: Checkpoint) -> Inspection:
    config = tensors.config
    said = ("model_type", "architectures", "tie_word_embeddings", "vocab_size")
    facts: dict[str, Any] = {name: config[name] for name in said if name in config}
    if "quantization_config" in config:
        facts["quantisation"] = config["quantization_config"]
    facts["files"] = len(tensors.shards)
    found = _summary(tensors.path, "checkpoint", tensors, facts, (), {}, ())
    try:
        weights = find_quantised(tensors, config, tensors.read_stored)
    except PeftError as error:  # what is there is shown all the same
        facts["quantised weights"] = f"cannot be read: {error}"
        return found
    if not weights:
        return found
    facts["quantised weights"] = "; ".join(_codecs(weights.values(), tensors))
    parts = {name for weight in weights.values() for name in weight.names()}
    sizes = {name: weight.shape for name, weight in weights.items()}
    sizes |= {name: info.shape for name, info in tensors.items() if name not in parts}
    largest = sorted(sizes, key=lambda name: -math.prod(sizes[name]))[:5]
    return dataclasses.replace(
        found,
        parameters=sum(map(math.prod, sizes.values())),
        largest={name: sizes[name] for name in largest},
    )


def _codecs(weights: Iterable[StoredWeight], tensors: Checkpoint) -> Iterator[str]:
    """Each codec with its weights, and the bits that a number takes with its share of the scales."""
    by_codec: dict[str, list[StoredWeight]] = defaultdict(list)
    for weight in weights:
        by_codec[str(weight.codec)].append(weight)
    for codec, same in by_codec.items():
        nbytes = sum(tensors[name].nbytes for weight in same for name in weight.names())
        bits = 8 * nbytes / max(1, sum(math.prod(weight.shape) for weight in same))
        yield f"{len(same)} in {codec}, {bits:.2f} bits a number"


def _summary(
    path: Path,
    kind: str,
    tensors: Checkpoint,
    facts: dict[str, Any],
    modules: tuple[AdaptedModule, ...],
    shared: dict[str, tuple[int, ...]],
    replaced: tuple[str, ...],
) -> Inspection:
    infos = list(tensors.values())
    largest = sorted(infos, key=lambda info: -info.nbytes)[:5]
    return Inspection(
        path=str(path),
        kind=kind,
        tensors=len(infos),
        parameters=sum(math.prod(info.shape) for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=dict(Counter(dtype_name(info.code) for info in infos)),
        facts=facts,
        modules=modules,
        shared=shared,
        replaced=replaced,
        largest={info.name: info.shape for info in largest},
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
