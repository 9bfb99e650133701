"""What is installed: the wheel has what the package speaks of, and its page has links that work anywhere."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    "pyproject.toml",
    "setup.py",
    "settings.ini",
    "README.md",
    "LICENSE",
    "smfnet",
    "data/published",
    "nbs/apps",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the files that it needs."""
    pytest.importorskip("setuptools", minversion="77", reason="no setuptools of version 77 or newer")
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        (copy / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / part, copy / part)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(folder)
    return folder


def run(installed: Path, code: str, cwd: Path) -> str:
    """What a program prints that finds the package only there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SMFNET")} | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_every_module_and_all_data(installed):
    wanted = {p.relative_to(ROOT) for p in (ROOT / "smfnet").rglob("*.py")}
    wanted |= {Path("smfnet/published", p.name) for p in (ROOT / "data/published").glob("*.csv")}
    wanted |= {Path("smfnet/apps", p.name) for p in (ROOT / "nbs/apps").glob("*.ipynb")}
    wanted |= {p.relative_to(ROOT) for p in (ROOT / "smfnet/weights").iterdir() if p.is_file()}
    there = {p.relative_to(installed) for p in installed.rglob("*") if p.is_file()}
    assert len(wanted) > 120 and not wanted - there


def test_published_tables_and_claims_are_found_without_the_repository(installed, tmp_path):
    code = (
        "import smfnet; from smfnet.report.published import load_published; from smfnet.report.claims import "
    )
    code += "load_claims; print(smfnet.__file__); print(len(load_published()), len(load_claims()))"
    place, counts = run(installed, code, tmp_path).split("\n")[:2]
    assert place.startswith(str(installed)) and all(int(n) > 40 for n in counts.split())


def test_the_command_works_from_the_wheel(installed, tmp_path):
    code = "import sys; from smfnet.cli import main; sys.exit(main(['weights', 'list']))"
    said = run(installed, code, tmp_path)
    assert "tiny" in said and "paper" in said


def test_links_of_the_page_are_absolute(wheel):
    with zipfile.ZipFile(wheel) as z:
        text = z.read(next(n for n in z.namelist() if n.endswith("METADATA"))).decode()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20 and not [x for x in links if not x.startswith(("https://", "#"))]
    pictures = re.findall(r"!\[[^\]]*\]\((\S+?)\)", text)
    assert pictures and all("raw." in p for p in pictures)
    for picture in pictures:
        assert (ROOT / picture.split("/main/")[1]).is_file()


def test_messages_name_extras_that_exist():
    extras = set(metadata("smfnet").get_all("Provides-Extra"))
    named = {
        m
        for p in [*(ROOT / "smfnet").rglob("*.py"), ROOT / "README.md"]
        for m in re.findall(
            r"pip install (?:-e )?'(?:smfnet|\.)\[([a-z,]+)\]'", p.read_text(encoding="utf-8")
        )
    }
    assert len(named) >= 5 and not {e for m in named for e in m.split(",")} - extras
