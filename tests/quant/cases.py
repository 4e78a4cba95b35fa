"""One case for each way to store a weight: the codec, and a shape with all its edges."""

from __future__ import annotations

import numpy as np

from peftarray.quant import FP8, GGUF, MLX, MXFP4, NVFP4, Codec, FourBitFloat, Int8Blocks, Int8Rows, Ints, NormalFloat

# codec, shape, and the largest error relative to the largest magnitude of a row that it may make.
WRITTEN: list[tuple[Codec, tuple[int, ...], float]] = [
    (NormalFloat(), (24, 64), 0.3),
    (NormalFloat(block=32, double=False), (7, 33), 0.2),
    (NormalFloat(block=5), (9, 7), 0.3),
    (FourBitFloat(), (300, 65), 0.3),
    (FourBitFloat(block=256, double=False), (3, 4, 50), 0.2),
    (Int8Rows(), (5, 40), 0.005),
    (Int8Blocks(block=64), (6, 50), 0.02),
    (Int8Blocks(), (3, 5, 7), 0.02),
    (FP8(), (140, 260), 0.07),
    (FP8(dtype="F8_E5M2", scale="tensor"), (9, 10), 0.13),
    (FP8(scale="row"), (3, 4, 10), 0.07),
    (FP8(block=(16, 8), scale_dtype="F8_E8M0"), (2, 20, 30), 0.07),
    (FP8(scale="row", scale_dtype="F8_E8M0"), (6, 10), 0.07),
    (MXFP4(), (4, 96), 0.3),
    (MXFP4(), (2, 3, 64), 0.3),
    (NVFP4(), (5, 48), 0.3),
    (NVFP4("multiply"), (5, 48), 0.3),
    *[(Ints(bits=bits, group=32), (33, 64), 1.1 * 0.5**bits * 2) for bits in range(2, 9)],
    (Ints(bits=4, group=0, symmetric=False), (35, 40), 0.2),
    (Ints(bits=3, group=16, symmetric=False), (70, 48), 0.4),
    (Ints(bits=8, group=0, packed=False), (5, 12), 0.02),
    (Ints(bits=8, group=4, symmetric=False, packed=False), (5, 12), 0.02),
    *[(MLX(bits=bits, group=32), (2, 3, 64), 0.5**bits * 1.4) for bits in (2, 4, 8)],
]
ON_JAX = [case for case in WRITTEN if case[0] in (NormalFloat(), FP8(), Ints(bits=4, group=32))]
ON_HOST: list[tuple[Codec, tuple[int, ...], float]] = [
    (GGUF(kind), (3, 2, 512), error)
    for kind, error in {"Q4_0": 0.2, "Q4_1": 0.2, "Q5_0": 0.1, "Q5_1": 0.1, "Q8_0": 0.01, "MXFP4": 0.3}.items()
]


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers of all sizes, some rows of zeros among them."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:1], *[1] * (len(shape) - 1))))
    weight[1 % shape[0]] = 0
    return weight.astype(np.float32)


def name_of(case: object) -> str:
    return str(case).replace(" ", "")
