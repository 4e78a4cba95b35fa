"""Data parallel training over two processes: DDP and FSDP2, against one process with the whole batch."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from peftarray.model import get_peft_model

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)

from .cases import CONFIGS  # noqa: E402
from .torch_net import Net, randomise  # noqa: E402

NAMES = ["lora", "dora", "vera", "lora-saved"]
IDS = torch.arange(8).reshape(4, 2)


def adapted(name: str) -> Any:
    return randomise(get_peft_model(Net(), CONFIGS[name]))


def step(model: Any, ids: Any) -> None:
    """One step down the mean loss of a batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model(ids) ** 2).mean().backward()
    optimizer.step()


def worker(rank: int, port: int, kind: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for name in NAMES:
            model = adapted(name)
            half = IDS[2 * rank : 2 * rank + 2]
            if kind == "ddp":
                step(torch.nn.parallel.DistributedDataParallel(model), half)
            else:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                mesh = init_device_mesh("cpu", (2,))
                for layer in model.model.layers:
                    fully_shard(layer["self_attn"], mesh=mesh)
                fully_shard(model, mesh=mesh)
                step(model, half)
            whole = {}
            for key, parameter in model.named_parameters():
                value = parameter.full_tensor() if kind == "fsdp" else parameter
                whole[key] = value.detach()
            if rank == 0:
                torch.save(whole, f"{folder}/{name}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.filterwarnings("ignore")
def test_two_processes_take_the_step_of_one(kind, tmp_path, monkeypatch):
    # Where the processes find `worker`, which they import; behind the installed package, which is not the checkout's.
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, kind, str(tmp_path)), nprocs=2)
    for name in NAMES:
        model = adapted(name)
        step(model, IDS)
        found = torch.load(tmp_path / f"{name}.pt")
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key], parameter.detach(), msg=f"{name} {key}")
