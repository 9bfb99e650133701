"""Where text leaves the process: terminals that lack characters, closed pipes, names that are no text."""

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smfnet.core.checks import same_name
from smfnet.core.command import run_command

CASES = Path(__file__).resolve().parents[1] / "cases" / "output_encoding"
CODE = "from smfnet.cli import main; raise SystemExit(main())"
EVALUATE = "evaluate --fused fused --ir ir8 --vis vis --compare other"
ENCODINGS = ("ascii", "gbk", "cp932", "latin-1", "cp437", "koi8-r", "big5", "utf-16")


def smfnet(line: str, cwd: Path, encoding: str = "utf-8") -> subprocess.CompletedProcess:
    """The command line as a process whose streams have an encoding."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", CODE, *line.split()], cwd=cwd, env=env, capture_output=True, timeout=300
    )


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_evaluating_for_a_terminal_that_lacks_characters(encoding):
    """The same words as for a terminal that has all; only single characters are written otherwise."""
    whole, less = (smfnet(EVALUATE, CASES, e) for e in ("utf-8", encoding))
    assert whole.returncode == less.returncode == 0, less.stderr
    texts = whole.stdout.decode().split(), less.stdout.decode(encoding).split()
    assert len(texts[0]) == len(texts[1]) and "−" in texts[0]
    assert [a for a, b in zip(*texts, strict=True) if a != b and a.isascii()] == []


def test_fusing_for_a_terminal_that_lacks_characters(tmp_path):
    """Results, and the message, with what Shift-JIS cannot say written otherwise."""
    done = smfnet(f"fuse --ir ir --vis vis --out {tmp_path} --device cpu", CASES, "cp932")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(CASES / "vis"))
    assert "2 of 2 pairs fused" in done.stdout.decode("cp932")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_names_of_all_alphabets_on_all_terminals(tmp_path, encoding, monkeypatch):
    """One line about a missing folder, whatever its name and whatever the terminal has."""
    for name in ("größe×…", "汉字", "ひらがな", "имя", "😀", os.fsdecode(b"caf\xe9\xff"), "\x1b[31m", "a\nb"):
        for stream in ("stdout", "stderr"):
            out = (tmp_path / stream).open("w", encoding=encoding, errors="strict")
            monkeypatch.setattr(sys, stream, out)

        def work(name=name):
            print(name)
            os.stat(tmp_path / name)
            return 0

        assert run_command(work, prefix="test: error") == 2
        sys.stdout.close()
        sys.stderr.close()
        text = (tmp_path / "stderr").read_text(encoding)
        assert text.startswith("test: error: ") and text.count("\n") == 1 and "\x1b" not in text
        assert (tmp_path / "stdout").read_text(encoding).strip()


needs_shell = pytest.mark.skipif(not shutil.which("bash"), reason="bash breaks the streams")
SMALL = """
import sys
from smfnet.core.command import run_command

def work():
    for i in range(int(sys.argv[1])): print("line", i)
    if sys.argv[1] == "0": raise OSError(2, "No such file", "gone")
    return 0

sys.exit(run_command(work, prefix="small: error"))
"""
RUN = '"$python" -c "$small"'
FULL = "small: error: the output cannot be written (No space left on device)"


@needs_shell
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"{RUN} 3 | head -0; exit ${{PIPESTATUS[0]}}", 141, ""),
        (f"set -o pipefail; {RUN} 100000 2>&1 | head -1 > /dev/null", 141, ""),
        (f"{RUN} 3 > /dev/full", 2, FULL),
        (f"{RUN} 100000 > /dev/full", 2, FULL),
        (f"{RUN} 3 > /dev/full 2>&1", 2, ""),
        (f"{RUN} 3 >&-", 0, ""),
        (f"{RUN} 3 >&- 2>&-", 0, ""),
        (f"{RUN} 3 <&- >&- 2>&-", 0, ""),
        (f"{RUN} 0 2> /dev/full", 2, ""),
        (f"{RUN} 0 >&-", 2, "small: error: gone: No such file; check the name"),
    ],
)
def test_broken_streams_end_cleanly(line, status, said, unbuffered):
    """A status, at most one line, and no word of Python's own; output in blocks and line by line."""
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    env = {**os.environ, "python": sys.executable, "small": SMALL, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said), done.stderr


@needs_shell
@pytest.mark.parametrize(
    ("line", "statuses", "said"),
    [
        ("data list | head -1; exit ${PIPESTATUS[0]}", (0, 141), ""),
        ("data list > /dev/full", (2,), "smfnet: error: the output cannot be written"),
        ("--help > /dev/full", (2,), "smfnet: error: the output cannot be written"),
    ],
)
def test_the_command_line_ends_cleanly(tmp_path, line, statuses, said):
    """`smfnet data list | head -1` and its like."""
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    env = {**os.environ, "python": sys.executable, "code": CODE, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        ["bash", "-c", f'"$python" -c "$code" {line}'], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode in statuses, done.stderr
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said), done.stderr


def test_names_that_are_no_text_come_out_as_escapes(tmp_path):
    """Fused, measured, written to a table and spoken of, in a world of UTF-8."""
    odd = os.fsdecode(b"caf\xe9")
    rng = np.random.default_rng(0)
    for side, shape in (("ir", (48, 64)), ("vi", (48, 64, 3))):
        (tmp_path / side).mkdir()
        for name in (odd, "b"):
            try:
                Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(
                    tmp_path / side / f"{name}.png"
                )
            except (OSError, UnicodeError):
                pytest.skip("this file system takes text only")
    done = smfnet("fuse --ir ir --vis vi --out out --device cpu", tmp_path)
    assert done.returncode == 0 and f"{odd}.png" in os.listdir(tmp_path / "out"), done.stderr
    for name in os.listdir(tmp_path / "ir"):
        (tmp_path / "ir" / name).write_bytes(b"no image")
    done = smfnet("fuse --ir ir --vis vi --out out --device cpu", tmp_path)
    assert done.returncode == 2 and rb"caf\xe9.png" in done.stderr and b"Traceback" not in done.stderr


def test_spellings_of_one_name_are_one():
    """Every composed letter of Latin, Greek, Cyrillic and Hangul, against its decomposed spelling."""
    letters = [
        chr(c) for c in (*range(0xC0, 0x250), *range(0x386, 0x3CF), *range(0x400, 0x480), 0xAC00, 0xD7A3)
    ]
    composed = [c for c in letters if unicodedata.normalize("NFC", c) == c]
    twins = [(c, unicodedata.normalize("NFD", c)) for c in composed]
    assert sum(a != b for a, b in twins) > 250 and all(same_name(a) == same_name(b) == a for a, b in twins)
    assert len({same_name(c) for c in composed}) == len(composed)
