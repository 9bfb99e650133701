"""Files are whole or absent, only regular files are replaced, and killed runs leave nothing for good."""

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from smfnet.core import provenance
from smfnet.core.checks import InputError, user_path
from smfnet.core.provenance import atomic_path, check_output, scratch_folder, sweep, write_json

NOISE = np.random.default_rng(0).integers(0, 255, (120, 160)).astype(np.uint8)
WRITERS = {
    "text": lambda p: p.write_text("x" * 20_000),
    "image": lambda p: Image.fromarray(NOISE).save(p, format="PNG"),
    "weights": lambda p: save_file({"a": torch.ones(5000)}, p),
    "torch": lambda p: torch.save({"a": torch.ones(5000)}, p),
    "table": lambda p: pd.DataFrame(NOISE).to_csv(p),
    "arrays": lambda p: np.savez(p.open("wb"), a=NOISE),
}


def make(kind: str, path: Path) -> None:
    """Something that is no regular file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s, pytest.MonkeyPatch.context() as patch:
            patch.chdir(path.parent)
            s.bind(path.name)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:
            path.symlink_to(os.devnull)
    elif kind == "link to a device":
        path.symlink_to(os.devnull)


KINDS = ("folder", "pipe", "socket", "loop", "device", "link to a device")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
def test_only_regular_files_are_replaced(tmp_path, kind, writer):
    """Whoever writes: one message, before anything is written, and what was there is there."""
    target = tmp_path / "x.bin"
    make(kind, target)
    before, null = os.lstat(target), os.stat(os.devnull)
    with pytest.raises(InputError, match="x.bin: is a"), atomic_path(target) as part:
        WRITERS[writer](part)
    with pytest.raises(InputError, match="x.bin: is a"):
        check_output(target)
    after = os.lstat(target)
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino) and len(os.listdir(tmp_path)) == 1
    assert os.stat(os.devnull).st_ino == null.st_ino and stat.S_ISCHR(null.st_mode)


PLACES = {
    "below a file": ("file/x.csv", "file: cannot write there"),
    "far below a file": ("file/a/b/x.csv", "cannot write there"),
    "in /proc": ("/proc/none/x.csv", "cannot write there"),
    "in /sys": ("/sys/x.csv", "cannot write there"),
    "a long name": ("n" * 300, "no file can be called so"),
    "a long folder": (f"{'n' * 300}/x.csv", "no file can be called so"),
    "below a loop": ("loop/x.csv", "loop"),
    "a null byte": ("a\0b", "no file can be called so"),
    "nothing": ("", "is a folder"),
}


@pytest.mark.parametrize("place", PLACES)
def test_places_where_nothing_can_be_written(tmp_path, monkeypatch, place):
    """Said before the work, in one line, with nothing left behind; root may not write there either."""
    path, words = PLACES[place]
    if path.startswith(("/proc", "/sys")) and sys.platform != "linux":
        pytest.skip("no such file system here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    make("loop", tmp_path / "loop")
    for attempt in (check_output, lambda p: atomic_path(p).__enter__()):
        with pytest.raises(InputError, match=words) as e:
            attempt(path)
        assert str(e.value).count("\n") == 0
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("suffix", ["", ".png", ".safetensors", "." + "s" * 240, ".é", os.fsdecode(b".\xe9")])
def test_any_legal_name_can_be_written(tmp_path, suffix):
    """However long its ending or odd its letters: the temporary name is none too long."""
    target = tmp_path / f"a{suffix}"
    with atomic_path(target) as part:
        part.write_text("whole")
    assert target.read_text() == "whole" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("limit", [0, 1, 1000, 8000])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_up(tmp_path, writer, limit):
    """Every library reports that in a way of its own; it is one message, and the old file stays."""
    target = tmp_path / "x.bin"
    target.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError, match="x.bin: (cannot be written|the disk is full)"):
            with atomic_path(target) as part:
                WRITERS[writer](part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("shape", ["error of the system", "text of Rust"])
def test_errors_of_disks(tmp_path, number, shape):
    """Those that cannot be had by limits, as Python and as Rust put them."""
    text = f"I/O error: {os.strerror(number)} (os error {number})"
    error = OSError(number, os.strerror(number)) if shape == "error of the system" else RuntimeError(text)
    with pytest.raises(InputError, match="x.bin: "), atomic_path(tmp_path / "x.bin"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), OSError(errno.ENOENT, "no", "other"), InputError("own")]
)
def test_other_errors_are_not_called_trouble_with_the_disk(tmp_path, error):
    """A defect, and another file that is missing, keep their names."""
    with pytest.raises(type(error)) as e, atomic_path(tmp_path / "x.bin"):
        raise error
    assert e.value is error and not list(tmp_path.iterdir())


# --- what killed runs leave ---------------------------------------------------------------------------------

WRITE = """
import sys, time
from smfnet.core.provenance import atomic_path
for name in sys.argv[1:]: stack = atomic_path(name); part = stack.__enter__(); part.write_text("half")
print("writing", flush=True)
time.sleep(600)
"""
locks = pytest.mark.skipif(provenance.fcntl is None, reason="nothing is locked on Windows")


def writer(*targets: Path) -> subprocess.Popen:
    """A process that is in the middle of writing."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, *map(str, targets)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


