"""What a merge starts from: a checkpoint as the model knows it, in whichever way its weights are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftarray.dtypes import parse_dtype, storage_dtype
from peftarray.errors import ConfigError
from peftarray.merging.origin import Origin, QuantisedOrigin, StoredOrigin
from peftarray.stores.checkpoint import Checkpoint
from peftarray.stores.safetensors import TensorInfo

if TYPE_CHECKING:
    from peftarray.quant.layouts import Layout, StoredWeight, WritableLayout

__all__ = ["Base", "default_code", "open_base", "read_base"]

_STATED = ("quantization_config", "quantization", "compression_config")
_DEQUANTISED, _ORIGINAL = "dequantised", "original="


@dataclass(frozen=True)
class Base:
    """A checkpoint, and the weights in it.

    Attributes:
        files: the checkpoint, and what its files hold.
        tensors: what the model knows of it: quantised weights have the shape and the dtype that they had, and no parts.
        quantised: the weights that are stored quantised, by their names.
        layout: how, None where none is.
        stated: what `config.json` says of it.
        original: the checkpoint that has their numbers before they were quantised, None where it is not asked.
        errors: the part of a weight by which the original differs, |W - W_quantised| / |W|, by name.
    """

    files: Checkpoint
    tensors: Checkpoint
    quantised: Mapping[str, StoredWeight] = field(default_factory=dict)
    layout: Layout | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)
    original: Checkpoint | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def owner(self) -> dict[str, str]:
        """Tensor of the files -> the quantised weight that it is a part of."""
        return {tensor: name for name, weight in self.quantised.items() for tensor in weight.names()}

    def origin(self, name: str) -> Origin:
        """Where the numbers of a tensor that the model knows come from."""
        if name not in self.quantised:
            return StoredOrigin(self.files.shard_of(name), self.files[name])
        if self.original is not None:
            return StoredOrigin(self.original.shard_of(name), self.original[name])
        return self.stored_origin(name)

    def stored_origin(self, name: str) -> QuantisedOrigin:
        """The numbers of a quantised weight as the base itself has them."""
        return QuantisedOrigin(self.files, self.quantised[name])

    def require_layout(self) -> WritableLayout:
        """How weights are quantised again.

        Raises:
            UnsupportedError: weights stored so are only read.
        """
        from peftarray.quant.layouts import WritableLayout, writable_layout

        assert self.layout is not None  # there are quantised weights
        return self.layout if isinstance(self.layout, WritableLayout) else writable_layout(self.layout.kind)

    def only_original(self) -> Base:
        """The original by itself, as if it had been given; what was found out about it stays."""
        assert self.original is not None
        return Base(self.original, self.original, errors=self.errors)

    def plain_config(self) -> dict[str, Any]:
        """What `config.json` says of a model whose weights are not quantised."""
        from peftarray.quant.layouts import restated

        return restated(self.files.config, None)

    def config_with_plain(self, names: Iterable[str]) -> dict[str, Any]:
        """What `config.json` says once these weights are quantised no more, while the others are.

        Raises:
            UnsupportedError: it has no way to say so.
        """
        from peftarray.quant.layouts import restated

        assert self.layout is not None
        modules = [_module(name) for name in names]
        # A head that the file lacks is tied, and has no weight of its own to be quantised.
        others = [_module(name) for name, info in self.tensors.items() if len(info.shape) > 1]
        plain = [module for module in others if f"{module}.weight" not in self.quantised]
        tied = [] if any(module.endswith("lm_head") for module in others) else ["lm_head"]
        return restated(self.files.config, self.layout.skipping(self.stated, modules, [*plain, *tied]))


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def open_base(path: Path, base_as: str | None) -> Base:
    """The base at a path, and how its weights are to be understood.

    Args:
        path: a checkpoint.
        base_as: of a quantised one, `"dequantised"` or `"original=PATH"`.

    Raises:
        ConfigError: the base is quantised and this is not said, or the reverse.
        FormatError: its tensors contradict each other.
        MatchError: the original is another model.
        UnsupportedError: it is quantised in a way that is not known here.
    """
    if base_as not in (None, _DEQUANTISED) and not base_as.startswith(_ORIGINAL):
        message = f"base_as is {base_as!r}; it must be {_DEQUANTISED!r} or '{_ORIGINAL}PATH'"
        raise ConfigError(message)
    base = read_base(Checkpoint.open(path))
    if not base.quantised:
        if base_as is not None:
            message = f"base_as is {base_as!r}, and {path} is not quantised; leave it out"
            raise ConfigError(message)
        return base
    if base_as is None:
        kinds = ", ".join(sorted({weight.codec.kind for weight in base.quantised.values()}))
        message = (
            f"{path} is quantised ({kinds}), so say what the adapter is merged into: --base-as dequantised (its "
            "weights dequantised, which is what an adapter saw that was trained on this very checkpoint), or "
            "--base-as original=PATH (the checkpoint that it was quantised from)"
        )
        raise ConfigError(message)
    if base_as == _DEQUANTISED:
        return base
    from peftarray.merging.original import check_original

    original = read_base(Checkpoint.open(Path(base_as.removeprefix(_ORIGINAL))))
    if original.quantised:
        message = f"{original.files.path} is quantised as well; give the checkpoint that {path} was quantised from"
        raise ConfigError(message)
    return replace(base, original=original.files, errors=check_original(base, original.files))


def read_base(files: Checkpoint) -> Base:
    """A checkpoint with the weights that it stores quantised, by what its headers and `config.json` say."""
    if not _may_be_quantised(files):
        return Base(files, files)  # as most are: nothing of codecs is loaded
    from peftarray.quant.layouts import LAYOUTS, find_quantised, layout_of, restated

    found = find_quantised(files, files.config, files.read_stored)
    if not found:
        return Base(files, files)
    stated = layout_of(files.config)
    layout, said = stated if stated is not None else (LAYOUTS["bitsandbytes"], {})
    parts = {name for weight in found.values() for name in weight.names()}
    default = default_code(files)
    infos = [info for name, info in files.items() if name not in parts]
    base = Base(files, files, found, layout, said)
    for name, weight in found.items():
        shape = base.stored_origin(name).shape
        infos.append(TensorInfo(name, weight.dtype or default, shape, 0, 0))
    known = Checkpoint.described(infos, str(files.path), restated(files.config, None))
    return replace(base, tensors=known)


def _may_be_quantised(files: Checkpoint) -> bool:
    texts = (files.config, files.config.get("text_config"))
    if any(isinstance(text, Mapping) and key in text for text in texts for key in _STATED):
        return True
    return any(info.code in ("U8", "I8") for info in files.values())


def default_code(files: Checkpoint) -> str:
    """The dtype that the model is said to compute with, bfloat16 where nothing is said."""
    for text in (files.config, files.config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            said = text.get(key) if isinstance(text, Mapping) else None
            if isinstance(said, str):
                try:
                    code = parse_dtype(said).code
                except ConfigError:
                    continue
                known = storage_dtype(code)
                if known is not None and known.bits > 8:
                    return code
    return "BF16"
