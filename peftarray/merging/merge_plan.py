"""The plan of a merge, made from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftarray.dtypes import StorageDType, storage_dtype
from peftarray.errors import MatchError, UnsupportedError
from peftarray.formats.adapters import Adapters
from peftarray.merging.base import Base
from peftarray.merging.contributions import Contribution, columns_of, contributions_of, segments_of
from peftarray.merging.encoded import Encoded, planned_tensors
from peftarray.merging.fit import check_fit
from peftarray.merging.origin import Origin, StoredOrigin
from peftarray.merging.placement import HOST
from peftarray.merging.plan import Form, Item, Output, facts_of, packed_plan
from peftarray.merging.plan import Plan as Plan
from peftarray.stores.safetensors import TensorInfo

__all__ = ["make_plan"]


def make_plan(
    base: Base, adapters: Sequence[tuple[Adapters, float]], form: Form | None = None, *, place: str = HOST.name
) -> Plan:
    """Plan the merge of adapters, each with its weight, into a base. Reads nothing but what was read already.

    `place` says where the updates will be computed: another library may round them otherwise.

    Raises:
        MatchError: two adapters contradict each other.
        UnsupportedError: a tensor to be changed is not of a floating dtype, or what is asked has no meaning.
    """
    form = form or Form()
    check_fit(base.tensors, [adapter for adapter, _ in adapters])
    # One of no weight leaves everything as it is, the sign of a zero included.
    adapters = [(adapter, weight) for adapter, weight in adapters if weight]
    contributions = contributions_of(adapters)
    again = {}
    if form.requantise:
        layout = base.require_layout()
        for name in [name for name in base.quantised if name in contributions]:
            code = base.tensors[name].code
            again[name] = planned_tensors(layout, base.quantised[name], base.stated, code, base.files)
    groups = [
        (file, [item for stored in shard.tensors for item in _items(stored, base, contributions, form, again)])
        for file, shard in base.files.shards.items()
    ]
    new = {name: found for name, found in sorted(contributions.items()) if name not in base.tensors}
    if new:
        groups[-1][1].extend(_item(name, *_new(name, base, adapters, found, form.dtype)) for name, found in new.items())
    config = base.files.config
    if base.quantised and not form.quantised:
        config = base.plain_config()
    elif form.quantised:
        kept = [name for name in base.quantised if name in contributions and not form.requantise]
        config = base.config_with_plain([*kept, *new])
    facts = {"adapters": [[facts_of(a.tensors), repr(a.config), weight] for a, weight in adapters], "place": place}
    return packed_plan(base, adapters, groups, form, config=config, facts=facts)


def _items(
    stored: str,
    base: Base,
    contributions: Mapping[str, tuple[Contribution, ...]],
    form: Form,
    again: Mapping[str, tuple[TensorInfo, ...]],
) -> tuple[Item, ...]:
    """What becomes of a tensor that the base's files hold; `again` has the tensors of weights that are requantised."""
    name = base.owner.get(stored, stored)
    found, weight = contributions.get(name, ()), base.quantised.get(name)
    if weight is None:
        return (_item(name, *_start(name, base, found, form.dtype)),)
    if form.quantised and not found:
        return (_copy(stored, base),)
    if stored == weight.names()[0]:  # the others of its tensors go where this one goes
        if name in again:
            return (_encoded(name, base, again[name], found),)
        return (_item(name, *_start(name, base, found, form.keep_touched or form.dtype)),)
    passes = name in again and stored not in {info.name for info in again[name]}
    return (_copy(stored, base),) if passes else ()


def _copy(stored: str, base: Base) -> Item:
    """A tensor whose bytes pass through."""
    info = base.files[stored]
    origin = StoredOrigin(base.files.shard_of(stored), info)
    return Item((info,), lambda places: Output(places[0], origin, info.shape[-1] if info.shape else 1))


