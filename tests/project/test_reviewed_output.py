"""What an independent reviewer found in output: names in tables, streams as files, other spellings."""

import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.core.provenance import atomic_path
from smfnet.fusion import fuse_folder
from smfnet.fusion.baselines import BASELINES
from smfnet.metrics.folder import evaluate_folder, format_summary, read_csv, write_csv

RNG = np.random.default_rng(0)


def sides(root, names, roles=("ir", "vi", "out")):
    for role in roles:
        (root / role).mkdir()
        for name in names:
            smooth = np.kron(RNG.integers(0, 256, (6, 8)), np.ones((8, 8))).astype(np.uint8)
            Image.fromarray(smooth).save(root / role / name)
    return root


def table(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate_folder(fused=root / "out", ir=root / "ir", vis=root / "vi", progress=False)


ODD = ["Icon\r", "two\nlines", "\x1b[31mred", "undefined", "NaN", 'quo"te', "a,b", " x "]


@pytest.mark.parametrize("stem", ODD)
def test_odd_names_survive_a_csv_file(tmp_path, stem):
    found = table(sides(tmp_path, [f"{stem}.png", "b.png"]))
    write_csv({stem: found, "m": found}, tmp_path / "t.csv")
    again = read_csv(tmp_path / "t.csv")
    assert len(again) == 2 and all(len(t) == 2 for t in again.values())
    assert np.allclose(again["m"]["EN"].sort_values(), found["EN"].sort_values())
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 5
    assert not {"\x1b", "\r"} & set(format_summary({stem: found}))


def test_a_torn_table_is_an_input_error(tmp_path):
    found = table(sides(tmp_path, ["a.png"]))
    write_csv({"m": found}, tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace(text.splitlines()[1].split(",")[3], "x"))
    with pytest.raises(InputError, match="t.csv: cannot be read as a table"):
        read_csv(tmp_path / "t.csv")


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout here")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/tmp/../dev/stdout"])
def test_streams_are_no_files(name):
    with pytest.raises(InputError, match="is a stream"), atomic_path(name):
        pass


def test_existing_outputs_are_known_by_any_spelling(tmp_path):
    root = sides(tmp_path, ["é.png", "b.png"], roles=("ir", "vi"))
    options = dict(ir=root / "ir", vis=root / "vi", out=root / "out", progress=False)
    options["model"] = BASELINES["average"]
    fuse_folder(**options)
    (root / "out/é.png").rename(root / "out" / unicodedata.normalize("NFD", "é.png"))
    report = fuse_folder(**options, skip_existing=True)
    assert len(report.skipped) == 2 and not report.written
    assert len(fuse_folder(**options).written) == 2 and len(list((root / "out").iterdir())) == 2


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_full_streams_do_not_stop_the_work(tmp_path):
    root = sides(tmp_path, [f"{i}.png" for i in range(3)], roles=("ir", "vi"))
    code = "from smfnet.cli import main; raise SystemExit(main())"
    check = [sys.executable, "-c", code, "data", "check", str(root)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(check, stdout=subprocess.PIPE, stderr=full, text=True)
    assert "3 pairs" in done.stdout
    counts = (np.arange(48 * 64).reshape(48, 64) % 4000 + 7000).astype(np.uint16)
    Image.fromarray(counts).save(root / "ir/0.png")
    fuse = [sys.executable, "-u", "-c", code, "fuse", "--out", str(root / "out"), "--threads", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*fuse, "--ir", str(root / "ir"), "--vis", str(root / "vi")], stdout=full, stderr=subprocess.PIPE
        )
    assert len(list((root / "out").glob("*.png"))) == 3 and done.returncode != 0
