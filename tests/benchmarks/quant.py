"""Quantising and dequantising a weight: peftarray on NumPy against bitsandbytes on the CPU, in gigabytes a second.

    python tests/benchmarks/quant.py --threads 1 2
    python tests/benchmarks/quant.py --rows 8192 --columns 8192 --rounds 9 --json FILE

One float32 weight, the same for both; a gigabyte is one of the weight's own, whatever is read or written. Each
contender is a process of its own that works only when asked, in turns, another one first in each round; the numbers
are medians over the rounds. Both must give the same codes, the same scales and the same weight back before a time
counts. bitsandbytes gets its threads through torch; peftarray quantises on one thread whatever is asked, and decodes
tiles of rows on as many as bitsandbytes has. Results go into new memory, as bitsandbytes has no other way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "NF4, block 64": ("nf4", {"block": 64, "double": False}),
    "NF4, block 64, double": ("nf4", {"block": 64, "double": True}),
    "FP4, block 64": ("fp4", {"block": 64, "double": False}),
    "FP4, block 64, double": ("fp4", {"block": 64, "double": True}),
    "int8 rows": ("int8", {}),
    "int8 blocks of 4096": ("int8-blocks", {"block": 4096}),
}
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8 e4m3, blocks 128x128": ("fp8", {}),
    "FP8 e4m3, rows": ("fp8", {"scale": "row"}),
    "MXFP4": ("mxfp4", {}),
    "NVFP4": ("nvfp4", {}),
    "ints of 4 bits, group 128": ("ints", {}),
    "MLX, 4 bits": ("mlx", {}),
    "GGUF Q8_0": ("gguf", {"type": "Q8_0"}),
}
CONTENDERS = ("bitsandbytes", "peftarray")

Action = Callable[[], Any]


# The contenders.


def drawn(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def bitsandbytes_actions(name: str, weight: np.ndarray, threads: int) -> tuple[Action, Action, Action]:
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(threads)
    kind, settings = CASES[name]
    values = torch.from_numpy(weight)
    held: list[Any] = []

    def quantise() -> Any:
        if kind == "int8":
            held[:] = functional.int8_vectorwise_quant(values)[:2]
        elif kind == "int8-blocks":
            held[:] = functional.quantize_blockwise(values, blocksize=settings["block"])
        else:
            held[:] = functional.quantize_4bit(
                values, blocksize=settings["block"], quant_type=kind, compress_statistics=settings["double"]
            )

    def dequantise() -> Any:
        if kind == "int8":
            return functional.int8_vectorwise_dequant(*held)
        if kind == "int8-blocks":
            return functional.dequantize_blockwise(*held)
        return functional.dequantize_4bit(*held)

    def check() -> int:
        codes = held[0].numpy()
        scales = held[1] if kind == "int8" else held[1].absmax
        return zlib.crc32(dequantise().numpy(), zlib.crc32(scales.numpy(), zlib.crc32(codes)))

    return quantise, dequantise, check


def peftarray_actions(name: str, weight: np.ndarray, threads: int) -> tuple[Action, Action, Action]:
    from peftarray.quant import codec

    kind, settings = (CASES | ALONE)[name]
    how = codec(kind, **settings)
    held: dict[str, Any] = {}

    def quantise() -> Any:
        held.update(how.quantize(weight))

    def dequantise() -> Any:
        return how.dequantize(held, weight.shape, threads=threads)

    def check() -> int:
        codes, *_ = held.values()
        return zlib.crc32(dequantise(), zlib.crc32(held["absmax"], zlib.crc32(codes))) if name in CASES else 0

    return quantise, dequantise, check


def work(contender: str, shape: tuple[int, int], threads: int) -> None:
    """Answers lines `case<TAB>action` with seconds, or a checksum."""
    weight = drawn(shape)
    make = {"bitsandbytes": bitsandbytes_actions, "peftarray": peftarray_actions}[contender]
    ready: dict[str, tuple[Action, Action, Action]] = {}
    for line in sys.stdin:
        name, action = line.rstrip("\n").split("\t")
        if name not in ready:
            ready.clear()
            ready[name] = make(name, weight, threads)
        quantise, dequantise, check = ready[name]
        begin = time.perf_counter()
        found = {"quantise": quantise, "dequantise": dequantise, "check": check}[action]()
        seconds = time.perf_counter() - begin
        print(found if action == "check" else seconds, flush=True)


# The measurement.


class Contender:
    """A process that waits for its turn."""

    def __init__(self, name: str, shape: tuple[int, int], threads: int) -> None:
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        command = [sys.executable, __file__, "--work", name, "--threads", str(threads)]
        command += ["--rows", str(shape[0]), "--columns", str(shape[1])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | limits
        )

    def ask(self, case: str, action: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(case, action, sep="\t", file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def stop(self) -> None:
        self.process.communicate()


def measure(shape: tuple[int, int], threads: int, rounds: int) -> list[dict[str, Any]]:
    gigabytes = shape[0] * shape[1] * 4 / 1e9
    contenders = {name: Contender(name, shape, threads) for name in CONTENDERS}
    rows = []
    for case in CASES | ALONE:
        names = [name for name in CONTENDERS if case in CASES or name == "peftarray"]
        times: dict[tuple[str, str], list[float]] = {}
        for name in names:
            contenders[name].ask(case, "quantise")
        sums = {name: contenders[name].ask(case, "check") for name in names}
        if len(set(sums.values())) != 1:
            sys.exit(f"{case}: the results differ: {sums}")
        for turn in range(rounds):
            for name in names[:: 1 if turn % 2 else -1]:
                for action in ("quantise", "dequantise"):
                    seconds = float(contenders[name].ask(case, action))
                    times.setdefault((name, action), []).append(seconds)
        speeds = {key: gigabytes / statistics.median(found) for key, found in times.items()}
        rows.append(
            {"case": case, "threads": threads} | {f"{name} {action}": s for (name, action), s in speeds.items()}
        )
    for contender in contenders.values():
        contender.stop()
    return rows


def show(rows: list[dict[str, Any]], threads: int) -> None:
    print(f"\nGB/s, {threads} thread{'s' * (threads > 1)}")
    print(
        "| codec | quantise: bitsandbytes | peftarray | dequantise: bitsandbytes | peftarray |\n|---|---|---|---|---|"
    )
    for row in rows:
        cells = []
        for action in ("quantise", "dequantise"):
            theirs, ours = row.get(f"bitsandbytes {action}"), row[f"peftarray {action}"]
            cells.append("" if theirs is None else f"{theirs:.2f}")
            cells.append(f"{ours:.2f}" + ("" if theirs is None else f" ({ours / theirs:.1f})"))
        print("| " + " | ".join([row["case"], *cells]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.rows, options.columns)
    if options.work:
        work(options.work, shape, options.threads[0])
        return
    everything = []
    for threads in options.threads:
        rows = measure(shape, threads, options.rounds)
        show(rows, threads)
        everything += rows
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
