"""The conformance suite of methods: the laws of `peftarray.method`, tried on many layers and array libraries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from peftarray.errors import ConfigError
from peftarray.layers import Kind
from peftarray.method import AdapterConfig
from peftarray.testing.laws import ARRAY_LAWS, LAWS, VALUE_LAWS, Law
from peftarray.testing.trial import Case, LawError, Library, Trial, find_libraries

__all__ = [
    "ARRAY_LAWS",
    "LAWS",
    "VALUE_LAWS",
    "Case",
    "LawError",
    "Library",
    "Trial",
    "check_law",
    "check_method",
    "find_libraries",
    "fitting_cases",
]

# Shapes as the model stores the weight, the smallest first: where a method's blocks do not fit, larger ones follow.
_SHAPES: dict[Kind, tuple[tuple[tuple[int, ...], ...], ...]] = {
    "linear": (
        ((6, 10), (12, 8), (16, 24), (64, 96), (256, 512), (512, 768)),
        ((10, 6), (8, 12), (24, 16), (96, 64), (512, 256), (768, 512)),
    ),
    "embedding": (((12, 5), (20, 12), (24, 16), (96, 64), (768, 512)),),
    "conv": (
        ((6, 4, 3), (8, 12, 3), (32, 24, 3), (128, 96, 3)),
        ((6, 4, 3, 2), (8, 12, 3, 3), (32, 24, 3, 3), (128, 96, 3, 3)),
        ((6, 4, 2, 1, 3), (8, 12, 3, 3, 3), (32, 24, 3, 3, 3)),
    ),
}


def check_method(
    config: AdapterConfig, *, libraries: Sequence[str] | None = None, cases: Iterable[Case] = ()
) -> tuple[Case, ...]:
    """Check that a method keeps every law of its protocol, on each kind of layer that it names.

    Args:
        config: the method, with the settings to try.
        libraries: names of backends; all that are installed and work if None. NumPy is enough, and needed.
        cases: more layers to try, such as those that the suite does not think of.

    Returns:
        The cases that were tried.

    Raises:
        LawError: a law does not hold; the message names the law, the case, the library and the numbers.

    Example:
        >>> from peftarray import LoraConfig
        >>> len(check_method(LoraConfig(r=2), libraries=["numpy"]))
        7
    """
    chosen = (*fitting_cases(config), *cases)
    for library in find_libraries(libraries):
        for case in chosen:
            for law in LAWS if library.name == "numpy" else ARRAY_LAWS:
                check_law(law, Trial(case, library))
    return chosen


def check_law(law: Law, trial: Trial) -> None:
    """Try one law on one case.

    Raises:
        LawError: it does not hold, or what it asked of the method raised an error.
    """
    name = law.__name__.replace("_", " ")
    where = f'"{name}" does not hold for {type(trial.case.config).__name__}, {trial.case}, {trial.library.name}'
    try:
        law(trial)
    except LawError as error:
        message = f"{where}: {error}"
        raise LawError(message) from None
    except Exception as error:
        message = f"{where}: {type(error).__name__}: {error}"
        raise LawError(message) from error


def fitting_cases(config: AdapterConfig) -> Iterator[Case]:
    """Layers of every kind that the method takes, such that every axis it may be cut along has two blocks at least.

    Raises:
        LawError: of a kind that the method names, it takes no layer that the suite knows.
    """
    for kind in config.kinds:
        found = [case for shapes in _SHAPES[kind] if (case := _first_fit(config, kind, shapes)) is not None]
        if not found:
            message = (
                f"{type(config).__name__} names the kind {kind!r} and takes none of {_SHAPES[kind]}; give it other "
                "settings for the check, or leave the kind out"
            )
            raise LawError(message)
        yield from found
        if kind == "linear":
            yield Case(config, kind, found[0].shape[::-1], transposed=True)


def _first_fit(config: AdapterConfig, kind: Kind, shapes: Iterable[tuple[int, ...]]) -> Case | None:
    for shape in shapes:
        case = Case(config, kind, shape)
        try:
            prepared = case.method.prepare(case.params(), case.layer)
        except ConfigError:  # blocks that do not fit this shape
            continue
        except Exception:  # the laws will say it better
            return case
        if not case.method.num_parameters(case.layer):
            continue
        sizes = {"out": case.layer.out, "in": case.layer.fan_in}
        axes = [axis for axis in case.method.tiles.split() if axis == "out" or kind != "conv"]
        if all(case.method.granularity(prepared, case.layer, axis) < sizes[axis] for axis in axes):
            return case
    return None
