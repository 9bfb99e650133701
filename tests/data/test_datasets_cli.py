"""`smfnet data` as a shell sees it."""

import errno
import shutil
import subprocess
import sys

import pytest
from datasets_toys import png, scenes
from test_datasets_registry import make_m3fd

from smfnet.cli import main
from smfnet.data import acquire
from smfnet.data.acquire import STAGE


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMFNET_DATA", raising=False)


def test_list(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "RoadScene" in out and "train-disjoint" in out and "(4200)" in out and "to add by hand" in out


def test_add_verify_list(tmp_path, capsys):
    make_m3fd(tmp_path / "down")
    assert main(["data", "add", "M3FD", "down"]) == 0
    assert "M3FD detection: 3 pairs" in capsys.readouterr().out
    assert main(["data", "verify"]) == 0 == main(["data", "verify", "m3fd"])
    capsys.readouterr()
    main(["data", "list"])
    assert "here" in next(line for line in capsys.readouterr().out.splitlines() if "detection" in line)
    (tmp_path / "data/M3FD/M3FD_Detection/Ir/00001.png").write_bytes(b"x")
    assert main(["data", "verify", "M3FD"]) == 1
    assert "corrupt: M3FD/M3FD_Detection/Ir/00001.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "data verify",
        "data verify TNO",
        "data verify Nothing",
        "data get M3FD",
        "data get TNO train",
        "data add TNO gone.zip",
        "data add scenes .",
        "data check",
        "data check gone",
        "data get TNO --mirror http://127.0.0.1:1 --root new",
    ],
)
def test_bad_requests_are_one_line(line, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    message = err[err.index("smfnet: error: ") :]
    assert not out and message.count("\n") == 1 and "Traceback" not in err


def test_check(tmp_path, capsys):
    for i, s in enumerate(scenes(2)):
        png(tmp_path / f"mine/thermal/{i}.png", s.ir)
        png(tmp_path / f"mine/colour/{i}.png", s.vis)
    line = "data check --ir mine/thermal --vis mine/colour"
    assert main(line.split()) == 0 and "2 pairs checked, nothing found" in capsys.readouterr().out
    (tmp_path / "mine/colour/1.png").rename(tmp_path / "mine/colour/2.png")
    assert main(line.split()) == 1 and "partner 2" in capsys.readouterr().out


def test_help_needs_no_torch():
    code = (
        "import sys; from smfnet.cli import main\n"
        "try: main(['data', 'list', '--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False")


SLOW = """
import shutil, sys, time
from smfnet.cli import main
from smfnet.data import acquire

def stall(source, target, **options):
    print("copying", flush=True)
    time.sleep(600)

acquire.shutil.copyfile = stall
main(["data", "add", "M3FD", "down"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked on Windows")
def test_a_killed_import_leaves_nothing_for_good(tmp_path, capsys):
    """Its part of the staging folder stays while it lives; the next import after its death removes it."""
    make_m3fd(tmp_path / "down")
    staging = tmp_path / "data" / STAGE
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE) as killed:
        assert killed.stdout.readline() == b"copying\n"
        (part,) = staging.iterdir()
        assert main(["data", "add", "M3FD", "none.zip"]) == 2 and part.exists()
        assert main(["data", "add", "M3FD", "down"]) == 0 and part.exists()  # another run is at work there
        killed.kill()
    shutil.rmtree(tmp_path / "data/M3FD")
    assert main(["data", "add", "M3FD", "down"]) == 0 and not staging.exists()


def test_a_full_disk_is_not_a_damaged_archive(tmp_path, capsys, monkeypatch):
    """The message blames the place, not the download, and nothing is installed."""
    make_m3fd(tmp_path / "down")
    archive = shutil.make_archive("m3fd", "zip", tmp_path / "down")

    def full(self, source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(acquire._Budget, "copy", full)
    assert main(["data", "add", "M3FD", archive]) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and "damaged" not in err and err.count("\n") == 1
    assert not list((tmp_path / "data").iterdir())
