"""Workers start from a script without a main guard, from standard input, from -c; or say why not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smfnet.core import workers
from smfnet.core.checks import InputError
from smfnet.core.workers import in_processes
from smfnet.metrics.folder import evaluate_folder

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = """
from smfnet.metrics import evaluate_folder
table = evaluate_folder(fused="fused", ir="ir", vis="vis", workers=WORKERS, progress=False)
print(table.round(6).to_csv())
"""
OWN = """
from smfnet.core.checks import InputError
from smfnet.core.workers import in_processes
def double(x): return 2 * x
try: print(list(in_processes(double, [1, 2], workers=2)))
except InputError as e: print("line:", e)
"""


def run(tmp_path, way, program):
    """A program as a file, from standard input, or after -c."""
    (tmp_path / "script.py").write_text(program)
    command = {"file": ["script.py"], "stdin": ["-"], "-c": ["-c", program]}[way]
    done = subprocess.run(
        [sys.executable, *command],
        input=program if way == "stdin" else None,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return done


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three pictures of noise for each role."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for role in ("fused", "ir", "vis"):
        (root / role).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (64, 72)).astype(np.uint8)).save(root / role / f"{i}.png")
    return root


@pytest.mark.parametrize("way", ["file", "stdin", "-c"])
def test_evaluate_folder_with_workers_from_anywhere(folders, way):
    """The table is that of one process; nothing is written on the error stream."""
    done = run(folders, way, EVALUATE.replace("WORKERS", "2"))
    assert done.returncode == 0 and done.stderr == "", done.stderr[-1500:]
    roles = {role: folders / role for role in ("fused", "ir", "vis")}
    assert done.stdout.strip() == evaluate_folder(**roles, progress=False).round(6).to_csv().strip()


@pytest.mark.parametrize("way", ["file", "stdin", "-c"])
def test_functions_of_a_script(tmp_path, way):
    """Without a guard, or without a file, they cannot be found again: one line says so."""
    done = run(tmp_path, way, OWN)
    assert done.returncode == 0 and done.stdout.startswith("line: workers: "), done.stderr[-1500:]
    assert "__main__" in done.stdout and done.stdout.count("\n") == 1
    if way == "file":
        guarded = OWN.replace("try:", "if __name__ == '__main__':\n  try:").replace("\nexcept", "\n  except")
        assert run(tmp_path, way, guarded).stdout == "[2, 4]\n"


def test_a_killed_process_is_one_line():
    """As the system does when memory ends."""
    with pytest.raises(InputError, match="a process was killed"):
        list(in_processes(os._exit, [1, 1], workers=2))


def test_errors_of_the_work_arrive_as_they_are():
    """The first one, with its kind."""
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_processes(int, ["1", "x", "3"], workers=2))


@pytest.mark.parametrize("workers_", [-1, 1])
def test_one_process_needs_no_other(workers_, monkeypatch):
    """Nothing is started, and any function will do."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    assert list(in_processes(lambda x: x + 1, [1, 2], workers=workers_)) == [2, 3]
    assert list(in_processes(lambda x: x + 1, [1], workers=9)) == [2]


@pytest.mark.parametrize(("asked", "jobs", "given"), [(2, 10, 2), (50, 3, 3), (10**6, 10**6, None)])
def test_the_number_of_processes_is_sensible(capsys, asked, jobs, given):
    """No more than jobs, and no more than a few for each processor; the latter is told."""
    most = workers.EACH * os.cpu_count()
    assert workers._sensible(asked, jobs) == min(given or most, most)
    assert ("are too many" in capsys.readouterr().err) == (given is None)


def test_the_script_is_back_afterwards():
    """Whatever happens while processes start."""
    before = sys.modules["__main__"]
    with pytest.raises(KeyError), workers._no_script():
        assert sys.modules["__main__"] is not before
        raise KeyError
    assert sys.modules["__main__"] is before
