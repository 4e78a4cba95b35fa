"""A merge that is killed goes on where it stopped, to the same bytes; two merges never write one result."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import layer_shapes, lora_config, lora_tensors, read_tensors, tree, write_adapter, write_base
from refusals import ENVIRONMENT

import peftarray as pa
from peftarray.merging import writing
from peftarray.merging.journal import JOURNAL

KILLS, LAYERS, SHARDS = 20, 10, 5
# Says when it begins; waits at its first piece of work if it is told to, or is killed so many seconds after a piece.
CHILD = """
import itertools, os, signal, sys, threading, time
import peftarray as pa
base, adapter, out, wait, last, seconds = sys.argv[1:]
pieces = itertools.count(1)  # two threads count

def kill():
    time.sleep(float(seconds))
    os.kill(os.getpid(), signal.SIGKILL)

def progress(count, name):
    piece = next(pieces)
    if wait and piece == 1:
        print("begun", flush=True)
        sys.stdin.readline()
    if piece == int(last):
        threading.Thread(target=kill).start() if float(seconds) else kill()

pa.merge, pa.inspect  # everything is imported by now
import peftarray.merging
print("ready", flush=True)
pa.merge(base, adapter, out, threads=2, progress=progress)
print(next(pieces) - 1)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base of 80 MB in five shards, an adapter for all of its layers, and what an undisturbed merge makes of them."""
    place = tmp_path_factory.mktemp("crash")
    rng = np.random.default_rng(0)
    tensors, modules = {}, {}
    for layer in range(LAYERS):
        for module, shape in layer_shapes(layer, 768, 1536).items():
            # Any bits, but with an exponent below that of 1.
            bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16) & 0xBF7F
            tensors[f"{module}.weight"] = bits.view(ml_dtypes.bfloat16)
            if len(shape) == 2 and not module.endswith("v_proj"):
                modules[module] = shape
    write_base(place / "base", tensors, shards=SHARDS, layers=LAYERS)
    config = lora_config(target_modules=["q_proj", "up_proj", "down_proj"])
    write_adapter(place / "adapter", lora_tensors(modules), config)
    pa.merge(place / "base", place / "adapter", place / "undisturbed")
    return place


@pytest.fixture(scope="module")
def undisturbed(inputs):
    return contents(inputs / "undisturbed")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(
    inputs: Path, out: Path, *, wait: bool = False, kill_after: tuple[int, float] = (0, 0.0)
) -> subprocess.Popen[str]:
    """The merge in a process of its own, which is about to begin."""
    options = ["wait" if wait else "", *kill_after]
    command = [sys.executable, "-c", CHILD, inputs / "base", inputs / "adapter", out, *options]
    child = subprocess.Popen(
        [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def end(child: subprocess.Popen[str]) -> int:
    child.communicate(timeout=60)
    return child.returncode


def test_killed_at_random_moments_and_started_again(inputs, undisturbed, tmp_path):
    before = tree(inputs / "base") | tree(inputs / "adapter")
    child = start(inputs, tmp_path / "counted")
    pieces = int(child.communicate(timeout=60)[0])
    assert child.returncode == 0
    shutil.rmtree(tmp_path / "counted")
    rng = np.random.default_rng(7)
    unfinished, resumed = 0, []
    # One in each twentieth of the work: at the end of a piece, or a little later, in the midst of something.
    for kill in range(KILLS):
        out = tmp_path / "out"
        last = 1 + int((kill + rng.random()) / KILLS * pieces)
        end(start(inputs, out, kill_after=(last, kill % 2 * 0.01 * rng.random())))
        finished = out.exists() and not (out / JOURNAL).exists()
        unfinished += not finished
        if not finished:
            assert not out.exists() or (out / JOURNAL).exists()
            report = pa.merge(inputs / "base", inputs / "adapter", out)
            resumed.append(report.resumed)
            assert len(report.tensors) == 3 * LAYERS
        assert contents(out) == undisturbed, f"killed after {last} of {pieces} pieces"
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)
    assert tree(inputs / "base") | tree(inputs / "adapter") == before
    assert unfinished >= KILLS // 2, "the kills came too late"
    assert any(resumed), "no kill came after the first shard was whole"


def test_killed_again_and_again(inputs, undisturbed, tmp_path):
    """Each run gets a little further; the last makes the same bytes."""
    out = tmp_path / "out"
    for last in (1, 4, 8, 12):
        end(start(inputs, out, kill_after=(last, 0.0)))
        assert not out.exists()
    pa.merge(inputs / "base", inputs / "adapter", out)
    assert contents(out) == undisturbed


def test_second_merge_into_the_same_place_is_refused(inputs, undisturbed, tmp_path):
    child = start(inputs, tmp_path / "out", wait=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    for scale in (1.0, 0.5):
        with pytest.raises(pa.OutputError, match=r"another process is writing .*out\.partial"):
            pa.merge(inputs / "base", inputs / "adapter", tmp_path / "out", scale=scale)
    assert child.stdin is not None
    child.stdin.write("\n")
    assert end(child) == 0
    assert contents(tmp_path / "out") == undisturbed


class Killed(BaseException):
    """Stands in for a signal, where the moment must be exact."""


def stop_after(pieces: int):
    """A progress function that ends the merge after so many pieces of work."""
    count = iter(range(10**6))

    def progress(nbytes: int, name: str) -> None:
        if next(count) >= pieces:
            raise Killed

    return progress


@pytest.fixture
def small(tmp_path):
    write_base(tmp_path / "base", shards=3)
    write_adapter(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def unfinished(small, out: Path, **options) -> None:
    with pytest.raises(Killed):
        pa.merge(*small, out, progress=stop_after(6), threads=1, **options)
    assert not out.exists()
    assert (out.with_name("out.partial") / JOURNAL).exists()


@pytest.mark.parametrize(
    ("count", "other"), [(1, {"scale": 0.5}), (1, {"dtype": "float16"}), (1, {"max_shard_size": 500}), (2, {})]
)
def test_unfinished_work_of_another_merge_is_left_alone(small, tmp_path, count, other):
    out = tmp_path / "out"
    unfinished(small, out)
    before = tree(tmp_path)
    adapters = [small[1]] * count
    for _ in range(2):  # a refusal holds no lock
        with pytest.raises(pa.OutputError, match="other inputs or options"):
            pa.merge(small[0], adapters, out, **other)
    assert tree(tmp_path) == before
    report = pa.merge(*small, out)
    assert report.resumed >= 1
    assert pa.verify(*small, out).passed


@pytest.mark.parametrize("what", ["base", "adapter", "configuration of the base", "configuration of the adapter"])
def test_inputs_that_changed_meanwhile(small, tmp_path, what):
    out = tmp_path / "out"
    unfinished(small, out)
    if what == "base":
        write_base(small[0], shards=3, seed=5)
    elif what == "adapter":
        write_adapter(small[1], {name: 2 * array for name, array in read_tensors(small[1]).items()})
    elif what == "configuration of the base":
        write_base(tmp_path / "other", config={"rope_theta": 5.0})
        (tmp_path / "other" / "config.json").replace(small[0] / "config.json")
    else:
        config = small[1] / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    with pytest.raises(pa.OutputError, match="other inputs or options"):
        pa.merge(*small, out)
    assert not out.exists()
    shutil.rmtree(tmp_path / "out.partial")
    pa.merge(*small, out)
    assert pa.verify(*small, out).passed


def test_killed_before_the_journal_had_its_name(small, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / f"{JOURNAL}.new").write_text('{"finger')
    pa.merge(*small, tmp_path / "out")
    assert pa.verify(*small, tmp_path / "out").passed
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "nonsense", '{"fingerprint": 5, "finished": {}}', '{"fingerprint": "a"}']
)
def test_journal_that_is_none(small, tmp_path, text):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / JOURNAL).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(pa.OutputError, match="remove the folder"):
        pa.merge(*small, tmp_path / "out")
    assert tree(tmp_path) == before


def test_shard_that_is_gone_or_cut_is_written_again(small, tmp_path):
    unfinished(small, tmp_path / "out")
    partial = tmp_path / "out.partial"
    shards = sorted(partial.glob("*.safetensors"))
    os.truncate(shards[0], 10)
    pa.merge(*small, tmp_path / "out")
    assert pa.verify(*small, tmp_path / "out").passed


@pytest.fixture
def unnamed(small, tmp_path, monkeypatch):
    """A merge that was killed between its renaming and its last step. Returns OUT."""
    folders = []

    def sync(folder):
        folders.append(folder)
        if len(folders) == 2:  # the unfinished folder, and then the one that OUT has been put into
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(writing, "sync_folder", sync)
        with pytest.raises(Killed):
            pa.merge(*small, tmp_path / "out")
    assert (tmp_path / "out" / JOURNAL).exists()
    assert not (tmp_path / "out.partial").exists()
    return tmp_path / "out"


def test_killed_between_renaming_and_the_last_step(small, unnamed):
    report = pa.merge(*small, unnamed)
    assert report.resumed == 3
    assert len(report.tensors) == 4
    assert not (unnamed / JOURNAL).exists()
    assert pa.verify(*small, unnamed).passed
    with pytest.raises(pa.OutputError, match="exists"):
        pa.merge(*small, unnamed)


def test_another_merge_does_not_take_over_what_only_lacks_the_last_step(small, unnamed, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(pa.OutputError, match="exists"):
        pa.merge(*small, unnamed, scale=0.5)
    assert tree(tmp_path) == before


def test_unfinished_result_is_no_base(small, unnamed, tmp_path):
    with pytest.raises(pa.FormatError, match="did not finish"):
        pa.merge(unnamed, small[1], tmp_path / "further")


def test_base_that_is_cut_while_it_is_read(small, tmp_path):
    """The result is incomplete, and what was finished is kept for when the file is whole again."""
    last = sorted(small[0].glob("*.safetensors"))[-1]
    whole = last.read_bytes()

    def progress(nbytes, name):
        os.truncate(last, 8)

    with pytest.raises(pa.PeftError, match=r"truncated|ended at byte"):
        pa.merge(*small, tmp_path / "out", progress=progress, threads=1)
    assert not (tmp_path / "out").exists()
    last.write_bytes(whole)
    with pytest.raises(pa.OutputError, match="other inputs"):  # it was written anew, and may be another
        pa.merge(*small, tmp_path / "out")


@pytest.mark.parametrize("call", ["mmap", "copy_file_range"])
def test_file_system_that_lacks_the_short_way(small, tmp_path, monkeypatch, call):
    """No mappings, or no copies inside the kernel: the merge reads and writes instead."""

    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV if call == "mmap" else errno.EXDEV, "not here")

    monkeypatch.setattr(mmap if call == "mmap" else os, call, refuse)
    pa.merge(*small, tmp_path / "out", verify=True)
    monkeypatch.undo()
    assert pa.verify(*small, tmp_path / "out").passed


def test_out_that_came_into_being_meanwhile(small, tmp_path):
    def progress(nbytes, name):
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(pa.OutputError, match=r"rename it yourself"):
        pa.merge(*small, tmp_path / "out", progress=progress)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out").rmdir()
    assert pa.merge(*small, tmp_path / "out").resumed == 3
