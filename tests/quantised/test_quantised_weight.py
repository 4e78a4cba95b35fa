"""What stands in for a quantised weight: products, rows and norms are those of the decoded weight, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import peftarray.quantised_weight as module
from peftarray import (
    METHODS,
    Adapter,
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from peftarray.adapted_weight import adapted
from peftarray.arrays import namespace
from peftarray.backend import backend_of, load_backend
from peftarray.errors import ConfigError, ShapeError, UnsupportedError
from peftarray.quant import CODECS, FP8, MLX, Codec, Int8Rows, Ints, NormalFloat
from peftarray.quantised_weight import QuantisedWeight, quantised_weight
from peftarray.testing import Case, fitting_cases

CODECS_TRIED = [NormalFloat(), NormalFloat(block=32, double=False), Int8Rows(), FP8(block=(8, 16)), Ints(group=32)]
SHAPE = (72, 96)
# So small that the weight takes several tiles, and the last one is shorter.
TILE = 1000


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_TILE", TILE)
    monkeypatch.setattr(module, "_TILE_ON_HOST", TILE)


@contextmanager
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Notes how many numbers every call of a codec decodes."""
    seen: list[int] = []
    decode = Codec.dequantize

    def noting(self: Codec, parts: Any, shape: Any, *, rows: Any = None) -> Any:
        begin, end = (0, shape[0]) if rows is None else rows
        seen.append((end - begin) * int(np.prod(shape[1:])))
        return decode(self, parts, shape, rows=rows)

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "dequantize", noting)
        yield seen


def pair(codec: Codec, values: np.ndarray, asarray: Any) -> tuple[QuantisedWeight, np.ndarray]:
    """The weight quantised, on a library, and the float64 numbers that it then has."""
    parts = codec.quantize(values.astype(np.float32))
    known = codec.dequantize(parts, values.shape).astype(np.float64)
    return quantised_weight(codec, {name: asarray(part) for name, part in parts.items()}, values.shape), known


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("codec", CODECS_TRIED, ids=str)
def test_products_rows_and_norms(codec, xp, asarray, to_numpy, monkeypatch):
    w, known = pair(codec, drawn(SHAPE), asarray)
    x, back = asarray(drawn((2, 3, 96), 1), xp.float64), asarray(drawn((5, 72), 2), xp.float64)
    ids = asarray(np.asarray([[71, 0], [13, 13]]))
    with most_at_once(monkeypatch) as seen:
        # The adapter's namespace: a library may be one whose functions ask nobody.
        found = [x @ w.T, x[0, 0, :] @ w.mT, back @ w, namespace(w).take(w, ids, axis=0)]
        found += [namespace(w).linalg.vector_norm(side, axis=1) for side in (w, w.mT)]
    wanted = [drawn((2, 3, 96), 1) @ known.T, drawn((2, 3, 96), 1)[0, 0] @ known.T, drawn((5, 72), 2) @ known]
    wanted += [known[np.asarray([[71, 0], [13, 13]])], *(np.linalg.norm(known, axis=axis) for axis in (1, 0))]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(to_numpy(one), other, rtol=1e-5, atol=1e-5)
    assert w.materialised == 0
    assert max(seen) <= max(TILE, codec.row_step(SHAPE) * SHAPE[1]) < known.size
    assert to_numpy(w.dense()).dtype == np.float32
    assert w.materialised == 1


CONFIGS = [
    LoraConfig(r=2, init_lora_weights=False),
    LoraConfig(r=2, use_dora=True, init_lora_weights=False),
    LoraConfig(r=2, lora_bias=True, init_lora_weights=False),
    *(kind(init_weights=False) for kind in ()),
]
