"""Tied heads: whether the output embedding still equals the input embedding after the merge, decided from the files.

A tied model has one matrix for both, and mostly one tensor on disk. An adapter that changes one of them, or each in
its own way, unties them: the merged checkpoint then holds both, and its `config.json` says so; otherwise a loader would
tie them again and drop one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peftarray.errors import MatchError
from peftarray.formats.adapters import Adapters, Ref, Site, same_values
from peftarray.formats.names import BaseNames
from peftarray.methods import TrainableTokensConfig
from peftarray.stores.checkpoint import Checkpoint
from peftarray.targets import is_saved

__all__ = ["settle_ties"]


def settle_ties(adapters: Adapters, names: BaseNames) -> Adapters:
    """The same adapters, with what must happen to the head.

    Args:
        adapters: as read; `replace` has live names.
        names: of the base; `names.untied` holds a head that the adapter addresses and the file lacks.

    Returns:
        Adapters whose `replace` has names on disk, with `untied`, `config_changes` and `notes` filled in.
    """
    changes: dict[str, Any] = {}
    notes: list[str] = []
    head = _tied_head(names)
    embedding = names.input_embedding(head or "")
    weight = f"{embedding}.weight"
    if embedding is not None:
        disk = names.places[weight][0].disk
        if disk in names.resized:
            changes["vocab_size"] = names.resized[disk]
            notes.append(f"vocabulary resized from {names.base[disk].shape[0]} to {names.resized[disk]} rows")
        _check_rows(adapters, names, weight, head)
        if head is not None:
            adapters, unties = _settle(adapters, names, embedding, head)
            if unties:
                changes["tie_word_embeddings"] = False
                notes.append(f"untied: {head}.weight no longer equals {weight}, and config.json says so")
    notes += [f"new tensor {name}" for name in adapters.replace if name not in names.places]
    on_disk = {
        names.places[name][0].disk if name in names.places else name: ref for name, ref in adapters.replace.items()
    }
    return dataclasses.replace(adapters, replace=on_disk, config_changes=changes, notes=tuple(notes))


def _check_rows(adapters: Adapters, names: BaseNames, weight: str, head: str | None) -> None:
    """Refuse a vocabulary that is resized at one end only."""
    other = f"{head or names.output_embedding()}.weight"
    if other not in names.places:
        return
    disks = [names.places[name][0].disk for name in (weight, other)]
    if disks[1] in names.untied and disks[1] not in names.resized:
        return  # it follows the embedding, or `_untied` refuses
    before = [names.base[names.untied.get(disk, disk)].shape[0] for disk in disks]
    after = [names.shape(name)[0] for name in (weight, other)]
    if before[0] == before[1] and after[0] != after[1]:
        message = (
            f"{adapters.name} brings {after[0]} rows for {weight} and {after[1]} for {other}, where "
            f"{names.base.path} has {before[0]} for both; merge into a base that is resized as it was for the training"
        )
        raise MatchError(message)


def _settle(adapters: Adapters, names: BaseNames, embedding: str, head: str) -> tuple[Adapters, bool]:
    """What happens to the module of a tied head, and whether it is untied."""
    weight, tied, bias = f"{embedding}.weight", f"{head}.weight", f"{head}.bias"
    disk = names.places[weight][0].disk
    there = names.places[tied][0].disk if tied in names.places else tied
    of_embedding = [site for site in adapters.sites if site.pieces[0].tensor == disk]
    of_head = [site for site in adapters.sites if site.pieces[0].tensor == there]
    others = [site for site in adapters.sites if site not in of_head]
    replace, unused = dict(adapters.replace), list(adapters.unused)
    if disk in names.resized and tied not in replace and not is_saved(embedding, adapters.config):
        # Not a trained copy of the embedding, but the matrix of both.
        replace[tied] = replace[weight]
        names.resized[there] = names.resized[disk]
        adapters = dataclasses.replace(adapters, replace=replace)
    mirrored = _mirrors(adapters, of_head, of_embedding)
    same = same_values(replace.get(weight), replace.get(tied), adapters.tensors)
    follows = mirrored or (not of_head and all(_replaces_rows(site) for site in of_embedding))
    follows = follows and (same or (tied not in replace and weight not in replace))
    beside = names.untied.get(bias, "")
    if follows and beside and bias in replace:
        follows = same_values(replace[bias], replace.get(beside, replace[bias]), adapters.tensors)
    if not follows:
        return _untied(adapters, names, head, of_embedding, of_head), True
    if mirrored:
        unused += [ref.name for site in of_head for ref in site.params.values()]
    if beside and bias in replace:
        ref = replace.pop(bias)
        unused += [ref.name] if replace.setdefault(beside, ref) != ref else []
    if same:
        copy = replace.pop(tied)
        unused += [copy.name] if copy != replace[weight] else []
    sites = tuple(others)
    if there in names.base:
        # The file holds both tensors, so what happens to the one must happen to the other.
        sites = (*others, *(_onto(site, there) for site in of_embedding))
        if weight in replace:
            replace[tied] = replace[weight]
    return dataclasses.replace(adapters, sites=sites, replace=replace, unused=tuple(unused)), False


def _untied(adapters: Adapters, names: BaseNames, head: str, of_embedding: list[Site], of_head: list[Site]) -> Adapters:
    """The same adapters with a head of its own, which starts as the embedding."""
    tied, bias = f"{head}.weight", f"{head}.bias"
    replace = dict(adapters.replace)
    if tied not in names.base:
        names.untie(head)
    source = names.untied.get(tied)
    if source in names.resized and tied not in replace:
        message = (
            f"{adapters.name} resizes {source} and unties {tied}, which it does not bring; save it with "
            "save_embedding_layers=True, or merge into a base that is resized as it was for the training"
        )
        raise MatchError(message)
    beside = names.untied.get(bias)
    if beside is not None and beside in replace:
        replace.setdefault(bias, replace[beside])
    elif beside is not None and bias in names.resized:
        replace[beside] = replace[bias]
    # What the adapter brings in another shape does not start as anything.
    untied = {name: start for name, start in names.untied.items() if name not in names.resized}
    there = names.places[tied][0].disk
    # Rows that are trained as tokens are so in the head too, below what it has of its own.
    rows = [] if tied in replace or any(map(_replaces_rows, of_head)) else list(filter(_replaces_rows, of_embedding))
    others = [site for site in adapters.sites if site not in of_head]
    sites = (*others, *(_onto(site, there) for site in rows), *of_head)
    return dataclasses.replace(adapters, sites=sites, replace=replace, untied=untied)


def _tied_head(names: BaseNames) -> str | None:
    """The module of a head that is tied to the input embedding, on disk or not; None where none is."""
    if names.untied:
        return next(iter(names.untied)).rpartition(".")[0]
    stored = names.output_embedding()
    if stored is not None:
        return stored if names.says_tied() else None
    return names.missing_head() if names.may_be_tied() else None


def _replaces_rows(site: Site) -> bool:
    return site.method.peft_type == TrainableTokensConfig.peft_type


def _mirrors(adapters: Adapters, of_head: list[Site], of_embedding: list[Site]) -> bool:
    """Whether the head's arrays are the embedding's, as PEFT writes them where it keeps the two tied."""
    if len(of_head) != 1 or len(of_embedding) != 1:
        return False
    head, embedding, tensors = of_head[0].params, of_embedding[0].params, adapters.tensors
    if _replaces_rows(of_head[0]) and _replaces_rows(of_embedding[0]):
        return of_head[0].method == of_embedding[0].method and all(
            same_values(ref, embedding.get(name), tensors) for name, ref in head.items()
        )
    if not adapters.config.keeps_tied() or head.keys() != {"lora_A", "lora_B"} or embedding.keys() != head.keys():
        return False  # a magnitude is an output's, and the outputs of the two are not the same
    return all(_transposed(head[a], embedding[b], tensors) for a, b in (("lora_A", "lora_B"), ("lora_B", "lora_A")))


def _transposed(a: Ref, b: Ref, tensors: Checkpoint) -> bool:
    return a.shape(tensors) == b.shape(tensors)[::-1] and bool((tensors.read(a.name) == tensors.read(b.name).T).all())


def _onto(site: Site, tensor: str) -> Site:
    pieces = tuple(dataclasses.replace(piece, tensor=tensor) for piece in site.pieces)
    return dataclasses.replace(site, pieces=pieces)
