"""The batch script of the processes notebook, run by a shell with a cluster that is made up.

`srun` is a program here that trains truly, a few steps, or fails; `scontrol` writes down what it is told.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smfnet.data.images import write_image
from smfnet.training.processes import main

ROOT = Path(__file__).resolve().parents[2]
QUICK = [x for s in ("patch=16", "stride=8", "batch=4", "epochs=[1,1]") for x in ("--set", s)]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def script() -> str:
    """The batch script as it stands in the notebook."""
    cells = json.loads((ROOT / "nbs/05_training/04_processes.ipynb").read_text(encoding="utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if "#SBATCH" in "".join(c["source"]))
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with pairs and a run; a call submits the job: its status, and what was asked of SLURM."""
    for name in ("ir", "vi"):
        (tmp_path / "data" / name).mkdir(parents=True)
        image = np.random.default_rng(len(name)).random((32, 32), np.float32)
        write_image(tmp_path / "data" / name / "a.png", image)
    base = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs/slurm"), *QUICK]
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()

    def program(name, text):
        path = programs / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    program("python", f'exec {sys.executable} "$@"')
    program("scontrol", f'if [ "$1" = requeue ]; then echo "$@" >> {told}; else echo node1; fi')

    def submit(status, restarts=0):
        program("srun", f"exit {status}")
        env = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "17"}
        env |= {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_RESTART_COUNT": str(restarts)}
        job = subprocess.run(
            ["bash", "-c", script()], cwd=tmp_path, env=os.environ | env, capture_output=True, text=True
        )
        asked = told.read_text().split("\n")[:-1] if told.exists() else []
        told.unlink(missing_ok=True)
        return job.returncode, asked

    return base, submit


def test_requeued_only_after_a_clean_stop_of_an_incomplete_run(cluster):
    """Stopped by time: again. Failed, complete, or too often already: not."""
    base, submit = cluster
    assert main([*base, "--steps", "1"]) == 0
    assert submit(0) == (0, ["requeue 17"])
    assert submit(0, restarts=100) == (0, [])
    assert submit(1) == (1, []) and submit(143) == (143, [])
    assert main(base) == 0
    assert submit(0) == (0, [])


def test_old_files_fool_nobody(cluster):
    """Weights of both stages from another run lie in the folder; the run itself is not complete."""
    base, submit = cluster
    assert main(base) == 0
    assert main([*base, "--seed", "5", "--steps", "1"]) == 2  # refused: the other run stays
    assert main([*base, "--seed", "5", "--steps", "1", "--restart"]) == 0
    out = Path(base[3])
    for name in ("stage1.safetensors", "stage2.safetensors"):
        shutil.copy(out / "old-1" / name, out / name)
    assert submit(0) == (0, ["requeue 17"])


def test_a_run_that_left_nothing_is_not_requeued(cluster, capsys):
    """No checkpoint: neither complete nor to be continued; status 2, and one line."""
    base, submit = cluster
    assert submit(0) == (0, [])
    assert main(["--out", base[3], "--complete"]) == 2
    assert re.search("holds no checkpoint; start a run", capsys.readouterr().err)
