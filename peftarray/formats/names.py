"""The names of a base: live module paths, the tensors on disk behind them, and how an adapter's keys line up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from peftarray.dtypes import dtype_name, storage_dtype
from peftarray.errors import MatchError, nearest
from peftarray.formats.adapters import Piece
from peftarray.formats.models import (
    BASE_PREFIXES,
    Place,
    input_embedding_names,
    is_conv1d,
    live_places,
    output_embedding_names,
    parameter_order,
    stored_transposed,
    types_inside,
)
from peftarray.layers import Layer
from peftarray.stores.checkpoint import Checkpoint
from peftarray.targets import ends_with

__all__ = ["WRAPPERS", "Alignment", "BaseNames", "Split"]

# Words that PEFT's wrappers put into a path, and that no file of a base has.
WRAPPERS = frozenset({"base_layer", "ln_tuning_layers", "token_adapter"})
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Classes whose output embedding may be tied. Tied, it is in no file; where it is not called `lm_head`, and leaves no
# bias behind either, only the architecture tells its name.
_HEAD_CLASSES = (
    *("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration", "MTModel"),
    *("ForSpeechToText", "ForTextToText"),
)
_HEADS = {
    **dict.fromkeys(("ctrl", "funnel"), "lm_head"),
    **dict.fromkeys(("whisper", "moonshine", "moonshine_streaming", "canary"), "proj_out"),
    **dict.fromkeys(("biogpt", "trocr"), "output_projection"),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), "language_model.lm_head"),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "text_model.lm_head"),
    **dict.fromkeys(("t5gemma", "t5gemma2"), "lm_head.out_proj"),
    "gpt_neox_japanese": "embed_out",
    "speecht5": "text_decoder_postnet.lm_head",
}


@dataclass(frozen=True)
class Split:
    """An adapter key, split at the longest prefix that is a module of the base.

    Attributes:
        module: the module's live path.
        local: what remains of the key.
        depth: how many wrappers stood in the path; tells nested ones apart.
    """

    module: str
    local: str
    depth: int


@dataclass(frozen=True)
class Alignment:
    """How an adapter's module paths become the base's: one prefix removed, or one added.

    A head class puts a prefix before the names of its base model, so that files of the two differ by it.
    """

    removed: str = ""
    added: str = ""

    def to_base(self, path: str) -> str:
        return self.added + path.removeprefix(self.removed)

    def to_adapter(self, path: str) -> str:
        """The path as the adapter's patterns see it."""
        return self.removed + path.removeprefix(self.added)


