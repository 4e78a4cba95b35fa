"""Tied heads: whether the output embedding still equals the input embedding after the merge, decided from the files.

A tied model has one matrix for both, and mostly one tensor on disk. An adapter that changes one of them, or each in
its own way, unties them: the merged checkpoint then holds both, and its `config.json` says so; otherwise a loader would
tie them again and drop one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peftarray.errors import MatchError
from peftarray.formats.adapters import Adapters, Ref, Site
from peftarray.formats.names import BaseNames
from peftarray.methods import TrainableTokensConfig
from peftarray.stores.checkpoint import Checkpoint

__all__ = ["settle_ties"]

_HEAD_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


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
    embedding = names.input_embedding()
    weight = f"{embedding}.weight"
    if embedding is not None:
        resized = weight in adapters.replace and adapters.replace[weight].shape(adapters.tensors) != names.shape(weight)
        if resized:
            changes["vocab_size"] = adapters.replace[weight].shape(adapters.tensors)[0]
            notes.append(f"vocabulary resized from {names.shape(weight)[0]} to {changes['vocab_size']} rows")
        head = _tied_head(names)
        if head is not None:
            adapters, unties = _settle(adapters, names, weight, head, resized)
            if unties:
                changes["tie_word_embeddings"] = False
                notes.append(f"untied: {head} no longer equals {weight}, and config.json says so")
    notes += [f"new tensor {name}" for name in adapters.replace if name not in names.places]
    on_disk = {
        names.places[name][0].disk if name in names.places else name: ref for name, ref in adapters.replace.items()
    }
    return dataclasses.replace(adapters, replace=on_disk, config_changes=changes, notes=tuple(notes))


def _settle(adapters: Adapters, names: BaseNames, weight: str, head: str, resized: bool) -> tuple[Adapters, bool]:
    """What happens to a tied head, and whether it is untied."""
    disk = names.places[weight][0].disk
    of_embedding = [site for site in adapters.sites if site.pieces[0].tensor == disk]
    of_head = [site for site in adapters.sites if site.pieces[0].tensor == head]
    replace, unused = dict(adapters.replace), list(adapters.unused)
    others = [site for site in adapters.sites if site not in of_head]
    mirrored = _mirrors(adapters, of_head, of_embedding)
    if mirrored:
        unused += [ref.name for site in of_head for ref in site.params.values()]
        of_head = []
    rows_only = all(site.method.peft_type == TrainableTokensConfig.peft_type for site in of_embedding)
    same = _same_values(replace.get(weight), replace.get(head), adapters.tensors)
    follows = (
        not of_head
        and (mirrored or rows_only)
        and (same or (head not in replace and (weight not in replace or resized)))
    )
    if not follows:
        untied = {head: disk} if head not in names.base and head not in replace else {}
        return dataclasses.replace(adapters, untied=untied), True
    sites = others
    if same:
        unused.append(replace.pop(head).name)
    if head in names.base:
        # The file holds both tensors, so what happens to the one must happen to the other.
        sites = [*others, *(_onto(site, head) for site in of_embedding)]
        if weight in replace:
            replace[head] = replace[weight]
    return dataclasses.replace(adapters, sites=tuple(sites), replace=replace, unused=tuple(unused)), False


def _tied_head(names: BaseNames) -> str | None:
    """The tensor of a head that is tied to the input embedding, on disk or not; None where none is."""
    if names.untied:
        return next(iter(names.untied))
    stored = names.output_embedding()
    said = _says_tied(names.base.config)
    if stored is not None:
        return names.places[f"{stored}.weight"][0].disk if said else None
    architectures = names.base.config.get("architectures")
    has_head = isinstance(architectures, list) and any(str(name).endswith(_HEAD_CLASSES) for name in architectures)
    return "lm_head.weight" if has_head and said is not False else None


def _says_tied(config: dict[str, Any]) -> bool | None:
    inner = config.get("text_config")
    said = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    return said if isinstance(said, bool) else None


def _mirrors(adapters: Adapters, of_head: list[Site], of_embedding: list[Site]) -> bool:
    """Whether the head's factors are the embedding's, transposed, which PEFT writes where it keeps the two tied."""
    if not (len(of_head) == len(of_embedding) == 1 and adapters.config.keeps_tied()):
        return False
    head, embedding, tensors = of_head[0].params, of_embedding[0].params, adapters.tensors
    for mine, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        a, b = tensors.read(head[mine].name), tensors.read(embedding[other].name)
        if a.shape != b.shape[::-1] or (a != b.T).any():
            message = (
                f"{adapters.name}: ensure_weight_tying is set, and the factors of head and embedding differ; save "
                "the adapter again"
            )
            raise MatchError(message)
    return True


def _same_values(a: Ref | None, b: Ref | None, tensors: Checkpoint) -> bool:
    """Whether two whole tensors have equal bytes, compared a few rows at a time."""
    if a is None or b is None:
        return False
    first, second = tensors[a.name], tensors[b.name]
    if (first.shape, first.code) != (second.shape, second.code):
        return False
    rows = first.shape[0]
    step = max(1, (4 << 20) * rows // max(1, first.nbytes))
    chunks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
    return all(
        tensors.read_stored(a.name, part).tobytes() == tensors.read_stored(b.name, part).tobytes() for part in chunks
    )


def _onto(site: Site, tensor: str) -> Site:
    pieces = tuple(dataclasses.replace(piece, tensor=tensor) for piece in site.pieces)
    return dataclasses.replace(site, pieces=pieces)
