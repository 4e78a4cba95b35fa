"""Adapter folders combined into one, in PEFT's layout: without torch, and mostly without the base."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from peftarray.adapter import Adapter
from peftarray.arrays import Array
from peftarray.combining.recipe import Recipe, checked_weights
from peftarray.combining.sets import CombinedAdapters, combine_sets
from peftarray.errors import MatchError, OutputError, UnsupportedError
from peftarray.formats.adapters import Adapters, Site
from peftarray.formats.folder import check_new
from peftarray.formats.names import WRAPPERS
from peftarray.formats.own_shapes import described_base
from peftarray.formats.peft import open_weights, read
from peftarray.formats.peft_config import read_config
from peftarray.formats.peft_writer import TOKENS, SavedAdapters, module_of, save_adapters
from peftarray.layers import Layer
from peftarray.methods import LoraConfig
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["CombineReport", "KindOfLayer", "combine_folders"]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class KindOfLayer:
    """What became of the modules of one name, such as every `q_proj`.

    Attributes:
        name: the last word of their names.
        modules: how many there are.
        least_rank, most_rank: of their adapters.
        norm: the Frobenius norm of all their updates together, as the combination defines them.
        error: the norm of what is missing, as a share of `norm`.
        worst: the largest such share of one module.
    """

    name: str
    modules: int
    least_rank: int
    most_rank: int
    norm: float
    error: float
    worst: float

    @property
    def energy(self) -> float:
        """The share of the squared norm that is kept."""
        return 1.0 - self.error**2


@dataclass(frozen=True)
class CombineReport:
    """What `combine_folders` did.

    Attributes:
        out: the folder.
        recipe: how the adapters were combined.
        adapters: folder -> weight, in their order.
        kinds: one entry for each kind of layer, by the last word of its name.
        rank: the result's `r`; `rank_pattern` has those that differ.
        parameters: how many numbers it holds.
        notes: what was taken over as it is.
    """

    out: str
    recipe: Recipe
    adapters: tuple[tuple[str, float], ...]
    kinds: tuple[KindOfLayer, ...]
    rank: int
    parameters: int
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """The norm of what is missing of all updates, as a share of theirs."""
        return _share([(kind.norm, kind.error) for kind in self.kinds])[1]

    @property
    def energy(self) -> float:
        """The share of all updates' squared norm that is kept."""
        return 1.0 - self.error**2

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        kinds = [asdict(kind) | {"energy": kind.energy} for kind in self.kinds]
        return asdict(self) | {"kinds": kinds, "error": self.error, "energy": self.energy}


def combine_folders(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    combination: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    epsilon: float = 0.1,
    gamma: float = 0.01,
    majority_sign: str = "total",
    seed: int = 0,
    base: str | Path | None = None,
) -> CombineReport:
    """Combine adapters that PEFT saved into one LoRA adapter. Nothing is at `out` before all of it is.

    Args:
        adapters: folders with `adapter_config.json` and `adapter_model.safetensors`.
        out: the folder to write; it must not exist.
        weights: one for each adapter, 1 by default.
        combination, rank, energy, density, epsilon, gamma, majority_sign, seed: see `Recipe`.
        base: the checkpoint that the adapters are for. LoRA needs it for DoRA alone; other methods need it, as their
            tensors do not tell the shapes of the layers.

    Raises:
        OutputError: `out` exists, or cannot be written.
        PeftError: of another kind, where the adapters cannot be read or combined.
    """
    recipe = Recipe(
        combination=combination,
        rank=rank,
        energy=energy,
        density=density,
        epsilon=epsilon,
        gamma=gamma,
        majority_sign=majority_sign,
        seed=seed,
    )
    folders = [Path(folder) for folder in adapters]
    target = Path(out)
    checked = checked_weights(weights, len(folders), recipe)
    check_new(target)
    checkpoint = None if base is None else Checkpoint.open(base)
    read_ones = [_read(folder, checkpoint) for folder in folders]
    sites = {name: site for _, found in read_ones for name, site in found.items()}
    _check_names(folders, [list(found) for _, found in read_ones], sites)
    # Thin factors gain nothing from threads, and lose much where the cores are busy; whole matrices gain.
    thin = recipe.way.space != "matrix" and checkpoint is None
    # What overflows is found to be no number, and refused.
    with threadpool_limits(1 if thin else None), np.errstate(all="ignore"):
        made = combine_sets(
            [saved for saved, _ in read_ones],
            checked,
            recipe,
            base=None if checkpoint is None else lambda name, layer: _stored_weight(sites[name], checkpoint),
            names=[str(folder) for folder in folders],
        )
    _write(target, made.saved)
    return _report(target, recipe, list(zip(map(str, folders), checked, strict=True)), made)


