"""Many adapters on one real model: peftarray on torch and on NumPy against PEFT.

    python tests/benchmarks/smollm2.py --download FOLDER
    python tests/benchmarks/adapters.py FOLDER
    python tests/benchmarks/adapters.py FOLDER --loaded 1 64 --rounds 3 --json FILE

SmolLM2-135M in float32 with LoRA adapters of rank 8 on all seven linear layers of each block. With 64 adapters loaded,
a batch of 64 rows of 16 tokens goes through the model with 0, 1, 8 and 64 different adapters in it, in turns over the
rows. Then, with so many adapters loaded: switching to another, loading one more from a folder, and adding a new one.

Each contender is a process of its own that works only when asked, in turns, another one first in each round; the
numbers are medians over the rounds. The adapters' own cost of a batch is its time above that of the base, which goes
through just before and just after it: the median of the differences. All contenders load the same folders, and their
logits must agree before a time counts. On a machine that others use, CPU time of one thread says more than the clock on
the wall (`--cpu-time --threads 1`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from turns import Contender, serve

ROWS, TOKENS, RANK, DRAWN = 64, 16, 8, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = (0, 1, 8, 64)
CONTENDERS = ("peft", "torch", "numpy")
VERBS = ("switch", "load", "add")

Runs = dict[str, Callable[..., Any]]


def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40000, (ROWS, TOKENS))


# The contenders. Each has `run(names)`, `off()`, `switch`, `load(folder, name)`, `add(name)` and `delete(name)`.


def peft_runs(base: Path, folder: Path) -> Runs:
    import peft
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)
    return module_runs(peft.PeftModel.from_pretrained(module, folder, adapter_name="a0"), config)


def torch_runs(base: Path, folder: Path) -> Runs:
    from transformers import AutoModelForCausalLM

    import peftarray as pa

    module = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    config = pa.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)
    return module_runs(pa.PeftModel.from_pretrained(module, folder, adapter_name="a0"), config)


def module_runs(model: Any, config: Any) -> Runs:
    import torch

    ids = torch.asarray(batch())
    model.eval()

    @torch.no_grad()
    def logits(names: Sequence[str]) -> np.ndarray:
        return (model(ids, adapter_names=names) if names else model(ids)).logits.numpy()

    return runs_of(model, config, logits)


def numpy_runs(base: Path, folder: Path) -> Runs:
    import peftarray as pa

    model = pa.PeftModel.from_pretrained(pa.models.load(base, dtype="float32"), folder, adapter_name="a0")
    ids = batch()
    config = pa.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS)
    return runs_of(model, config, lambda names: model(ids, adapter_names=names) if names else model(ids))


def runs_of(model: Any, config: Any, logits: Callable[[Sequence[str]], np.ndarray]) -> Runs:
    return {
        "run": logits,
        "off": model.disable_adapter,
        "switch": model.set_adapter,
        "load": model.load_adapter,
        "add": lambda name: model.add_adapter(name, config),
        "delete": model.delete_adapter,
    }


def contend(contender: str, base: Path, drawn: Path) -> None:
    """Answers `count, action, times` with `[median ms, numbers of the result]`, of a batch those above the base."""
    warnings.simplefilter("ignore")
    make = {"peft": peft_runs, "torch": torch_runs, "numpy": numpy_runs}[contender]
    if contender != "numpy":
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folders = sorted(path for path in drawn.iterdir() if path.is_dir())
    runs = make(base, folders[0])
    loaded = 1

    def answer(count: int, action: str, times: int) -> tuple[float, list[float]]:
        nonlocal loaded
        wanted = max(BATCHES) if action == "forward" else count
        for place in range(loaded, wanted):
            runs["load"](folders[place % len(folders)], f"a{place}")
        loaded = max(loaded, wanted)
        return above(runs, count, times) if action == "forward" else (verb(runs, action, folders[0], times), [])

    serve(answer)


def above(runs: Runs, count: int, times: int) -> tuple[float, list[float]]:
    """Of a batch with so many adapters, what it takes above the base; of the base, what that takes."""

    def base(times: int) -> float:
        with runs["off"]():  # which takes PEFT a second, and is not counted
            return timed(lambda: runs["run"]([]), times)

    names = [f"a{row % count}" for row in range(ROWS)] if count else []
    with nullcontext() if count else runs["off"]():
        numbers = [float(number) for number in runs["run"](names).reshape(-1)[:: 997 * 997]]
    if not count:
        return base(times), numbers
    bases, batches = [base(1)], []
    for _ in range(times):
        batches.append(timed(lambda: runs["run"](names), 1))
        bases.append(base(1))
    around = [(before + after) / 2 for before, after in itertools.pairwise(bases)]
    return statistics.median(batch - base for batch, base in zip(batches, around, strict=True)), numbers


def verb(runs: Runs, action: str, folder: Path, times: int) -> float:
    if action == "switch":
        runs["load"](folder, "other", is_trainable=True)
        try:
            runs["switch"]("other")
            return timed(lambda: (runs["switch"]("a0"), runs["switch"]("other")), times) / 2
        finally:
            runs["switch"]("a0")
            runs["delete"]("other")
    found = []
    for _ in range(times):
        act = (lambda: runs["load"](folder, "more")) if action == "load" else (lambda: runs["add"]("more"))
        found.append(timed(act, 1))
        runs["delete"]("more")
    return statistics.median(found)


def timed(act: Callable[[], Any], times: int) -> float:
    """Median milliseconds."""
    found, clock = [], time.process_time if os.environ.get("BENCHMARK_CLOCK") == "cpu" else time.perf_counter
    for _ in range(times):
        before = clock()
        act()
        found.append(clock() - before)
    return 1000 * statistics.median(found)


def draw(base: Path, folder: Path) -> None:
    """Adapters with values everywhere, in PEFT's files."""
    import peftarray as pa

    config = pa.LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
    model = pa.models.load(base, dtype="float32")
    for seed in range(DRAWN):
        pa.get_peft_model(model, config, seed=seed, adapter_name=f"drawn{seed}").save_pretrained(folder)


