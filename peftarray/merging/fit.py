"""Whether adapters and a base can be merged at all, beyond what a reader checks of one adapter."""

from __future__ import annotations

from collections.abc import Sequence

from peftarray.errors import ShapeError, UnsupportedError
from peftarray.formats.adapters import Adapters, Site
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["check_fit"]


def check_fit(base: Checkpoint, adapters: Sequence[Adapters]) -> None:
    """Refuse what has no right result.

    Raises:
        ShapeError: the tensors that hold a weight or its bias do not make it up.
        UnsupportedError: adapters contradict each other, or the base's tensors are not its weights.
    """
    for adapter in adapters:
        for site in adapter.sites:
            _check_site(site, base)
    _refuse_untied_and_followed(adapters)
    _refuse_scaled(base, adapters)


def _check_site(site: Site, base: Checkpoint) -> None:
    """An expert of other dimensions than the first one's, say, makes a stack that is none."""
    rows, _ = site.stored_matrix
    found = sum(piece.rows for piece in site.pieces)
    if found != rows:
        names = ", ".join(piece.tensor for piece in site.pieces)
        message = f"{site.layer.name} has {rows} rows, and {names} in {base.path} have {found}; the base is damaged"
        raise ShapeError(message)
    if site.bias is None or site.bias not in base or "bias" not in site.method.touches(site.layer):
        return
    if base[site.bias].shape != (site.layer.out,):
        message = f"{site.bias} is {base[site.bias].shape}, and its layer has {site.layer.out} outputs; they must agree"
        raise ShapeError(message)


def _refuse_untied_and_followed(adapters: Sequence[Adapters]) -> None:
    """One adapter unties the head and another relies on its following the embedding: no merged weights serve both."""
    untied = {name: source for adapter in adapters for name, source in adapter.untied.items()}
    for adapter in adapters:
        changed = _changed(adapter)
        for head, embedding in untied.items():
            if embedding in changed and head not in adapter.untied and head not in changed:
                message = (
                    f"{adapter.name} changes the tied {embedding}, and another adapter unties {head}; merge them "
                    "one after the other"
                )
                raise UnsupportedError(message)


def _refuse_scaled(base: Checkpoint, adapters: Sequence[Adapters]) -> None:
    """An 8-bit float beside a tensor of scales is not the weight: the product of the two is."""
    for name in sorted({name for adapter in adapters for name in _changed(adapter)}):
        if name not in base or not base[name].code.startswith("F8"):
            continue
        module = name.rpartition(".")[0]
        scales = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale_weight", f"{name}._scale")
        found = next((other for other in scales if other in base), None)
        if found is not None or "quantization_config" in base.config:
            why = f"{found} scales it" if found else "config.json has a quantization_config"
            message = (
                f"{name} is stored as {base[name].code}, and {why}: the base is quantised; merge into the original "
                "checkpoint, or dequantise it first"
            )
            raise UnsupportedError(message)


def _changed(adapter: Adapters) -> set[str]:
    """The tensors of the base whose weights an adapter changes or replaces."""
    return {piece.tensor for site in adapter.sites for piece in site.pieces} | set(adapter.replace)
