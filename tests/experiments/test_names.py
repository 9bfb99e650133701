"""Folders of data with names that shells, YAML, make and Snakemake read in their own ways."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("papermill")
pytest.importorskip("pydantic")

from reproduce import Plan, as_yaml
from test_stages import make, make_lab, needs_snakemake, total

from smfnet.core.checks import InputError

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "it's data", 'the "best" one', "$HOME", "$(touch trace)", "`touch trace`", "two\nlines", "a;touch trace",
    "{data} {x}", "50% [a-z]*?", "a#b: c", "-x", "back\\slash", "汉字 é", "~data", " lead", "&<>|", "!tag",
    os.fsdecode(b"caf\xe9"),
)  # fmt: skip
RECORDER = "#!/bin/sh\nprintf '%s\\0' \"$@\" > arguments\n"


@pytest.fixture
def bench(tmp_path) -> Path:
    """The project's Makefile, with programs that only write down how they were called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "v/bin").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "v/bin/python").write_text(RECORDER)
    (tmp_path / "v/bin/python").chmod(0o755)
    (tmp_path / "v/.installed").touch()
    return tmp_path


def called(bench: Path, *words: str, **variables: str) -> list[str]:
    """Arguments of the program that make called, as if no other make had called this test."""
    (bench / "arguments").unlink(missing_ok=True)
    given = ("MAKE", "MFLAGS", "PYTHON", "DATA", "PROFILE", "SET", "DRY", "FLAGS", "JOBS", "ARGS")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(given)}
    done = subprocess.run(
        ["make", *words, "VENV=v", "CONSTRAINTS="],
        cwd=bench,
        env={**outside, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or words[0] == "test", done.stderr
    return os.fsdecode((bench / "arguments").read_bytes()).split("\0")[:-1]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_make_passes_names_as_they_are(bench, name):
    """On its command line, in the environment, and through make within make; nothing in a name is run."""
    name = name.lstrip()  # make itself drops blanks there
    expected = ["nbs/experiments/reproduce.py", "--profile=real", f"--data={name}"]
    assert called(bench, "reproduce", f"DATA={name}") == expected
    assert called(bench, "reproduce", DATA=name) == expected
    assert called(bench, "reproduce-full", f"DATA={name}") == [expected[0], "--profile=full", expected[2]]
    assert not (bench / "trace").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_passes_other_values_as_they_are(bench):
    """Profile, changes and flags; changes are parted at blanks and nowhere else."""
    words = called(bench, "reproduce", "PROFILE=it's", "SET=a.b=it's c.d=* e.f=$(x)", "DRY=1")
    assert words[1:] == ["--profile=it's", "--set=a.b=it's", "--set=c.d=*", "--set=e.f=$(x)", "--dry-run"]
    assert "it's $x" in called(bench, "test", "FLAGS=it's $x")
    assert called(bench, "app", 'ARGS=--x "a b"') == ["nbs/apps/serve.py", "--x", "a b"]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("word", ["VENV=my env", "VENV=it's", "VENV=a$b", "CONSTRAINTS=a b.txt"])
def test_make_refuses_what_it_cannot_name(bench, word):
    """Make's own files cannot have blanks or quotes: one line says so, and nothing is run."""
    done = subprocess.run(["make", "reproduce", word], cwd=bench, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and word.split("=")[0] in done.stderr
    assert "choose another" in done.stderr and not (bench / "arguments").exists()


@needs_snakemake
def test_stages_take_data_of_any_name(tmp_path):
    """A name of everything goes from the command line through Snakemake into a notebook and back."""
    lab = make_lab(tmp_path / "it's a {lab}")
    name = "".join(NAMES[:-1])
    for i in range(3):
        (lab / name / "TNO").mkdir(parents=True, exist_ok=True)
        (lab / name / "TNO" / f"{i}.png").touch()
    done = make(lab, f"--data={lab / name}")
    assert done.returncode == 0, done.stderr
    assert total(lab) == 2 * (3 + 4 + 5 + 6 + 300) and not list(lab.rglob("trace"))


@needs_snakemake
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_reproduce_hands_snakemake_names_as_they_are(tmp_path, name):
    """Its --config takes quotes away and knows no escapes in a text, but in a list it does."""
    from snakemake.cli import parse_config

    config = parse_config([f"DATA={as_yaml([name])}"]) | {"profile": "demo", "make": []}
    (tmp_path / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert config["DATA"] == [name]
        if name.isprintable() or name == NAMES[5]:
            assert Path(Plan(config, {}).data).samefile(tmp_path / name)
        else:
            with pytest.raises(InputError, match="bytes that are no text; rename"):
                Plan(config, {})
