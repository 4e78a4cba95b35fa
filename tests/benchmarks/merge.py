"""Merging a LoRA into a checkpoint: wall time and peak memory, contender beside contender.

    python tests/benchmarks/merge.py --size 0.4 1.7 --nf4 --peft --mergekit OTHER_VENV/bin/python
    python tests/benchmarks/merge.py --smollm FOLDER --peft

The base is a Llama-shaped bfloat16 checkpoint of random weights (or a real one, `--smollm`), the adapter a LoRA of
rank 16 on all seven kinds of linear layer. Each contender is a process of its own, interpreter start included; they
take turns, each finds the inputs in the page cache and no earlier output on the disk, and each result is checked.
The yardstick is a plain copy that is as durable as a merge has to be. Linux only.

NumPy and rich are imported where they are used, since the process that measures must stay small: its own peak, about
16 MB, is the least that a memory figure can be.
"""

import argparse
import json
import math
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Config = dict[str, Any]

RANK, ALPHA = 16, 32

WIDTHS: dict[str, Config] = {
    "0.4": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
    "1.7": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32},
    "6.8": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 18, "num_attention_heads": 32},
}
KEY_VALUE_HEADS = {"0.4": 4, "1.7": 4, "6.8": 8}

# The yardstick and PEFT's way are kept as text: what a user would write, with no import beyond what it needs.
DURABLE_COPY = """
import os, sys
base, out = sys.argv[1:]
partial = out + ".partial"

def sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

os.mkdir(partial)
for name in sorted(os.listdir(base)):
    with open(os.path.join(base, name), "rb") as source, open(os.path.join(partial, name), "wb") as target:
        while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
            pass
        os.fsync(target.fileno())
sync_folder(partial)
os.rename(partial, out)
sync_folder(os.path.dirname(out))
"""

PEFT_SCRIPT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""

MERGEKIT_RECIPE = """
models:
  - model: {base}+{adapter}
merge_method: passthrough
dtype: bfloat16
"""


class Contender(NamedTuple):
    """One way to make `out` of a base and an adapter.

    Attributes:
        label: its row in the table.
        command: what is timed.
        rounds: in how many of the rounds it runs.
        warm_up: run once, untimed, to have its libraries in the page cache; none for the copy, which merges nothing.
        quantised: the base of four bits that it merges into, None for the task's own.
    """

    label: str
    command: list[str]
    rounds: int
    warm_up: list[str]
    quantised: Path | None = None


class Run(NamedTuple):
    """One process: seconds, and bytes resident at the peak, of which anonymous (not pages of mapped files)."""

    wall: float
    peak: int
    anonymous: int


class Task(NamedTuple):
    """The folders of one comparison; `out` and `cache` are removed before every run."""

    base: Path
    adapter: Path
    out: Path
    cache: Path


# The inputs.


def llama_config(size: str) -> Config:
    """A config.json that transformers loads as LlamaForCausalLM with an untied head."""
    heads = WIDTHS[size]["num_attention_heads"]
    return WIDTHS[size] | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": WIDTHS[size]["hidden_size"] // heads,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_key_value_heads": KEY_VALUE_HEADS[size],
        "pad_token_id": None,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32000,
    }