def _read(folder: Path, base: Checkpoint | None) -> tuple[SavedAdapters, dict[str, Site]]:
    """An adapter's arrays by module, and where their layers' weights lie in the base."""
    config = read_config(folder)
    layers: Mapping[str, Layer] | None = None
    if base is None:
        with open_weights(folder) as tensors:
            described, layers = described_base(folder, config, tensors)
    else:
        described = base
    found = read(folder, described, config=config, layers=layers)
    with found.tensors:
        sites = {module_of(site): site for site in found.sites}
        adapters = {
            name: Adapter(site.method, site.layer, _arrays(site, found, _reader(site, base)))
            for name, site in sites.items()
        }
        replace = {}
        for ref in found.replace.values():
            words = ref.name.removeprefix(_PREFIX).split(".")
            name = ".".join(word for word in words if word not in WRAPPERS)
            replace[name] = ref.read(found.tensors, found.tensors[ref.name].dtype.compute)
    return SavedAdapters(config, adapters, replace), sites


def _arrays(site: Site, found: Adapters, weight: Callable[[], np.ndarray]) -> dict[str, np.ndarray]:
    """A site's arrays in float32, or in float64 where its file holds that."""
    if any(ref.rows or ref.columns for ref in site.params.values()):
        message = f"{site.layer.name}: adapters of fused experts cannot be combined one by one; merge them (pa.merge)"
        raise UnsupportedError(message)
    codes = {found.tensors[ref.name].code for ref in site.params.values()}
    return found.params(site, np.dtype(np.float64 if "F64" in codes else np.float32), weight)


def _reader(site: Site, base: Checkpoint | None) -> Callable[[], np.ndarray]:
    def weight() -> np.ndarray:
        assert base is not None  # `described_base` refuses the methods that read it
        return np.asarray(site.layer.view(_stored_weight(site, base)))

    return weight


def _stored_weight(site: Site, base: Checkpoint) -> Array:
    """A layer's weight as the model stores it, from the pieces that the checkpoint holds."""
    columns = site.stored_matrix[1]
    parts = []
    for piece in site.pieces:
        shape = base[piece.tensor].shape
        whole = base.read(piece.tensor).reshape(math.prod(shape) // columns, columns)
        parts.append(whole[piece.at : piece.at + piece.rows])
    matrix = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return matrix.reshape(site.layer.stored_shape)


def _check_names(folders: Sequence[Path], modules: Sequence[Sequence[str]], sites: Mapping[str, Site]) -> None:
    """Refuse adapters that call one layer by two names: trained on classes with a head and without."""
    known: dict[tuple[str, int], str] = {}
    for names in modules:
        for name in names:
            other = known.setdefault((sites[name].pieces[0].tensor, sites[name].pieces[0].at), name)
            if other.removesuffix(TOKENS) != name.removesuffix(TOKENS):
                message = f"adapters call one layer {other} and {name}; save them from models of one class"
                raise MatchError(message)
    for place, names in enumerate(modules[1:], start=1):
        for first, second in ((modules[0], names), (names, modules[0])):
            ends = tuple(f".{name}" for name in first)
            if names and not set(first) & set(second) and any(name.endswith(ends) for name in second):
                message = (
                    f"{folders[0]} and {folders[place]} call their layers by names with another beginning (such as "
                    f"{modules[0][0]} and {names[0]}); save them from models of one class"
                )
                raise MatchError(message)


def _write(target: Path, saved: SavedAdapters) -> None:
    """The whole folder under another name first, which it then loses."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_adapters(partial, saved.config, saved.adapters, replace=saved.replace)
        partial.rename(target)
    except OSError as error:
        message = f"OUT {target} cannot be written ({error.strerror}); check the place and its permissions"
        raise OutputError(message) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _report(
    target: Path, recipe: Recipe, adapters: Sequence[tuple[str, float]], made: CombinedAdapters
) -> CombineReport:
    groups = defaultdict(list)
    for module, fit in made.fits.items():
        groups[module.rpartition(".")[2]].append(fit)
    kinds = []
    for name, fits in groups.items():
        norm, error = _share([(fit.norm, fit.error) for fit in fits])
        ranks = [fit.rank for fit in fits]
        worst = max(fit.error for fit in fits)
        kinds.append(KindOfLayer(name, len(fits), min(ranks), max(ranks), norm, error, worst))
    parameters = sum(adapter.num_parameters() for adapter in made.saved.adapters.values())
    config = made.saved.config
    assert isinstance(config, LoraConfig)
    return CombineReport(str(target), recipe, tuple(adapters), tuple(kinds), config.r, parameters, made.notes)


def _share(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The norm of several parts together, and the share of it that is missing, of each part's (norm, share)."""
    norm = math.hypot(*(size for size, _ in parts))
    return norm, math.hypot(*(size * share for size, share in parts)) / norm if norm else 0.0
