"""Contenders in processes of their own, which work only when they are asked: one library a process, in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Contender", "serve", "turns"]

_PAUSE = 0.5
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Contender:
    """A process that answers requests, one a line."""

    name: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, file: str, name: str, threads: int, variables: Mapping[str, str] | None = None) -> Contender:
        """Start `file --serve name`.

        Args:
            file: the benchmark, which then calls `serve`.
            name: of the contender.
            threads: of each library's pool.
            variables: others of its environment.
        """
        environment = os.environ | dict.fromkeys(_THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, file, "--serve", name]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cls(name, subprocess.Popen(command, env=environment | dict(variables or {}), **pipes))

    def ask(self, *request: Any) -> Any:
        """The answer to a request; both are what JSON can hold."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended at {request}.")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[..., Any]) -> None:
    """Be a contender: answer what is asked until nothing more is."""
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)


def turns(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Each contender once a round, another one first in each, after a pause: threads go on waiting for work a while."""
    for turn in range(rounds):
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            time.sleep(_PAUSE)
            yield contender