def linear_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """The `(out, in)` of each linear layer, by its name within the model."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    kinds = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{kind}": shape for layer in layers for kind, shape in kinds.items()}


def base_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the checkpoint, in the order in which shards are filled."""
    hidden, table = config["hidden_size"], (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    shapes |= {f"{name}.weight": shape for name, shape in linear_shapes(config).items()}
    for layer in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": table}


def shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The names of at least four shards of about a quarter of the bytes at most."""
    limit = sum(map(math.prod, shapes.values())) / 4
    filled: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if filled[-1] and size + math.prod(shape) > limit:
            filled.append([])
            size = 0
        filled[-1].append(name)
        size += math.prod(shape)
    return [sorted(names) for names in filled]


def bfloat16_chunks(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Normal values of deviation 0.02, or ones for a norm, a few megabytes at a time."""
    import numpy as np

    if len(shape) == 1:
        yield np.full(shape, 0x3F80, "<u2").tobytes()
        return
    draws = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    left = math.prod(shape)
    while left:
        values = draws.standard_normal(min(left, 1 << 20), np.float32) * np.float32(0.02)
        yield ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype("<u2").tobytes()
        left -= values.size


def write_base(config: Config, folder: Path) -> None:
    """Writes the checkpoint one chunk at a time; a folder that is there is whole, since it is renamed at the end."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shapes = base_shapes(config)
    files = shards(shapes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header: Config = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (partial / file).open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                target.writelines(bfloat16_chunks(name, shapes[name]))
    parameters = sum(map(math.prod, shapes.values()))
    metadata = {"total_parameters": parameters, "total_size": 2 * parameters}
    write_json(partial / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    write_json(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(partial / "config.json", config)
    partial.rename(folder)


def write_adapter(base: Path, folder: Path) -> None:
    """Writes a LoRA as PEFT 0.21.2 does, with a B away from zero: an update of about a tenth of random weights."""
    import numpy as np
    from safetensors.numpy import save_file

    draws = np.random.default_rng(16)
    tensors: dict[str, np.ndarray] = {}
    for name, (rows, columns) in linear_shapes(json.loads((base / "config.json").read_bytes())).items():
        key = f"base_model.model.{name}"
        bound = 1 / math.sqrt(columns)
        tensors[f"{key}.lora_A.weight"] = draws.uniform(-bound, bound, (RANK, columns)).astype(np.float32)
        tensors[f"{key}.lora_B.weight"] = draws.standard_normal((rows, RANK), np.float32) * np.float32(0.02)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", adapter_config(base))


def adapter_config(base: Path) -> Config:
    """Every field that PEFT 0.21.2 writes for a plain LoRA."""
    unset = """alora_invocation_tokens arrow_config auto_mapping corda_config eva_config exclude_modules kasa_config
        layer_replication layers_pattern layers_to_transform lora_ga_config megatron_config modules_to_save
        monteclora_config revision target_parameters trainable_token_indices use_bdlora velora_config"""
    off = "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora use_rslora"
    return dict.fromkeys(unset.split()) | dict.fromkeys(off.split(), False) | {
        "alpha_pattern": {},
        "base_model_name_or_path": str(base),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": RANK,
        "rank_pattern": {},
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip


def write_json(path: Path, value: Config) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# The measurement.


def measure(command: list[str]) -> None:
    """Runs a command and prints its figures, or its complaint, as JSON.

    Linux hands the memory peak of a process to the children that it starts, so this is called in a small process of
    its own, never in the one that has NumPy loaded.
    """
    anonymous = 0
    ended = threading.Event()

    def sample(status: Path) -> None:
        nonlocal anonymous
        while not ended.wait(0.004):
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    anonymous = max(anonymous, 1024 * int(line.split()[1]))

    with tempfile.TemporaryFile() as complaint:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaint)
        sampler = threading.Thread(target=sample, args=(Path(f"/proc/{child.pid}/status"),))
        sampler.start()
        assert child.stdout is not None
        child.stdout.read()
        # The child stays in /proc as a zombie until it is waited for, so the sampler never meets a missing file.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - started
        ended.set()
        sampler.join()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            complaint.seek(0)
            lines = complaint.read().decode(errors="replace").splitlines()[-20:]
            print(json.dumps({"complaint": "\n".join([f"exit status {child.returncode}", *lines])}))
        else:
            print(json.dumps({"wall": wall, "peak": 1024 * usage.ru_maxrss, "anonymous": anonymous}))


def measured(contender: Contender, task: Task) -> Run:
    """One run from equal conditions: outputs gone, the disk idle, the inputs in the page cache, free memory at hand."""
    for leftover in (task.out, task.out.with_name(task.out.name + ".partial"), task.cache):
        shutil.rmtree(leftover, ignore_errors=True)
    read_once(contender.quantised or task.base)
    read_once(task.adapter)
    os.sync()
    wake_memory(3 * weight_bytes(task.base) + (1 << 30))
    # Looking a local folder up on a hub would add a network's seconds to the contenders that do.
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-I", "-S", __file__, "--measure", *contender.command]
    answer = subprocess.run(launcher, env=surroundings, stdout=subprocess.PIPE, check=True).stdout
    figures = json.loads(answer)
    if "complaint" in figures:
        raise SystemExit(f"{contender.label} failed: {figures['complaint']}")
    if contender.warm_up:
        check_merged(task, contender)
    if weight_bytes(task.out) < 0.99 * weight_bytes(task.base):
        raise SystemExit(f"{contender.label}: the output is smaller than the base.")
    return Run(**figures)


def read_once(folder: Path) -> None:
    buffer = bytearray(1 << 22)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def wake_memory(size: int) -> None:
    """Touches free memory once.

    The host of a virtual machine may take idle memory back and hand it out again slowly: a copy that finds its page
    cache so took 3 to 5 seconds where it takes 1, and the next contender took what the first had paid for.
    """
    kibibytes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(kibibytes["MemFree"].split()[0])
    mmap.mmap(-1, min(size, free * 9 // 10), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_merged(task: Task, contender: Contender) -> None:
    """Stops the benchmark unless `W' - W` is the adapter's update on rows of the first and the last layer.

    The bound leaves room for one or two roundings to bfloat16; a plain copy would score 1.
    """
    import numpy as np

    names = list(linear_shapes(json.loads((task.base / "config.json").read_bytes())))
    for name in (names[0], names[-1]):
        first, second = (f"base_model.model.{name}.lora_{letter}.weight" for letter in "AB")
        delta = ALPHA / RANK * top_rows(task.adapter, second) @ top_rows(task.adapter, first)
        before = top_rows(task.base, f"{name}.weight")
        if contender.quantised:
            before = dequantised_rows(contender.quantised, f"{name}.weight")
        change = top_rows(task.out, f"{name}.weight") - before
        miss = np.linalg.norm(change - delta) / np.linalg.norm(delta)
        if not miss < 0.3:
            raise SystemExit(f"{contender.label}: {name} misses the adapter's update by {miss:.0%}.")


def top_rows(folder: Path, name: str, rows: int = 64) -> "np.ndarray":
    """The first rows of a tensor, in float32, from whichever file of the folder holds it."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            entry = json.loads(source.read(length)).get(name)
            if entry:
                source.seek(8 + length + entry["data_offsets"][0])
                shape = (min(rows, entry["shape"][0]), entry["shape"][1])
                if entry["dtype"] == "F32":
                    return np.fromfile(source, "<f4", math.prod(shape)).reshape(shape)
                bits = np.fromfile(source, "<u2", math.prod(shape)).astype(np.uint32)
                return (bits << np.uint32(16)).view(np.float32).reshape(shape)
    raise SystemExit(f"{folder} has no tensor {name}.")


def dequantised_rows(folder: Path, name: str, rows: int = 64) -> "np.ndarray":
    """The first rows of a weight that is quantised, in float32."""
    from peftarray.quant.layouts import find_quantised
    from peftarray.stores.checkpoint import Checkpoint

    with Checkpoint.open(folder) as files:
        weight = find_quantised(files, files.config, files.read_stored)[name]
        return weight.dequantize(files.read_stored, rows=(0, min(rows, weight.shape[0])))


# The comparison.


def contenders(task: Task, options: argparse.Namespace) -> list[Contender]:
    base, adapter, out = str(task.base), str(task.adapter), str(task.out)
    python, rounds = sys.executable, options.rounds
    copy = [python, "-I", "-S", "-c", DURABLE_COPY, base, out]
    ours = [python, "-m", "peftarray"]
    merge = [*ours, "merge", base, adapter, "-o", out, "--json"]
    chosen = [Contender("durable copy", copy, rounds, []), Contender("peftarray", merge, rounds, [*ours, "--help"])]
    if options.nf4:
        four = quantised_base(task)
        merge = [*ours, "merge", str(four), adapter, "-o", out, "--base-as", "dequantised", "--json"]
        chosen.append(Contender("peftarray, NF4 base", merge, rounds, [*ours, "--help"], four))
    if options.peft:
        imports = PEFT_SCRIPT.partition("base,")[0]
        script = [python, "-c", PEFT_SCRIPT, base, adapter, out]
        chosen.append(Contender("PEFT", script, 1, [python, "-c", imports]))
    if options.mergekit:
        recipe = task.adapter.with_name(task.adapter.name + "-mergekit.yaml")
        recipe.write_text(MERGEKIT_RECIPE.format(base=base, adapter=adapter))
        theirs = [options.mergekit, "-m", "mergekit.scripts.run_yaml"]
        merge = [*theirs, str(recipe), out, "--lora-merge-cache", str(task.cache)]
        chosen.append(Contender("mergekit", merge, 1, [*theirs, "--help"]))
    return chosen


def quantised_base(task: Task) -> Path:
    """The base in NF4, made by `peftarray quantize`."""
    folder = task.base.with_name(task.base.name + "-nf4")
    if not folder.exists():
        quantize = [sys.executable, "-m", "peftarray", "quantize", str(task.base), "-o", str(folder)]
        subprocess.run(quantize, stdout=subprocess.DEVNULL, check=True)
    return folder


def compare(task: Task, options: argparse.Namespace) -> dict[str, list[Run]]:
    """Every contender's runs, taken in turns; each round starts with another contender."""
    field = contenders(task, options)
    for contender in field:
        if contender.warm_up and subprocess.run(contender.warm_up, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(f"{contender.label} does not start: {' '.join(contender.warm_up)}")
    runs: dict[str, list[Run]] = {contender.label: [] for contender in field}
    for turn in range(options.rounds):
        start = turn % len(field)
        for contender in field[start:] + field[:start]:
            if turn < contender.rounds:
                run = measured(contender, task)
                print(f"  round {turn + 1}: {contender.label} {run.wall:.2f} s", file=sys.stderr)
                runs[contender.label].append(run)
    for leftover in (task.out, task.cache):
        shutil.rmtree(leftover, ignore_errors=True)
    return runs


def print_table(task: Task, runs: dict[str, list[Run]]) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    size, update = weight_bytes(task.base), weight_bytes(task.adapter)
    table = Table(title=f"{task.base.name}: {size / 1e6:,.0f} MB bf16, LoRA r={RANK} of {update / 1e6:,.0f} MB")
    for column in ("", "wall s (min-max)", "to copy", "GB/s", "peak MB", "anon. MB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    yardstick = statistics.median(run.wall for run in runs["durable copy"])
    for label, taken in runs.items():
        walls = [run.wall for run in taken]
        wall = statistics.median(walls)
        table.add_row(
            label,
            f"{wall:.2f} ({min(walls):.2f}-{max(walls):.2f})",
            f"{wall / yardstick:.2f}",
            f"{size / wall / 1e9:.2f}",
            f"{max(run.peak for run in taken) / 1e6:,.0f}",
            f"{max(run.anonymous for run in taken) / 1e6:,.0f}",
        )
    console = Console()
    console.print(table)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    console.print(
        f"{cores} cores, {memory:.0f} GB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}",
        highlight=False,
    )


def tasks(options: argparse.Namespace, work: Path) -> Iterator[Task]:
    """The comparisons asked for, their inputs made below `work` unless an earlier run left them there."""

    def task(label: str) -> Task:
        return Task(work / label, *(work / f"{label}-{role}" for role in ("adapter", "out", "merge-cache")))

    sizes = options.size or ([] if options.smollm else ["1.7"])
    for size in sizes:
        made = task(f"llama-{size}")
        if not made.base.exists():
            write_base(llama_config(size), made.base)
        write_adapter(made.base, made.adapter)
        yield made
    if options.smollm:
        # Beside the outputs, so that a copy and a merge stay on one file system.
        copied = task("smollm2")
        shutil.rmtree(copied.base, ignore_errors=True)
        shutil.copytree(options.smollm, copied.base)
        write_adapter(copied.base, copied.adapter)
        yield copied


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=WIDTHS, help="gigabytes of the random base (1.7)")
    parser.add_argument("--smollm", type=Path, metavar="DIR", help="a real bf16 checkpoint: see smollm2.py")
    parser.add_argument("--nf4", action="store_true", help="also a merge into the base in NF4, written in bfloat16")
    parser.add_argument("--peft", action="store_true", help="also PEFT's load, merge_and_unload, save_pretrained")
    parser.add_argument("--mergekit", metavar="PYTHON", help="also mergekit, by an interpreter that has it")
    parser.add_argument("--rounds", type=int, default=3, help="turns; PEFT and mergekit take one (3)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a folder on a real disk, kept and reused")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as temporary:
        for task in tasks(options, (options.work or Path(temporary)).resolve()):
            print_table(task, compare(task, options))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()
