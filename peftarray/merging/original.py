"""Whether a checkpoint is the one that a quantised base was made from: names, shapes, and how far its numbers are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from peftarray.errors import MatchError, PeftError, ShapeError, UnsupportedError, nearest
from peftarray.merging.origin import StoredOrigin
from peftarray.stores.checkpoint import Checkpoint

if TYPE_CHECKING:
    from peftarray.merging.base import Base
    from peftarray.quant import Codec

__all__ = ["check_original"]

_RUNS, _ROWS = 4, 16
"""So many runs of so many rows of every weight are compared."""
_TIMES, _MORE = 2.0, 0.02
"""A weight may be so many times, and so much, farther from its original than its codec takes it."""
_UNKNOWN = 0.5
"""What is allowed where the codec only reads: calibration moves weights farther than rounding does."""


def check_original(base: Base, original: Checkpoint) -> dict[str, float]:
    """By how much of its norm each quantised weight differs from the original's, from rows that stand for the others.

    Raises:
        MatchError: the original is another model.
    """
    _check_names(base, original)
    errors = {name: _error(name, base, original) for name in base.quantised}
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    found, allowed = errors[worst]
    if found > allowed:
        off = sum(error > limit for error, limit in errors.values())
        message = (
            f"{original.path} is not what {base.files.path} was quantised from: {worst} differs by {found:.1%} of its "
            f"norm, and {base.quantised[worst].codec.kind} explains {allowed:.1%} at most ({off} of {len(errors)} "
            "weights are off); give the checkpoint that was quantised, or --base-as dequantised"
        )
        raise MatchError(message)
    return {name: error for name, (error, _) in errors.items()}


def _check_names(base: Base, original: Checkpoint) -> None:
    for name, info in base.tensors.items():
        if name not in original:
            if name not in base.quantised and _may_lack(name, base):
                continue
            message = (
                f"{base.files.path} has {name}, and the original {original.path} does not{nearest(name, original)}; "
                "give the checkpoint that was quantised"
            )
            raise MatchError(message)
        if original[name].shape != info.shape:
            message = (
                f"{name} is {info.shape} in {base.files.path} and {original[name].shape} in the original "
                f"{original.path}; give the checkpoint that was quantised"
            )
            raise ShapeError(message)
    for name, info in original.items():
        if name not in base.tensors and len(info.shape) > 1 and not _may_lack(name, base):
            message = (
                f"the original {original.path} has {name}, and {base.files.path} does not; give the checkpoint that "
                "was quantised"
            )
            raise MatchError(message)


def _may_lack(name: str, base: Base) -> bool:
    """Whether a tensor may be in one of the two alone: a tied head, or a table that the model computes."""
    tied = base.files.config.get("tie_word_embeddings", True) is not False
    return (tied and name.rpartition(".")[2] == "weight" and "head" in name) or name.endswith("inv_freq")


def _error(name: str, base: Base, original: Checkpoint) -> tuple[float, float]:
    """How far a weight is from the original, and how far it may be."""
    here, there = base.stored_origin(name), StoredOrigin(original.shard_of(name), original[name])
    if not original[name].dtype.floating:
        message = f"{name} is {original[name].code} in the original {original.path}; it must be of a floating dtype"
        raise MatchError(message)
    codec, columns = base.quantised[name].codec, here.shape[-1]
    count = int(np.prod(here.shape)) // max(1, columns)
    squares = differences = expected = 0.0
    codec_only_reads = False
    for begin in sorted({run * max(0, count - _ROWS) // max(1, _RUNS - 1) for run in range(_RUNS)}):
        end = min(begin + _ROWS, count)
        wanted = there.read(begin, end, columns).astype(np.float32)
        squares += float(np.vdot(wanted, wanted))
        differences += float(np.square(wanted - here.read(begin, end, columns)).sum())
        by_codec = _codec_error(codec, wanted)
        codec_only_reads |= by_codec is None
        expected += by_codec or 0.0
    if not squares or not np.isfinite(differences):
        return (0.0 if not differences else float("inf")), 1.0
    allowed = _UNKNOWN if codec_only_reads else _TIMES * (expected / squares) ** 0.5 + _MORE
    return (differences / squares) ** 0.5, allowed


def _codec_error(codec: Codec, rows: np.ndarray) -> float | None:
    """The squared error that a codec makes on rows, None where it does not quantise them."""
    try:
        parts = codec.quantize(rows)
    except UnsupportedError:
        return None
    except PeftError:
        return 0.0
    return float(np.square(rows - codec.dequantize(parts, rows.shape)).sum())