@locks
def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    """Not while it lives, whoever sweeps; not what only looks like it; in a new run, not in each write."""
    (tmp_path / ".tmp-smfnet-mine").mkdir()
    (tmp_path / ".tmp-other").write_text("of another program")
    own = sorted(os.listdir(tmp_path))
    with writer(tmp_path / "a.png") as process:
        assert len(os.listdir(tmp_path)) == 3
        for _ in range(3):
            sweep(tmp_path)
            provenance.forget()
            with atomic_path(tmp_path / "b.png") as part:
                part.write_text("b")
        assert len(os.listdir(tmp_path)) == 4
        process.kill()
    provenance.forget()
    with atomic_path(tmp_path / "b.png") as part:
        part.write_text("b")
    assert sorted(os.listdir(tmp_path)) == [*own, "b.png"]


@locks
def test_two_writers_of_one_file(tmp_path):
    """Both write all of it, and the later one wins."""
    target = tmp_path / "x"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_text("first" * 1000)
        second.write_text("second" * 1000)
    assert target.read_text() == "first" * 1000 and os.listdir(tmp_path) == ["x"]


CROWD = """
import sys, time
from smfnet.core import provenance
end = time.monotonic() + float(sys.argv[2])
n = 0
while time.monotonic() < end:
    provenance.forget()
    with provenance.atomic_path(f"{sys.argv[1]}/{n % 7}") as part:
        part.write_text("x" * 1000)
    n += 1
print(n)
"""


@locks
def test_a_crowd_does_not_sweep_its_own(tmp_path):
    """Three processes that write and sweep in one folder as fast as they can; each write succeeds."""
    crowd = [
        subprocess.Popen([sys.executable, "-c", CROWD, str(tmp_path), "2"], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    counts = [int(p.communicate()[0]) for p in crowd]
    assert all(p.returncode == 0 for p in crowd) and min(counts) > 10
    assert sorted(os.listdir(tmp_path)) == [str(i) for i in range(7)]


def test_scratch_folders_go(tmp_path):
    """With all that is in them, after an error too."""
    with pytest.raises(KeyError), scratch_folder(tmp_path / "new") as folder:
        (folder / "deep").mkdir()
        (folder / "deep/x").touch()
        raise KeyError
    assert os.listdir(tmp_path) == ["new"] and not os.listdir(tmp_path / "new")


# --- what users type ----------------------------------------------------------------------------------------


def test_paths_that_users_type(tmp_path, monkeypatch):
    """What can be a path is one; `~` is the home folder; the rest is refused in one line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make("loop", tmp_path / "loop")
    for text in ("a", "a/b", "./~x", "汉 字", "-"):
        assert user_path(text) == Path(text)
    assert user_path("~/x") == tmp_path / "x"
    for text in ("", " ", "~no-such-user", "n" * 300, "loop", "loop/x", "a\0b", "d/" * 3000, "\ud800"):
        with pytest.raises(InputError) as e:
            user_path(text)
        assert str(e.value).isprintable() and len(str(e.value)) < 300


def test_json_of_names_that_are_no_text(tmp_path):
    """They come back as they were."""
    import json

    names = [os.fsdecode(bytes([c])) for c in range(1, 256)] + ['"\\', "汉字😀"]
    write_json(tmp_path / "x.json", names)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == names


def test_sweeping_costs_little(tmp_path):
    """A folder of a thousand images is looked through once, not a thousand times."""
    for i in range(1000):
        (tmp_path / f"{i}.png").touch()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "sweep", lambda folder: seen.append(folder))
        start = time.monotonic()
        for i in range(50):
            with atomic_path(tmp_path / f"{i}.png"):
                pass
    assert seen == [tmp_path] and time.monotonic() - start < 20