# The measurement.


def measure(base: Path, names: Sequence[str], loaded: Sequence[int], rounds: int, threads: int) -> dict[str, Any]:
    """`forward` or a verb -> count -> contender -> median of the rounds, in ms."""
    with tempfile.TemporaryDirectory() as place:
        draw(base, Path(place))
        variables = {
            "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
            "BENCHMARK_BASE": str(base),
            "BENCHMARK_DRAWN": place,
        }
        contenders = [Contender.start(__file__, name, threads, variables) for name in names]
        try:
            results: dict[str, Any] = {}
            plan = [("forward", count) for count in BATCHES] + [(v, n) for n in sorted(loaded) for v in VERBS]
            for action, count in sorted(plan, key=lambda each: (each[0] == "forward", each[1] if each[1] else 0)):
                results.setdefault(action, {})[count] = in_turns(contenders, action, count, rounds)
            return results
        finally:
            for contender in contenders:
                contender.end()


def in_turns(contenders: list[Contender], action: str, count: int, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds):
        first, expected = turn % len(contenders), []
        for contender in contenders[first:] + contenders[:first]:
            milliseconds, numbers = contender.ask(count, action, {"switch": 20, "forward": 3}.get(action, 1))
            times[contender.name].append(milliseconds)
            expected = expected or numbers
            if not np.allclose(numbers, expected, rtol=1e-2, atol=1e-2):
                raise SystemExit(f"{contender.name} and the contender before it differ in {action} of {count}.")
    found = {name: statistics.median(each) for name, each in times.items()}
    print(action, count, {name: round(each, 3) for name, each in found.items()}, file=sys.stderr, flush=True)
    return found


def rows(results: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What is to be shown: a name, and contender -> ms."""
    found = []
    for count, each in results["forward"].items():
        words = f"{count} adapter{'s' if count > 1 else ''} in the batch: above the base"
        found.append((words if count else "batch of 64 x 16 tokens, the base", each))
    words = {"switch": "set_adapter", "load": "load_adapter", "add": "add_adapter"}
    for action in VERBS:
        found += [(f"{words[action]}, {count} loaded", each) for count, each in results.get(action, {}).items()]
    return found


def show(results: dict[str, Any], names: Sequence[str]) -> None:
    print("| ms, and PEFT's time to it | " + " | ".join(names) + " |")
    print("|---|" + "---:|" * len(names))
    for words, each in rows(results):
        compared = {name: f" ({each['peft'] / each[name]:,.1f})" for name in names if "peft" in each and name != "peft"}
        cells = [f"{each[name]:,.2f}{compared.get(name, '')}" for name in names]
        print(f"| {words} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path, nargs="?", help="the folder that smollm2.py wrote")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="only these")
    parser.add_argument("--loaded", nargs="*", type=int, default=[1, 64, 200], help="how many adapters are loaded")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender has")
    parser.add_argument("--threads", type=int, default=2, help="how many threads each contender has")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time: with one thread, for a machine that is shared"
    )
    parser.add_argument("--json", type=Path, help="a file for all medians")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        contend(options.serve, Path(os.environ["BENCHMARK_BASE"]), Path(os.environ["BENCHMARK_DRAWN"]))
        return
    if options.base is None:
        parser.error("name the folder that smollm2.py wrote.")
    os.environ["BENCHMARK_CLOCK"] = "cpu" if options.cpu_time else "wall"
    results = measure(options.base, options.contenders, options.loaded, options.rounds, options.threads)
    show(results, options.contenders)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
