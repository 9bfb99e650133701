"""The command line as a shell sees it: exit status, streams, files."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smfnet import __version__
from smfnet.cli import main
from smfnet.core import progress
from smfnet.data.pixels import read_pixels
from smfnet.fusion import files as fusion
from smfnet.network.model import SMFNet


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(40, 200, shape).astype(np.uint8)


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Two pairs of 64×48 pixels, weights of an untrained network, and the working folder."
    for seed, name in enumerate("ab"):
        for side, channels in (("ir", ()), ("vi", (3,))):
            (tmp_path / side).mkdir(exist_ok=True)
            Image.fromarray(noise(48, 64, *channels, seed=seed)).save(tmp_path / side / f"{name}.png")
    torch.manual_seed(0)
    SMFNet("tiny").save(tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FUSE = "fuse --ir ir --vis vi --out out --weights w.safetensors --device cpu"


def test_fusing_folders(place, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", float("inf"))  # as if the machine were fast: no line is due
    assert main(f"{FUSE} --threads 1".split()) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 pairs fused into out" in out and err == ""  # a short run in a log needs no progress
    assert {p.name: read_pixels(p).values.shape for p in Path("out").iterdir()} == {
        "a.png": (48, 64, 3),
        "b.png": (48, 64, 3),
    }
    assert torch.get_num_threads() == 1


FINISHED = r"\w+.*: 1 of 2 {0}s, about \d\d:\d\d left\n\w+.*: 2 of 2 {0}s, about 00:00 left\n"


def test_a_log_gets_plain_lines(place, monkeypatch, capsys):
    """Where nothing can be redrawn, here with a line for each item instead of one every ten seconds."""
    monkeypatch.setattr(progress, "EVERY", 0)
    for line, unit in (
        (FUSE, "pair"),
        (FUSE.replace("fuse", "video", 1).replace("out out", "out film"), "frame"),
        ("evaluate --fused out --ir ir --vis vi", "image"),
    ):
        assert main(line.split()) == 0
        assert re.fullmatch(FINISHED.format(unit), capsys.readouterr().err), line


def test_a_terminal_gets_a_bar(place, monkeypatch, capsys):
    """One line that is drawn over itself."""
    monkeypatch.setattr(progress, "redrawn", lambda: True)
    assert main(FUSE.split()) == 0
    err = capsys.readouterr().err
    assert "\r" in err and "fusing" in err and err.count("\n") == 1


def test_fusing_two_files(place):
    Path("ir/a.png").rename("thermal.png")
    assert main(FUSE.replace("--ir ir --vis vi", "--ir thermal.png --vis vi/b.png").split()) == 0
    assert os.listdir("out") == ["b.png"]


def test_options_reach_the_fusion(place, monkeypatch):
    seen = {}

    def record(**options):
        seen.update(options)
        return fusion.FusionReport(Path("out"))

    monkeypatch.setattr(fusion, "fuse_folder", record)
    options = "--range -3.5 40 --vis-range 0 4095 --names IR* VIS* --recursive --stretch --max-memory 2GB"
    assert main(f"{FUSE} {options} --skip-existing".split()) == 0
    assert seen == {
        "ir": "ir",
        "vis": "vi",
        "out": "out",
        "model": "w.safetensors",
        "device": "cpu",
        "range": [-3.5, 40.0],
        "vis_range": [0, 4095],
        "names": ["IR*", "VIS*"],
        "recursive": True,
        "stretch": True,
        "max_memory": 2 * 10**9,
        "skip_existing": True,
    }
    assert main("fuse --ir ir --vis vi --out out".split()) == 0
    assert (
        seen["model"] == "tiny"
        and seen["stretch"] is False
        and seen["range"] is None
        and seen["device"] == "auto"
        and seen["max_memory"] is None
    )


def test_skipping_what_is_there(place, capsys):
    assert main(FUSE.split()) == 0
    Path("out/a.png").write_bytes(b"kept")
    assert main(f"{FUSE} --skip-existing".split()) == 0
    assert "2 were there already" in capsys.readouterr().out and Path("out/a.png").read_bytes() == b"kept"


def test_the_range_of_a_thermal_image_is_printed(place, capsys):
    Image.fromarray(noise(48, 64).astype(np.uint16) + 7000).save("ir/a.png")
    assert main(FUSE.split()) == 0
    assert "a.png: infrared range 70" in capsys.readouterr().out


def test_some_bad_pairs_exit_with_one(place, capsys):
    Path("ir/b.png").write_bytes(Path("ir/b.png").read_bytes()[:200])
    assert main(FUSE.split()) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 pairs" in err and "b.png" in err and "Traceback" not in err and out == ""
    assert os.listdir("out") == ["a.png"]


def test_only_bad_pairs_exit_with_two(place, capsys):
    assert (
        main(FUSE.replace("--ir ir", "--ir ir/a.png").replace("--vis vi", "--vis w.safetensors").split()) == 2
    )
    assert "w.safetensors" in capsys.readouterr().err and os.listdir("out") == []


class Malicious:
    "A pickle that would leave a file behind if it were run."

    def __reduce__(self):
        return (Path.touch, (Path("trace"),))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("--ir ir", "--ir none"), "none: no such file or folder"),
        (("--ir ir", "--ir empty"), "empty: holds no image"),
        (("--vis vi", "--vis ir"), "infrared and as visible"),
        (("--out out", "--out w.safetensors"), "w.safetensors: cannot be written"),
        (("--out out", "--out w.safetensors/deeper"), "cannot be written"),
        (("--out out", "--out /proc/none"), "/proc/none: cannot be written"),
        (("--out out", "--out vi"), "vi: is a source folder"),
        (
            ("w.safetensors", "none.safetensors"),
            "none.safetensors: no such weights file; give 'tiny' (shipped), the authors' checkpoint, or",
        ),
        (("w.safetensors", "huge"), "'huge'"),
        (("w.safetensors", "ir/a.png"), "ir/a.png"),
        (("w.safetensors", "evil.pth"), "evil.pth: refused"),
        (("--device cpu", "--range 7 3"), "range: 7 3"),
        (("--device cpu", "--range nan 3"), "range: nan 3"),
    ],
)
def test_bad_input_is_one_line_and_two(place, capsys, change, word):
    if "/proc" in word and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    Path("empty").mkdir()
    Path("evil.pth").write_bytes(pickle.dumps(Malicious()))
    sources = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    assert main(FUSE.replace(*change).split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("smfnet: error: ") and err.count("\n") == 1 and word in err and out == ""
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == sources


def test_a_gpu_that_is_not_there(place, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(FUSE.replace("--device cpu", "--device cuda").split()) == 2
    assert "not available" in capsys.readouterr().err


def test_interrupting_exits_with_130(place, monkeypatch, capsys):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fusion, "fuse_folder", interrupted)
    assert main(FUSE.split()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_defects_are_not_hidden(place, monkeypatch):
    def defect(**options):
        raise ZeroDivisionError

    monkeypatch.setattr(fusion, "fuse_folder", defect)
    with pytest.raises(ZeroDivisionError):
        main(FUSE.split())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fuse",
        "fuse --ir a --vis b",
        f"{FUSE} --threads 0",
        f"{FUSE} --max-memory lots",
        f"{FUSE} --range 3",
        f"{FUSE} --device tpu",
        "paint",
    ],
)
def test_wrong_usage_is_explained(line, capsys):
    with pytest.raises(SystemExit) as e:
        main(line.split())
    assert e.value.code == 2 and "usage: smfnet" in capsys.readouterr().err


def test_help_and_version_answer_without_torch():
    code = (
        "import sys; from smfnet.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == [f"smfnet {__version__}", "0 False"], done.stderr


@pytest.mark.parametrize(
    ("change", "word"),
    [(("--ir ir", "--ir none"), "none: no such"), (("w.safetensors", "evil.pth"), "evil.pth: refused")],
)
def test_as_a_process_says_one_line(place, change, word):
    Path("evil.pth").write_bytes(pickle.dumps(Malicious()))
    code = "from smfnet.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *FUSE.replace(*change).split()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith(f"smfnet: error: {word}")
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert not Path("trace").exists()


def test_evaluating_writes_a_table(place):
    assert main(FUSE.split()) == 0
    assert main("evaluate --fused out --ir ir --vis vi --protocol table1 --csv table.csv".split()) == 0
    text = Path("table.csv").read_text()
    assert all(word in text for word in ("EN", "Qabf", "a", "b"))


def test_evaluating_bad_input_is_one_line(place, capsys):
    (place / "none").mkdir()
    assert main("evaluate --fused none --ir ir --vis vi --csv table.csv".split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("smfnet: error: ") and "none" in err and not Path("table.csv").exists()
