"""A process that is killed once its first shard is done, however slow the disk or the machine is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from refusals import ENVIRONMENT

from peftarray.merging.journal import read_journal

CHILD = """
import sys
import peftarray as pa

def progress(count, name):
    print("piece", flush=True)
    sys.stdin.readline()

{call}
"""


def kill_after_first_shard(call: str, *arguments: Path, pieces: int) -> None:
    """Runs `call`, which reports to `progress`, waits for it at each of its pieces, and kills it when the journal
    beside its result, the last of the arguments, names a shard: at the latest at the last of its pieces."""
    command = [sys.executable, "-c", CHILD.format(call=call), *map(str, arguments)]
    partial = arguments[-1].with_name(f"{arguments[-1].name}.partial")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for piece in count(1):
            assert child.stdout.readline() == "piece\n", "it ended by itself"
            if names_shard(partial, seconds=0.05 if piece < pieces else 30):
                break
            child.stdin.write("\n")
            child.stdin.flush()
        child.send_signal(signal.SIGKILL)


def names_shard(folder: Path, seconds: float) -> bool:
    """Whether the journal says that a shard is done, within a time: a thread that waits for the disk writes it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (read_journal(folder) or {"finished": {}})["finished"]:
            return True
        time.sleep(0.005)
    return False
