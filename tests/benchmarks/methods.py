"""One training step, one merge and one forward pass, method by method: peftarray on torch and on NumPy against PEFT.

    python tests/benchmarks/methods.py --threads 1 2
    python tests/benchmarks/methods.py --methods LOHA LOKR --rounds 9 --json FILE

Two linear layers of 1024 x 1024 without bias, 256 rows, float32, every method with PEFT's defaults. A step is the
forward pass and the gradients of the adapter's parameters and of the input, as in the middle of a network; the base is
frozen, and what a method prepares from its parameters is made anew in each step. A merge puts the merged weights of
both layers in the place of their own, by `merge_and_unload` in PEFT and `Adapter.merge_into` here; "new" is
`Adapter.merge`, which leaves them and makes others. The forward pass keeps no gradients; its parameters are prepared
once, which PEFT does anew.

Each contender is a process of its own that works only when asked, in turns, another one first in each round; the
numbers are medians over the rounds. All contenders get the same parameters, and their outputs and merged weights must
agree before a time counts. glibc is told to keep freed memory in each of them: as it comes, it gives large arrays back
to the system or not by what was freed before, and a merge takes twice as long or not (`--plain-malloc` leaves it so).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from turns import Contender, serve

SIZE, ROWS, LAYERS = 1024, 256, 2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {}),
    "DoRA": ("LoraConfig", {"use_dora": True}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 1000}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LoHa": ("LoHaConfig", {}),
    "LoKr": ("LoKrConfig", {}),
    "OFT": ("OFTConfig", {}),
    "BOFT": ("BOFTConfig", {}),
    "VeRA": ("VeraConfig", {}),
}
ACTIONS = {
    "step": ("peft", "torch"),
    "merge": ("peft", "torch", "numpy"),
    "new": ("peft", "torch", "numpy"),
    "forward": ("peft", "torch", "numpy"),
}

Action = Callable[[], Any]


# The contenders.


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same small values for the same name, in every contender."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    return values * np.float32(1 / math.sqrt(SIZE))


def weights() -> list[np.ndarray]:
    return [draw(f"{layer}.weight", (SIZE, SIZE)) for layer in range(LAYERS)]


def peft_actions(name: str) -> dict[str, Action]:
    import peft
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    layers = [torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)]
    for layer, weight in zip(layers, weights(), strict=True):
        layer.weight.data = torch.asarray(weight)
    kind, settings = METHODS[name]
    config = getattr(peft, kind)(target_modules=[str(n) for n in range(LAYERS)], **settings)
    live = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    state = peft.get_peft_model_state_dict(live)
    prefix = "base_model.model."
    drawn = {key: torch.asarray(draw(key.removeprefix(prefix), tuple(tensor.shape))) for key, tensor in state.items()}
    peft.set_peft_model_state_dict(live, drawn)
    x, back = torch.asarray(draw("x", (ROWS, SIZE))).requires_grad_(), torch.asarray(draw("back", (ROWS, SIZE)))
    trained = [parameter for parameter in live.parameters() if parameter.requires_grad]
    still = copy.deepcopy(live).requires_grad_(False).eval()
    copies: list[Any] = []

    def step() -> Any:
        y = live(x)
        torch.autograd.grad(y, [x, *trained], back)
        return y

    def prepare_merge() -> None:
        copies[:] = [copy.deepcopy(still)]

    def merge() -> Any:
        return [layer.weight for layer in copies.pop().merge_and_unload()]

    @torch.no_grad()
    def forward() -> Any:
        return still(x)

    again = {"prepare new": prepare_merge, "new": merge}
    return {"step": step, "prepare merge": prepare_merge, "merge": merge, **again, "forward": forward}


def our_actions(name: str, library: Any, asarray: Callable[[np.ndarray], Any]) -> dict[str, Action]:
    import peftarray as pa
    from peftarray.layers import Layer, Peers

    kind, settings = METHODS[name]
    known = {"total_step"} - set(getattr(pa, kind).__dataclass_fields__)
    config = getattr(pa, kind)(**{key: value for key, value in settings.items() if key not in known})
    peers = Peers(Layer(str(n), "linear", (SIZE, SIZE)) for n in range(LAYERS))
    adapters = []
    for layer in peers:
        method, layer = config.at(layer.name), replace(layer, peers=peers if config.reads_peers else Peers())
        params = {}
        for local, row in method.params(layer).items():
            key = f"base_model.{row.shared}" if row.shared else f"{layer.name}.{row.disk or local}"
            params[local] = asarray(draw(key, row.shape))
        adapters.append(pa.Adapter(method, layer, params))
    frozen = [asarray(weight) for weight in weights()]
    x = asarray(draw("x", (ROWS, SIZE)))

    def run(x: Any, params: list[Mapping[str, Any]]) -> Any:
        for adapter, weight, arrays in zip(adapters, frozen, params, strict=True):
            method, layer = adapter.config, adapter.layer
            x = method.apply(method.prepare(arrays, layer), x, weight, layer)
        return x

    copies: list[Any] = []

    def prepare_merge() -> None:
        copies[:] = [library.asarray(weight, copy=True) for weight in frozen]

    def merge() -> Any:
        for adapter, weight in zip(adapters, copies, strict=True):
            adapter.merge_into(weight)
        return list(copies)

    def new() -> Any:
        return [adapter.merge(weight) for adapter, weight in zip(adapters, frozen, strict=True)]

    def forward() -> Any:
        y = x
        for adapter, weight in zip(adapters, frozen, strict=True):
            y = adapter.forward(y, weight)
        return y

    here = {"prepare merge": prepare_merge, "merge": merge, "new": new, "forward": forward}
    if library is np:
        return here

    live = [
        {
            local: array.clone().requires_grad_() if not adapter.config.params(adapter.layer)[local].frozen else array
            for local, array in adapter.params.items()
        }
        for adapter in adapters
    ]
    trained = [array for arrays in live for array in arrays.values() if array.requires_grad]
    asking, back = x.clone().requires_grad_(), asarray(draw("back", (ROWS, SIZE)))

    def step() -> Any:
        y = run(asking, live)
        library.autograd.grad(y, [asking, *trained], back)
        return y

    return {"step": step, **here}


def contend(contender: str) -> None:
    """Answers `method, action, seconds` with `[median ms, numbers of the result]`."""
    warnings.simplefilter("ignore")
    ready: dict[str, dict[str, Action]] = {}

    def answer(name: str, action: str, seconds: float) -> tuple[float, list[float]]:
        if name not in ready:
            ready.clear()
            if contender == "peft":
                ready[name] = peft_actions(name)
            elif contender == "torch":
                import torch

                torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
                ready[name] = our_actions(name, torch, torch.asarray)
            else:
                ready[name] = our_actions(name, np, np.asarray)
        return timed(ready[name], action, seconds)

    serve(answer)


def timed(actions: dict[str, Action], action: str, seconds: float) -> tuple[float, list[float]]:
    prepare, times = actions.get(f"prepare {action}", lambda: None), []
    numbers: list[float] = []
    started = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - started < seconds:
        prepare()
        before = time.perf_counter()
        result = actions[action]()
        times.append(time.perf_counter() - before)
        if not numbers:
            last = result[-1] if isinstance(result, list) else result
            numbers = [float(number) for number in last.reshape(-1)[:: 997 * 7]]
    # The first is for whatever is made once.
    return 1000 * statistics.median(times[1:]), numbers


# The measurement.


_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Lets glibc keep what is freed."""


