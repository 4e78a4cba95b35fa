"""Training steps of whole models: peftarray on NumPy and on torch against PEFT, one library a process, in turns.

    python tests/benchmarks/smollm2.py --download smollm2
    python tests/benchmarks/training.py smollm2 --rounds 7

The model gets LoRA (r = 8, alpha = 16) on its queries and values, and 4 texts of 128 tokens a step (`--batch`); a step
is the forward pass, the gradients and AdamW's step, in float32. The loss of a BERT (`model_type` in its `config.json`)
is the mean square between its sentence vectors and drawn ones. Without a folder, a small network for handwritten digits
is trained by batches of 50: there, what a step costs beside its products decides.

NumPy makes its steps as `pa.fit` does. With workers, each thread has a part of the step's rows: `fit(accumulate=2,
workers=2)` and batches of half the size.

All contenders start from the same adapter, which PEFT wrote, see the same batches, and must agree in the loss of every
step. A turn is a few steps; the figure is the median over all turns, and memory is the most that the process held in
its life, what it imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from turns import Contender, serve, turns

RATE = 1e-3
CONTENDERS = ("PEFT", "torch", "NumPy", "NumPy, workers", "NumPy, checkpointed")
DIGITS = {"embed": (48, 64), "hidden": (32, 48), "head": (10, 32)}

Step = Callable[[dict[str, np.ndarray]], float]


# What is trained.


def batches(kind: str, config: dict[str, Any]) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end: the same ones for every contender."""
    draw = np.random.default_rng(0)
    if kind == "digits":
        import peftarray.demo

        held = np.load(Path(peftarray.demo.__file__).parent / "assets" / "digits.npz")
        pixels, labels = held["images"].reshape(-1, 64).astype(np.float32) / 16, held["labels"].astype(np.int64)
        while True:
            rows = draw.integers(0, len(pixels), 50)
            yield {"x": pixels[rows], "labels": labels[rows]}
    rows, length = map(int, os.environ["BENCHMARK_BATCH"].split())
    width = config["hidden_size"]
    while True:
        ids = draw.integers(0, config["vocab_size"], (rows, length))
        yield {"input_ids": ids} | (
            {} if kind == "causal" else {"wanted": draw.standard_normal((rows, width), np.float32)}
        )


def kind_of(folder: Path | None) -> tuple[str, dict[str, Any]]:
    if folder is None:
        return "digits", {}
    config = json.loads((folder / "config.json").read_text())
    return "sentences" if config["model_type"] == "bert" else "causal", config


def targets(kind: str) -> list[str]:
    return {"causal": ["q_proj", "v_proj"], "sentences": ["query", "value"], "digits": list(DIGITS)}[kind]


def digits_weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        f"{name}.weight": draw.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
        for name, shape in DIGITS.items()
    }


# On torch: PEFT's, and ours on the same module.


