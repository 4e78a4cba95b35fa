"""Which modules a configuration targets: strings in, strings out, by PEFT's rules.

Order of the rules: an excluded name is never targeted; nor is what `modules_to_save` names, or its children; a string
is a pattern for the whole name; an exact name in a list is targeted whatever the layers; a name that ends in `.` and an
item of the list is targeted if its layer is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from peftarray import patterns
from peftarray.errors import ConfigError, MatchError, nearest
from peftarray.method import AdapterConfig

if TYPE_CHECKING:
    from peftarray.prompts import VirtualTokens

__all__ = ["ends_with", "is_saved", "is_targeted", "targeted"]


def ends_with(name: str, items: Iterable[str]) -> bool:
    """Whether a dotted name is one of `items` or ends with one, at a dot.

    Example:
        >>> ends_with("layers.0.q_proj", ["q_proj"]), ends_with("layers.0.xq_proj", ["q_proj"])
        (True, False)
    """
    return any(name == item or name.endswith("." + item) for item in items)


def is_saved(name: str, config: AdapterConfig | VirtualTokens) -> bool:
    """Whether `modules_to_save` names this module or one around it."""
    dotted = f".{name}."
    return any(f".{item}." in dotted for item in _items(config.modules_to_save))


def is_targeted(name: str, config: AdapterConfig) -> bool:
    """Whether a configuration adapts the module called `name` (by its name alone: see `targeted` for `"all-linear"`).

    Example:
        >>> from peftarray import LoraConfig
        >>> is_targeted("model.layers.3.q_proj", LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
        False
    """
    if _is_excluded(name, config):
        return False
    wanted = config.target_modules
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return patterns.fullmatch(wanted, name, "target_modules")
    if name in wanted:
        return True
    return ends_with(name, wanted) and _in_layers(name, config)


def targeted(modules: Collection[str], config: AdapterConfig, heads: Collection[str] = ()) -> list[str]:
    """The modules that a configuration adapts, in their order.

    Args:
        modules: names of the modules that have a weight a method can adapt.
        config: the configuration.
        heads: output layers, which `"all-linear"` leaves out.

    Raises:
        ConfigError: no target is given.
        MatchError: nothing matches.
    """
    wanted = config.target_modules
    if wanted is None:
        message = f"{type(config).__name__}.target_modules is None; give a pattern, a list of names, or 'all-linear'"
        raise ConfigError(message)
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        found = [name for name in modules if name not in heads and not _is_excluded(name, config)]
    else:
        found = [name for name in modules if is_targeted(name, config)]
    if not found:
        first = wanted if isinstance(wanted, str) else next(iter(wanted), "")
        message = (
            f"{type(config).__name__}.target_modules is {wanted!r}, which matches none of {len(modules)} "
            f"modules{nearest(first, modules)}"
        )
        raise MatchError(message)
    return found


def _is_excluded(name: str, config: AdapterConfig) -> bool:
    excluded = config.exclude_modules
    if isinstance(excluded, str) and patterns.fullmatch(excluded, name, "exclude_modules"):
        return True
    return (not isinstance(excluded, str) and ends_with(name, excluded or ())) or is_saved(name, config)


def _in_layers(name: str, config: AdapterConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers in ([], ()):
        return True
    index = None
    for pattern in _items(config.layers_pattern) or (r"[^.]*",):
        # Without a pattern a layer's number needs two components before it; with one, the pattern may stand first.
        head = r"(?:^|.*?\.)" if config.layers_pattern else r".*?\."
        found = patterns.match(rf"{head}{pattern}\.(?P<index>\d+)\.", name, "layers_pattern")
        if found is not None:
            index = int(found.group("index"))
            break
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _items(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
