"""Where nothing can be written, or may be: OUT in the way, no permission, a full disk. And options out of range."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import merged_tensors, read_tensors, tree, write_adapter, write_base
from refusals import ENVIRONMENT, CommandLine, one_line

import peftarray as pa


@pytest.fixture
def cli(capsys, monkeypatch):
    return CommandLine(capsys, monkeypatch)


@pytest.fixture
def inputs(tmp_path):
    """A base of three shards and its adapter, as arguments."""
    write_base(tmp_path / "base", shards=3)
    write_adapter(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


# OUT.


def test_out_is_a_folder_that_exists(cli, inputs, tmp_path):
    (tmp_path / "out").mkdir()
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "out", words=("out exists", "remove it first"))


def test_out_is_a_file(cli, inputs, tmp_path):
    (tmp_path / "out").write_text("mine")
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "out", words=("out exists",))


@pytest.mark.parametrize("target", ["nowhere", "out", "base"])
def test_out_is_a_link(cli, inputs, tmp_path, target):
    """To nothing, to itself, to the base."""
    (tmp_path / "out").symlink_to(target)
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "out", words=("OUT",))


@pytest.mark.parametrize(
    "out", ["base", "adapter", "base/merged", "base/a/b", "adapter/merged", "link/merged", "other/../base"]
)
def test_out_is_an_input_or_lies_in_one(cli, inputs, tmp_path, out):
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "other").mkdir()
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / out, words=("is, or lies in, the input", "another folder"))


def test_the_unfinished_out_would_be_an_input(cli, inputs, tmp_path):
    (tmp_path / "base").rename(tmp_path / "out.partial")
    cli.refuses(tmp_path, tmp_path / "out.partial", inputs[1], "-o", tmp_path / "out", words=("lies in, the input",))


def test_out_beside_a_base_of_one_file_is_no_place_within_it(cli, inputs, tmp_path):
    write_base(tmp_path / "single")
    place = (tmp_path / "single" / "model.safetensors", inputs[1], "-o", tmp_path / "single" / "merged")
    assert cli("merge", *place) == 0, cli.err
    assert cli("verify", *place[:2], place[3]) == 0, cli.out


def test_parent_of_out_is_missing(cli, inputs, tmp_path):
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "no" / "out", words=("no does not exist", "make it first"))


def test_parent_of_out_is_a_file(cli, inputs, tmp_path):
    (tmp_path / "file").write_text("")
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "file" / "out", words=("OUT",))


@pytest.mark.parametrize("length", [250, 300, 5000])
def test_name_that_is_too_long(cli, inputs, tmp_path, length):
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / ("x" * length), words=("name too long",))


@pytest.mark.parametrize("out", ["/", "."])
def test_out_is_where_one_stands(cli, inputs, tmp_path, out):
    cli.refuses(tmp_path, *inputs, "-o", out, words=("OUT",))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_the_place_of_the_unfinished_work_is_taken(cli, inputs, tmp_path, kind):
    partial = tmp_path / "out.partial"
    if kind == "file":
        partial.write_text("mine")
    elif kind == "folder":
        partial.mkdir()
        (partial / "mine").write_text("")
    else:
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to("elsewhere")
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "out", words=("out.partial",))


# Permissions. Root may do everything, so as root these run as another user, who loads the code while it still may.

WITHOUT_PRIVILEGES = """
import os, sys
from peftarray.cli import main
if os.geteuid() == 0:
    sys.argv[1:], refused = ["merge", *sys.argv[1:4], "--dry-run"], sys.argv[4:]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
    sys.argv[1:] = refused
else:
    del sys.argv[1:4]
main()
"""


@pytest.fixture
def open_place():
    """A folder that every user can reach, as pytest's own are not."""
    place = Path(tempfile.mkdtemp(prefix="peftarray-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("path", "mode", "words"),
    [
        ("room", 0o555, ("OUT", "no permission to write")),
        ("room", 0o000, ("OUT",)),
        ("base", 0o000, ("base", "cannot be read", "permission")),
        ("base", 0o444, ("base", "cannot be read", "permission")),
        ("base", 0o111, ("base", "cannot be read", "permission")),
        ("base/config.json", 0o000, ("config.json", "cannot be read", "permission")),
        ("base/model-00002-of-00003.safetensors", 0o000, ("model-00002", "cannot be read", "permission")),
        ("base/model.safetensors.index.json", 0o000, ("index.json", "cannot be read", "permission")),
        ("adapter", 0o000, ("adapter", "cannot be read", "permission")),
        ("adapter/adapter_config.json", 0o000, ("adapter_config.json", "cannot be read", "permission")),
        ("adapter/adapter_model.safetensors", 0o000, ("adapter_model.safetensors", "cannot be read", "permission")),
    ],
)
def test_no_permission(open_place, tmp_path, path, mode, words):
    for place in (open_place, tmp_path):
        write_base(place / "base", shards=3)
        write_adapter(place / "adapter")
    (open_place / "room").mkdir()
    (open_place / "room").chmod(0o777)
    before = tree(open_place)
    closed = open_place / path
    kept = closed.stat().st_mode
    closed.chmod(mode)
    sound = [tmp_path / "base", tmp_path / "adapter", f"--out={tmp_path / 'out'}"]
    asked = ["merge", open_place / "base", open_place / "adapter", "-o", open_place / "room" / "out"]
    command = [sys.executable, "-c", WITHOUT_PRIVILEGES, *map(str, [*sound, *asked])]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    closed.chmod(kept)
    assert done.returncode == 1, done.stderr
    one_line(done.stderr, words)
    assert tree(open_place) == before


# Space.


def test_too_little_space_is_noticed_before_the_first_byte(cli, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=1 << 30, used=0, free=1000))
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "out", words=("needs", "free", "free space, or give another place"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 3, 6])
@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync", "ftruncate"])
def test_disk_that_fails_in_the_middle(cli, inputs, tmp_path, monkeypatch, call, after, code):
    """Whatever call it meets: OUT is absent, base and adapter are as they were, and the same command finishes later."""
    before = tree(tmp_path)
    real, calls = getattr(os, call), iter(range(1000))

    def full(*arguments):
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(os, call, full)
        status = cli("merge", *inputs, "-o", tmp_path / "out")
        if status == 0:
            assert next(calls) <= after  # so few calls were made
        else:
            assert status == 1
            one_line(cli.err, ("free space",) if code != errno.EIO else ("check the",))
            assert not (tmp_path / "out").exists()
    assert {name: facts for name, facts in tree(tmp_path).items() if not name.startswith("out")} == before
    if status:
        assert cli("merge", *inputs, "-o", tmp_path / "out") == 0, cli.err
    assert_merged(tmp_path)


