"""QLoRA against LoRA on the 16-bit base: the loss after some steps, the bytes of the weights, memory and time.

    python tests/benchmarks/smollm2.py --download smollm2
    python tests/benchmarks/qlora.py smollm2 --steps 50

Every contender runs in a process of its own, one after the other. All train LoRA (r = 8, alpha = 16) on every linear
layer of the same numbers, those of the bfloat16 checkpoint, computed in float32, by the same batches of Python's
reference (`pydoc_data`); the loss is then that of rows that none has seen. "NF4" quantises linear layers. "mixed" does
so with the embedding as well, which is SmolLM2's head: to packed integers of 6 bits, as it does with keys, values and
two of the 30 down projections, while two others get 8 bits; and its LoRA starts from what all this lost (LoftQ). Memory
is the most that the process held: after the weights were loaded, beyond what it held before, and in its whole life.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from peftarray.quant import Ints

RATE = 1e-3
SIX = Ints(bits=6, group=96)
# Keys, values and what comes out of some blocks suffer most of four bits.
MORE = {
    **dict.fromkeys(("k_proj", "v_proj", "layers.9.mlp.down_proj", "layers.28.mlp.down_proj"), SIX),
    **dict.fromkeys(("layers.11.mlp.down_proj", "layers.29.mlp.down_proj"), "int8"),
}
SMALL = {"quantize": "nf4", "embeddings": SIX, "codecs": MORE}
# name -> backend, and how the model is loaded.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, NumPy": ("numpy", {}),
    "NF4, NumPy": ("numpy", {"quantize": "nf4"}),
    "mixed, NumPy": ("numpy", SMALL),
    "LoRA, torch": ("torch", {}),
    "NF4, torch": ("torch", {"quantize": "nf4"}),
    "mixed, torch": ("torch", SMALL),
}


def rows_of_text(folder: Path, length: int) -> np.ndarray:
    from tokenizers import Tokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    ids = np.asarray(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    return ids[: len(ids) // length * length].reshape(-1, length)


def status(key: str) -> float:
    """A line of the kernel's account of this process, in MB."""
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024 / 1e6


def contend(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import peftarray as pa
    from peftarray.allocation import keep_freed_memory

    backend, how = CONTENDERS[name]
    count, length = options.batch
    rows = rows_of_text(options.folder, length)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    held, seen = rows[: options.held], rows[options.held :]
    if backend == "torch":
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch.zeros(1)
    pa.models.load, pa.PeftModel, pa.fit, pa.QuantisedWeight  # noqa: B018 - what is imported late is no weight
    before = status("VmRSS")
    base = pa.models.load(options.folder, backend=backend, **how)
    loaded = status("VmHWM") - before
    weights = sum(array.nbytes for array in base.weights.values())
    numbers = sum(int(np.prod(array.shape)) for array in base.weights.values())
    config = pa.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = pa.loftq(base, config, originals=options.folder) if how == SMALL else pa.get_peft_model(base, config)
    loss = pa.models.causal_loss(base)
    keep_freed_memory()
    batches = [{"input_ids": seen[i * count : (i + 1) * count]} for i in range(len(seen) // count)]
    begun = time.perf_counter()
    history = pa.fit(
        model,
        lambda adapted, batch: loss(adapted.weights, batch),
        batches,
        steps=options.steps,
        optimizer=pa.AdamW(RATE),
        progress=False,
    )
    seconds = (time.perf_counter() - begun) / options.steps
    after = float(np.mean([float(loss(model.weights, {"input_ids": row[None]})) for row in held]))
    formed = sum(array.materialised for array in base.weights.values() if isinstance(array, pa.QuantisedWeight))
    assert formed == 0, f"{formed} weights were formed"
    return {
        "losses": list(map(float, history.losses)),
        "held": after,
        "weights": weights / 1e6,
        "share": weights / (2 * numbers),
        "loaded": loaded,
        "peak": status("VmHWM"),
        "seconds": seconds,
    }


def show(found: dict[str, dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    columns = ("", "loss", "to LoRA", "weights MB", "of bfloat16", "load MB", "peak MB", "s a step")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    first = next(iter(found.values()))
    for name, row in found.items():
        figures = (row["held"], row["held"] / first["held"], row["weights"], row["share"], row["loaded"], row["peak"])
        formats = ("{:.4f}", "{:.3f}", "{:.1f}", "{:.3f}", "{:.0f}", "{:.0f}")
        texts = [form.format(value) for form, value in zip(formats, figures, strict=True)]
        table.add_row(name, *texts, f"{row['seconds']:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkpoint of a language model, with its tokenizer")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="rows, and tokens of each")
    parser.add_argument("--held", type=int, default=64, help="rows that the loss after the training is of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        print(json.dumps(contend(options.serve, options)))
        return
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))
    found: dict[str, dict[str, Any]] = {}
    for name in options.contenders:
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)
        print(name, [round(value, 4) for value in found[name]["losses"][::7]], file=sys.stderr)
    for kind in ("LoRA", "NF4", "mixed"):
        pair = [
            found[f"{kind}, {library}"]["losses"] for library in ("NumPy", "torch") if f"{kind}, {library}" in found
        ]
        # The last bits of sums differ, and training makes more of them with every step.
        allowed = ((options.steps // 2, 1e-3), (None, 0.02))
        if len(pair) == 2 and not all(np.allclose(*(curve[:n] for curve in pair), rtol=off) for n, off in allowed):
            raise SystemExit(f"{kind} has two curves: {pair}")
    show(found, f"{options.folder.name}, {options.steps} steps of {options.batch[0]} x {options.batch[1]}")


if __name__ == "__main__":
    main()