def torch_module(kind: str, folder: Path | None) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    if kind == "digits":

        class Reader(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, (out, fan_in) in DIGITS.items():
                    setattr(self, name, torch.nn.Linear(fan_in, out, bias=False))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(torch.tanh(self.hidden(torch.tanh(self.embed(x)))))

        module = Reader()
        module.load_state_dict({name: torch.asarray(array) for name, array in digits_weights().items()})
        return module
    loader = AutoModelForCausalLM if kind == "causal" else AutoModel
    return loader.from_pretrained(folder, dtype=torch.float32)


def torch_loss(kind: str, model: Any, batch: dict[str, Any]) -> Any:
    from torch.nn import functional

    if kind == "digits":
        return functional.cross_entropy(model(batch["x"]), batch["labels"])
    if kind == "causal":
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    vectors = model(input_ids=batch["input_ids"]).last_hidden_state.mean(1)
    return functional.mse_loss(functional.normalize(vectors, dim=-1), batch["wanted"])


def torch_step(kind: str, model: Any) -> Step:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)

    def step(batch: dict[str, np.ndarray]) -> float:
        loss = torch_loss(kind, model, {name: torch.asarray(array) for name, array in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def peft_step(kind: str, folder: Path | None, adapter: Path) -> Step:
    import peft

    return torch_step(kind, peft.PeftModel.from_pretrained(torch_module(kind, folder), adapter, is_trainable=True))


def our_torch_step(kind: str, folder: Path | None, adapter: Path) -> Step:
    import peftarray as pa

    model = pa.PeftModel.from_pretrained(torch_module(kind, folder), adapter, is_trainable=True)
    return torch_step(kind, model)


# On NumPy.


def numpy_step(kind: str, folder: Path | None, adapter: Path, workers: int, checkpointed: bool) -> Step:
    from dataclasses import replace

    import peftarray as pa
    from peftarray.allocation import keep_freed_memory
    from peftarray.autodiff import checkpoint
    from peftarray.backend import load_backend
    from peftarray.gradients import Chosen
    from peftarray.training.precision import precision_of
    from peftarray.training.step import Recipe, Stepper
    from peftarray.training.workers import Workers

    keep_freed_memory(held=(1 << 31) - 1)
    base = digits_weights() if folder is None else pa.models.load(folder)
    if checkpointed:
        base = replace(base, around=checkpoint)
    model = pa.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    loss = numpy_loss(kind, base)
    recipe = Recipe(pa.AdamW(RATE, weight_decay=0.0), pa.constant(), precision_of("fp32"), accumulate=workers)
    stepper = Stepper(
        lambda params, batch: loss(model.with_params(params).weights, batch),
        Chosen(model.params, ()),
        recipe,
        load_backend("numpy"),
        compiled=False,
        workers=Workers(workers),
    )
    now = stepper.start()

    def step(batch: dict[str, np.ndarray]) -> float:
        nonlocal now
        parts = ({name: array[part::workers] for name, array in batch.items()} for part in range(workers))
        outcome = stepper(now, list(parts))
        now = outcome.now
        return outcome.loss

    return step


def numpy_loss(kind: str, base: Any) -> Callable[[Any, dict[str, np.ndarray]], Any]:
    import peftarray as pa
    from peftarray.autodiff.fused import log_softmax

    if kind == "causal":
        return pa.models.causal_loss(base)
    if kind == "sentences":
        return lambda weights, batch: np.mean((base.embed(weights, batch["input_ids"]) - batch["wanted"]) ** 2)

    def loss(weights: Any, batch: dict[str, np.ndarray]) -> Any:
        hidden = np.tanh(batch["x"] @ weights["embed.weight"].T)
        shares = log_softmax(np.tanh(hidden @ weights["hidden.weight"].T) @ weights["head.weight"].T)
        return -np.mean(np.take_along_axis(shares, batch["labels"][:, None], axis=-1))

    return loss


# The measurement.


def contend(name: str, folder: Path | None, adapter: Path) -> None:
    """Answers `steps` with `[the steps' losses, seconds of each, peak memory in MB]`."""
    warnings.simplefilter("ignore")
    kind, config = kind_of(folder)
    if name in ("PEFT", "torch"):
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        step = (peft_step if name == "PEFT" else our_torch_step)(kind, folder, adapter)
    else:
        workers = int(os.environ["OMP_NUM_THREADS"]) if name.endswith("workers") else 1
        step = numpy_step(kind, folder, adapter, workers, checkpointed=name.endswith("checkpointed"))
    stream = batches(kind, config)

    def answer(steps: int) -> Any:
        losses, seconds = [], []
        for _ in range(steps):
            batch = next(stream)
            before = time.perf_counter()
            losses.append(step(batch))
            seconds.append(time.perf_counter() - before)
        return losses, seconds, peak_memory()

    serve(answer)


def peak_memory() -> float:
    """The most that this process held, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def write_adapter(folder: Path | None, out: Path) -> None:
    """An adapter as PEFT writes it, with numbers in all its arrays; in a process that then ends."""
    import peft
    import torch

    kind, _ = kind_of(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets(kind))
    model = peft.get_peft_model(torch_module(kind, folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(out)


def measure(options: argparse.Namespace, adapter: Path) -> dict[str, tuple[float, float]]:
    """contender -> (seconds a step, peak memory in MB)."""
    names = [name for name in options.contenders if options.folder or not name.startswith("NumPy, ")]
    variables = {
        "BENCHMARK_FOLDER": str(options.folder or ""),
        "BENCHMARK_ADAPTER": str(adapter),
        "BENCHMARK_BATCH": " ".join(map(str, options.batch)),
    }
    contenders = [Contender.start(__file__, name, options.threads, variables) for name in names]
    losses: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    try:
        for contender in contenders:  # once, for what is made once
            losses[contender.name] += contender.ask(1)[0]
        for contender in turns(contenders, options.rounds):
            found, times, memory[contender.name] = contender.ask(options.steps)
            losses[contender.name] += found
            seconds[contender.name] += times
    finally:
        for contender in contenders:
            contender.end()
    for name in names[1:]:
        if not np.allclose(losses[name], losses[names[0]], rtol=2e-3):
            raise SystemExit(f"{name} and {names[0]} differ in their losses: {losses[name]}, {losses[names[0]]}")
    return {name: (statistics.median(seconds[name]), memory[name]) for name in names}


def show(results: dict[str, tuple[float, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(results))
    table = Table(title=title)
    for column in ("", "ms a step", f"to {first}", "peak MB", f"to {first} "):
        table.add_column(column, justify="right" if column else "left")
    for name, (seconds, memory) in results.items():
        ratios = seconds / results[first][0], memory / results[first][1]
        table.add_row(name, f"{1000 * seconds:.4g}", f"{ratios[0]:.2f}", f"{memory:.0f}", f"{ratios[1]:.2f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint; the digits' network if none is given")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender has")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), help="texts, and tokens of each")
    parser.add_argument("--threads", type=int, default=2, help="threads of each contender")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="only these")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--write-adapter", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        folder = os.environ["BENCHMARK_FOLDER"]
        contend(options.serve, Path(folder) if folder else None, Path(os.environ["BENCHMARK_ADAPTER"]))
        return
    if options.write_adapter:
        write_adapter(options.folder, options.write_adapter)
        return
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        import subprocess

        given = [str(options.folder)] if options.folder else []
        subprocess.run([sys.executable, __file__, *given, "--write-adapter", str(adapter)], check=True)
        results = measure(options, adapter)
    show(results, f"{options.folder.name if options.folder else 'digits'}, {options.threads} threads")


if __name__ == "__main__":
    main()