def _encoded(name: str, base: Base, tensors: tuple[TensorInfo, ...], found: tuple[Contribution, ...]) -> Item:
    """A weight that is quantised again."""
    _, origin, kept = _start(name, base, found, None)
    if origin.shape != base.tensors[name].shape:
        message = (
            f"{name} gets another shape, {origin.shape}, so it cannot be quantised as it was; leave out --requantise"
        )
        raise UnsupportedError(message)
    columns = columns_of(name, origin.shape, kept)
    segments = segments_of(name, origin.shape, columns, kept)
    weight = base.quantised[name]
    layout, before = base.require_layout(), base.stored_origin(name)

    def placed(places: tuple[TensorInfo, ...]) -> Encoded:
        return Encoded(weight, layout, base.stated, base.tensors[name].code, origin, columns, segments, places, before)

    return Item(tensors, placed)


def _item(name: str, code: str, origin: Origin, found: tuple[Contribution, ...]) -> Item:
    shape = origin.shape
    columns = columns_of(name, shape, found)
    segments = segments_of(name, shape, columns, found)
    info = TensorInfo(name, code, shape, 0, origin.nbytes_as(code))
    return Item((info,), lambda places: Output(places[0], origin, columns, segments))


# Code to write, what the tensor starts as, and what changes it.
_Started = tuple[str, Origin, tuple[Contribution, ...]]


def _start(name: str, base: Base, found: tuple[Contribution, ...], dtype: StorageDType | None) -> _Started:
    """Code, origin and contributions of a tensor that the base has."""
    info = base.tensors[name]
    known = storage_dtype(info.code)
    floating = known is not None and known.floating
    for contribution in found:
        ref = contribution.replacement
        if ref is None:
            continue
        other = contribution.adapters.tensors[ref.name]
        brought = storage_dtype(other.code)
        if floating != (brought is not None and brought.floating) or (not floating and other.code != info.code):
            message = (
                f"{name} is {info.code} in the base and {other.code} in {contribution.adapters.name}; they must agree"
            )
            raise MatchError(message)
        if other.shape != info.shape or not floating:
            if len(found) > 1 or contribution.weight != 1:
                message = (
                    f"{name} is replaced whole by {contribution.adapters.name}, which cannot be weighted "
                    f"({contribution.weight:g}) or summed; give it the scale 1 and no other adapter for this "
                    "tensor"
                )
                raise UnsupportedError(message)
            rest = Contribution(contribution.adapters, 1.0, None, contribution.parts, contribution.biases)
            kept = (rest,) if rest.parts or rest.biases else ()
            return _written(info.code, dtype), _brought(contribution.adapters, ref.name), kept
    if found and not floating:
        message = (
            f"{name} is stored as {info.code}, which is not a floating dtype: the base is quantised or packed; "
            "merge into the original checkpoint, or dequantise it first"
        )
        raise UnsupportedError(message)
    return _written(info.code, dtype), base.origin(name), found


def _new(
    name: str,
    base: Base,
    adapters: Sequence[tuple[Adapters, float]],
    found: tuple[Contribution, ...],
    dtype: StorageDType | None,
) -> _Started:
    """Code, origin and contributions of a tensor that the base lacks."""
    for adapter, _ in adapters:
        if name in adapter.untied:
            source = adapter.untied[name]
            changing = tuple(c for c in found if c.replacement or c.parts or c.biases)
            return _written(base.tensors[source].code, dtype), base.origin(source), changing
    if len(found) > 1 or found[0].weight != 1:
        message = (
            f"{name} is new, brought by {found[0].adapters.name}; it cannot be weighted or summed; give that "
            "adapter the scale 1"
        )
        raise UnsupportedError(message)
    ref = found[0].replacement
    if ref is None:
        message = f"{name} is changed by {found[0].adapters.name}, and the base does not have it"
        raise MatchError(message)
    origin = _brought(found[0].adapters, ref.name)
    kept = (Contribution(found[0].adapters, 1.0, None, found[0].parts, found[0].biases),) if found[0].parts else ()
    return _written(origin.info.code, dtype), origin, kept


def _brought(adapter: Adapters, name: str) -> StoredOrigin:
    """A tensor of an adapter's file."""
    return StoredOrigin(adapter.tensors.shard_of(name), adapter.tensors[name])


def _written(code: str, dtype: StorageDType | None) -> str:
    known = storage_dtype(code)
    # Only numbers that a model computes with are converted: not indices, not packed or scaled codes.
    return dtype.code if dtype is not None and known is not None and known.floating and known.bits > 8 else code