def assert_merged(place: Path, out: str = "out") -> None:
    """OUT holds what two of these inputs make, and nothing is left beside it."""
    found = read_tensors(place / out)
    wanted = merged_tensors(read_tensors(place / "base"), read_tensors(place / "adapter"))
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    assert not (place / f"{out}.partial").exists()
    assert sorted(file.name for file in (place / out).iterdir()) == sorted(p.name for p in (place / "base").iterdir())


def test_disk_that_is_really_full(cli, tmp_path):
    """A file system of a megabyte that another process fills while the merge runs, and empties for the second try."""
    big = {f"model.layers.{i}.mlp.x.weight": np.zeros((128, 256), np.float32) for i in range(5)}
    write_base(tmp_path / "base", write_base(tmp_path / "base") | big, shards=3)
    write_adapter(tmp_path / "adapter")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        before = tree(tmp_path / "base")
        filler = disk / "filler"
        enough = shutil.disk_usage(disk).free
        with pytest.MonkeyPatch.context() as patch:
            # The check comes first and sees an empty disk.
            patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=enough))
            filler.write_bytes(bytes(600_000))
            assert cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", disk / "out") == 1
        one_line(cli.err, ("no space left", "free space and run the same command again"))
        assert not (disk / "out").exists()
        assert tree(tmp_path / "base") == before
        filler.unlink()
        assert cli("merge", tmp_path / "base", tmp_path / "adapter", "-o", disk / "out") == 0, cli.err
        assert cli("verify", tmp_path / "base", tmp_path / "adapter", disk / "out") == 0, cli.out
    finally:
        subprocess.run(["umount", disk], check=True)


# Options.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scale", "nan"), ("scale is nan", "finite")),
        (("--scale", "inf"), ("scale is inf", "finite")),
        (("--scale", "1", "--scale", "2"), ("scale is [1.0, 2.0] for 1 adapters", "one for each")),
        (("--scale", "1e300"), ("overflow", "lower the scale")),
        (("--dtype", "int8"), ("dtype is 'int8'", "allowed are", "bfloat16")),
        (("--dtype", ""), ("dtype is ''", "allowed are")),
        (("--max-shard-size", "much"), ("max_shard_size is 'much'", "KB, MB, GB or TB")),
        (("--max-shard-size", "0"), ("max_shard_size is '0'", "at least 1")),
        (("--max-shard-size=-5GB",), ("max_shard_size is '-5GB'",)),
        (("--max-shard-size", "nan"), ("max_shard_size is 'nan'",)),
        (("--max-shard-size", "1e400"), ("max_shard_size is '1e400'",)),
        (("--max-shard-size", "5PB"), ("max_shard_size is '5PB'",)),
        (("--threads", "0"), ("threads is 0", "at least 1")),
        (("--threads=-3",), ("threads is -3",)),
        (("--threads", "1000000"), ("threads is 1000000", "at most")),
        (("--fail-if-retained-below", "nan"), ("a share, from 0 to 1",)),
        (("--fail-if-retained-below", "90"), ("a share, from 0 to 1",)),
    ],
)
def test_option_out_of_range(cli, inputs, tmp_path, options, words):
    cli.refuses(tmp_path, *inputs, "-o", tmp_path / "out", *options, words=words)


@pytest.mark.parametrize("options", [("--threads", "many"), ("--scale", "x"), ("--unheard-of",), ()])
def test_wrong_usage(cli, inputs, tmp_path, options):
    before = tree(tmp_path)
    out = ("-o", tmp_path / "out") if options else ()
    assert cli("merge", *inputs, *out, *options) == 2
    assert "Traceback" not in cli.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("scale", ["1", "ab", None, [], [1, "x"], [[1]], 10**400, {"a": 1}])
def test_scale_that_is_no_number_in_python(inputs, tmp_path, scale):
    before = tree(tmp_path)
    with pytest.raises(pa.ConfigError, match="one finite number, or one for each"):
        pa.merge(*inputs, tmp_path / "out", scale=scale)
    assert tree(tmp_path) == before


def test_no_adapter_in_python(inputs, tmp_path):
    with pytest.raises(pa.ConfigError, match="no adapter was given"):
        pa.merge(inputs[0], [], tmp_path / "out")