def measure(
    methods: list[str], threads: int, rounds: int, seconds: float, keep_memory: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """method -> action -> contender -> median of the rounds' medians, in ms."""
    variables = _KEEP if keep_memory else {}
    contenders = [Contender.start(__file__, name, threads, variables) for name in ("peft", "torch", "numpy")]
    try:
        return {name: measure_method(name, contenders, rounds, seconds) for name in methods}
    finally:
        for contender in contenders:
            contender.end()


def measure_method(name: str, contenders: list[Contender], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    times: dict[str, dict[str, list[float]]] = {action: {c: [] for c in names} for action, names in ACTIONS.items()}
    for turn in range(rounds):
        first = turn % len(contenders)
        for action, names in ACTIONS.items():
            expected: list[float] = []
            for contender in contenders[first:] + contenders[:first]:
                if contender.name not in names:
                    continue
                milliseconds, numbers = contender.ask(name, action, seconds)
                times[action][contender.name].append(milliseconds)
                expected = expected or numbers
                if not np.allclose(numbers, expected, rtol=1e-3, atol=1e-5):
                    raise SystemExit(f"{contender.name} and the contender before it differ in {action} of {name}.")
    return {action: {c: statistics.median(found) for c, found in each.items()} for action, each in times.items()}


def written() -> list[str]:
    import peftarray as pa

    return [name for name, (kind, _) in METHODS.items() if kind in pa.__all__]


# The report.


def ratio_of_means(results: dict[str, Any], action: str, contender: str) -> float:
    """The geometric mean over the methods of the time to PEFT's."""
    return statistics.geometric_mean(each[action][contender] / each[action]["peft"] for each in results.values())


def show(results: dict[str, Any], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = [(action, name) for action, names in ACTIONS.items() for name in names]
    table = Table(title=f"ms, and the ratio to PEFT; {threads} thread{'s' if threads > 1 else ''}")
    table.add_column("")
    for action, name in columns:
        table.add_column(f"{action}\n{name}", justify="right")
    for method, each in results.items():
        cells = []
        for action, name in columns:
            found, peft = each[action][name], each[action]["peft"]
            cells.append(f"{found:.2f}" if name == "peft" else f"{found:.2f} [bold]{found / peft:.2f}[/]")
        table.add_row(method, *cells)
    means = [
        "" if name == "peft" else f"[bold]{ratio_of_means(results, action, name):.2f}[/]" for action, name in columns
    ]
    table.add_section()
    table.add_row("geometric mean", *means)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="how many threads each contender has")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender has")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long a turn lasts at least")
    parser.add_argument("--plain-malloc", action="store_true", help="leave glibc's allocator as it comes")
    parser.add_argument("--json", type=Path, help="a file for all medians")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        contend(options.serve)
        return
    methods = [name for name in options.methods or METHODS if name in written()]
    missing = [name for name in options.methods or METHODS if name not in methods]
    if missing:
        print(f"not written yet, and left out: {', '.join(missing)}")
    everything = {}
    for threads in options.threads:
        everything[threads] = measure(methods, threads, options.rounds, options.seconds, not options.plain_malloc)
        show(everything[threads], threads)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