class BaseNames:
    """What a base's tensors are called in memory and on disk.

    Attributes:
        layers: what the caller knows of layers, by their paths.
        places: live (or disk) tensor name -> where it lies. Adapters of older releases use the disk names.
        live: the live names alone.
        modules: every module path that holds a tensor.
        untied: head tensor that the file lacks -> the embedding tensor it equals.
        resized: tensor on disk -> the number of rows that the adapter's tensor has in its place.
    """

    def __init__(self, base: Checkpoint, layers: Mapping[str, Layer] | None = None) -> None:
        self.base = base
        self.layers = dict(layers or {})
        kind = base.config.get("model_type")
        self.model_type = kind if isinstance(kind, str) else None
        shapes = {name: info.shape for name, info in base.items()}
        self._inner = types_inside(base.config)
        self.live = live_places(self.model_type, shapes, self._inner)
        self.places: dict[str, tuple[Place, ...]] = {name: (Place(name),) for name in base} | self.live
        self.modules = {name.rpartition(".")[0] for name in self.places}
        self._paths = {path for module in self.modules for path in _prefixes(module)}
        self.untied: dict[str, str] = {}
        # Every key of an adapter asks for the embeddings; the answers change only when a head is untied.
        self._answers: dict[object, str | None] = {}
        self.resized: dict[str, int] = {}

    def split(self, key: str) -> Split | None:
        """The module and the local name of an aligned key, None where no module of the base begins it."""
        words = key.split(".")
        module, best, depth = "", None, 0
        for i, word in enumerate(words[:-1]):
            longer = f"{module}.{word}" if module else word
            if longer in self._paths:
                module = longer
            elif word in WRAPPERS:
                depth += 1
            else:
                break
            if module in self.modules:
                best = Split(module, ".".join(words[i + 1 :]), depth)
        return best

    def split_embedding(self, key: str) -> tuple[str, str]:
        """The module and the local name of a key that has an input embedding's name in it; empty where it has none."""
        for name in input_embedding_names(self.model_type):
            head, found, local = f".{key}".partition(f".{name}.")
            if found:
                return f"{head}.{name}"[1:], local
        return "", ""

    def align(self, keys: Iterable[str]) -> Alignment:
        """The alignment under which most keys name a module of the base.

        Raises:
            MatchError: no key does, under any known prefix.
        """
        pool = list(keys)
        if pool and all(self._fits(key, Alignment()) for key in pool):
            return Alignment()
        candidates = [Alignment()]
        for prefix in filter(None, BASE_PREFIXES):
            if any(key.startswith(prefix) for key in pool):
                candidates.append(Alignment(removed=prefix))
            if any(path.startswith(prefix) for path in self._paths):
                candidates.append(Alignment(added=prefix))
        scores = [sum(self._fits(key, candidate) for key in pool) for candidate in candidates]
        if not max(scores, default=0) and not any(self.head_in(key, None) for key in pool):
            message = (
                f"none of the adapter's {len(pool)} tensors names a module of {self.base.path} (the first is "
                f"{pool[0] if pool else 'none'}){nearest(pool[0], self.modules) if pool else ''}; check that "
                "adapter and base belong together"
            )
            raise MatchError(message)
        return candidates[scores.index(max(scores))]

    def _fits(self, key: str, alignment: Alignment) -> bool:
        if alignment.removed and not key.startswith(alignment.removed):
            return False
        found = self.split(alignment.to_base(key))
        return found is not None and len(found.module) >= len(alignment.added)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The live shape of a tensor, from the headers; of the one that the adapter brings where it has other rows."""
        places = self.places[tensor]
        first = places[0]
        shape = self._stored_shape(first)
        if first.flipped:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if first.expert is None:
            return shape
        experts = len({place.expert for place in places})
        rows = sum(self.base[place.disk].shape[0] for place in places[: first.part[1]])
        return (experts, rows, *shape[1:])

    def dtype(self, tensor: str) -> str:
        """What a tensor is stored in, as people call it; empty where that is no floating dtype."""
        disk = self.places[tensor][0].disk
        dtype = storage_dtype(self.base[self.untied.get(disk, disk)].code)
        return dtype_name(dtype.code) if dtype is not None and dtype.floating else ""

    def pieces(self, tensor: str, expert: int | None = None) -> tuple[Piece, ...]:
        """Where the stored matrix of a live tensor lies, or that of one expert of a stack."""
        places = self.places[tensor]
        if expert is None or places[0].expert is None:
            rows = self._rows(places[0], expert)
            at = 0 if expert is None else expert * rows
            return (Piece(places[0].disk, 0, rows, at),)
        found, start = [], 0
        for place in places:
            if place.expert == expert:
                rows = self._rows(place, None)
                found.append(Piece(place.disk, start, rows))
                start += rows
        return tuple(found)

    def _rows(self, place: Place, expert: int | None) -> int:
        return self._stored_shape(place)[0 if expert is None else 1]

    def _stored_shape(self, place: Place) -> tuple[int, ...]:
        shape = self.base[self.untied.get(place.disk, place.disk)].shape
        return (self.resized.get(place.disk, shape[0]), *shape[1:]) if shape else shape

    def flipped(self, tensor: str) -> bool:
        """Whether the file holds the transpose of the live tensor (its last two axes)."""
        return self.places[tensor][0].flipped

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a module's weight is stored `(in, out)`; None where the architecture is not known."""
        return is_conv1d(self.model_type, module, self._inner)

    def parameter_order(self) -> tuple[str, ...]:
        """Parameters of an experts module in the order of registration."""
        return parameter_order(self.model_type, self._inner)

    def stored_transposed(self, parameter: str) -> bool:
        """Whether a stacked parameter is `(experts, in, out)` in memory."""
        return stored_transposed(self.model_type, parameter, self._inner)

    def input_embedding(self, head: str = "") -> str | None:
        """The live module of the input embedding, None where no known name is there.

        Args:
            head: of the model's parts, prefer the one that this module belongs to.
        """
        return self._first(input_embedding_names(self.model_type), f"{head.partition('.')[0]}.")

    def output_embedding(self) -> str | None:
        """The live module of the output embedding, None where the file has none (it is tied, or there is no head)."""
        return self._first(output_embedding_names(self.model_type))

    def _first(self, names: tuple[str, ...], part: str = "") -> str | None:
        return self._once((names, part), lambda: self._search(names, part))

    def _search(self, names: tuple[str, ...], part: str) -> str | None:
        for name in names:
            found = [m for m in self.modules if ends_with(m, [name]) and f"{m}.weight" in self.places]
            if found:
                return min(found, key=lambda module: (not module.startswith(part), module.count("."), module))
        return None

    def _once(self, question: object, answer: Callable[[], str | None]) -> str | None:
        if question not in self._answers:
            self._answers[question] = answer()
        return self._answers[question]

    def missing_head(self) -> str | None:
        """The module path of an output embedding whose weight the file lacks, None where there is none.

        Its bias, or other tensors of the same head, betray it; of a head without, only the class is known.
        """
        return self._once("missing head", self._missing_head)

    def _missing_head(self) -> str | None:
        if self.output_embedding() is not None:
            return None
        classes = self.base.config.get("architectures")
        has_head = isinstance(classes, list) and any(str(name).endswith(_HEAD_CLASSES) for name in classes)
        known = _HEADS.get(self.model_type or "")
        if known is not None:
            return known if has_head or known in self.modules else None
        without = sorted(module for module in self.modules if f"{module}.weight" not in self.places)
        for name in output_embedding_names(self.model_type):
            parent, _, last = name.rpartition(".")
            for module in without:
                if ends_with(module, [name]) and f"{module}.bias" in self.places:
                    return module
                if parent and ends_with(module, [parent]):
                    return f"{module}.{last}"
        return "lm_head" if has_head else None

    def head_in(self, key: str, module: str | None) -> str | None:
        """The module path of an output embedding that begins `key` and that the file lacks, None if there is none.

        Args:
            key: a key of the adapter.
            module: the module of the base that begins it, None where none does.
        """
        known = self.missing_head()
        for name in [known] if known else output_embedding_names(self.model_type) if module is None else []:
            head, found, _ = f".{key}".partition(f".{name}.")
            path = f"{head}.{name}"[1:]
            if found and f"{path}.weight" not in self.places and len(path) >= len(module or ""):
                return path
        return None

    def says_tied(self) -> bool | None:
        """Whether `config.json` says that the output embedding is the input embedding; None where it is silent."""
        inner = self.base.config.get("text_config")
        default = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
        said = self.base.config.get("tie_word_embeddings", default)
        return said if isinstance(said, bool) else None

    def is_tied(self, module: str) -> bool:
        """Whether a module is the output embedding, tied to the input embedding."""
        stored = self.output_embedding()
        return f"{module}.weight" in self.untied or (module == stored and self.says_tied() is True)

    def may_be_tied(self) -> bool:
        """Whether a head that the file lacks may be the input embedding."""
        return self.input_embedding() is not None and self.says_tied() is not False

    def untie(self, head: str) -> None:
        """Let a head that the file lacks be addressed: new tensors, which start as those that they were tied to."""
        embedding = f"{self.input_embedding(head)}.weight"
        # Masked language models have a bias beside the output embedding, and tie the embedding's own bias to it.
        ties = {f"{head}.weight": embedding, f"{head}.bias": f"{head.rpartition('.')[0]}.bias"}
        for tensor, source in ties.items():
            if tensor in self.places or source not in self.places:
                continue
            disk = self.places[source][0].disk
            if self.base[disk].shape[0] == self.base[self.places[embedding][0].disk].shape[0]:
                self.untied[tensor] = disk
                self.places[tensor] = (Place(tensor),)
        self.modules.add(head)
        self._paths |= _prefixes(head)
        self._answers.clear()

    def adaptable(self) -> list[str]:
        """Live modules with a weight of two axes or more, without layers that the model's class does not have."""
        count = self.base.config.get("num_hidden_layers")
        found = []
        for tensor, places in self.live.items():
            module, _, last = tensor.rpartition(".")
            if last != "weight" or len(self.base[places[0].disk].shape) < 2:
                continue
            number = _LAYER_NUMBER.search(tensor)
            if number is None or not isinstance(count, int) or int(number[1]) < count:
                found.append(module)
        return found


def _prefixes(path: str) -> set[str]:
    words = path.split(".")
    return {".".join(words[: i + 1]) for i in range(len(words))}
