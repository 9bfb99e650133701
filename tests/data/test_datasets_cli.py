"""`smfnet data` as a shell sees it."""

import subprocess
import sys

import pytest
from datasets_toys import png, scenes
from test_datasets_registry import make_m3fd

from smfnet.cli import main


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
