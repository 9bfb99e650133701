"""`make gpu-check` at its tiny size on the CPU: numbers in one file, a second call does what is missing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
gpu = importlib.import_module("bench.gpu")


def test_checks_run_are_kept_and_go_on(tmp_path, capsys, monkeypatch):
    """Two checks first; the next call does others and leaves what is there; a failed one is done again."""
    path, some = tmp_path / "cpu.json", ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main([*some, "--only", "literal", "--only", "fuse 64x48"]) == 0
    first = json.loads(path.read_text())["checks"]
    assert set(first) == {"literal", "fuse 64x48"} and first["literal"]["pairs_per_second"] > 0
    assert first["fuse 64x48"]["levels_apart"] < 0.5
    names = ["literal", "training bf16", "deterministic"]
    assert gpu.main([*some, *(x for n in names for x in ("--only", n))]) == 0
    found = json.loads(path.read_text())["checks"]
    assert set(found) == {*first, *names} and all(found[n] == first[n] for n in first)
    assert found["training bf16"]["losses_apart"] < 0.1 and found["training bf16"]["times_literal"] > 0
    assert "literal:" not in capsys.readouterr().out.split("training bf16:")[1]
    found["deterministic"] = {"ok": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checks": found}))
    assert gpu.main([*some, "--only", "deterministic"]) == 0


def test_a_failure_is_kept_and_does_not_stop_the_others(tmp_path, monkeypatch):
    """Whatever a card answers stands in the file; the status is 1; another version starts a new file."""

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu, "plan", lambda scale: {"a": broken, "b": lambda *args: {"ok": True, "n": 3}})
    some = ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main(some) == 1
    found = json.loads((tmp_path / "cpu.json").read_text())["checks"]
    assert "illegal memory access" in found["a"]["error"] and found["b"]["n"] == 3
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert gpu.main(some) == 1
    assert (tmp_path / "cpu.old.json").exists()


def test_the_plan_is_the_list_of_the_page():
    """Every arithmetic, every batch, every picture; a page names them all."""
    names = set(gpu.plan(gpu.SCALES["full"]))
    assert {f"training {a}{c}" for a in ("off", "bf16") for c in ("", " compiled")} < names
    assert {"literal", "batch 32", "fuse 3840x2160", "resume", "deterministic", "profile", "cells"} < names


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_card_it_says_so(tmp_path, capsys):
    """One line, status 2, no file."""
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "finds no CUDA device; try DEVICE=cpu" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_of_make():
    """The target passes the device on."""
    done = subprocess.run(["make", "-n", "gpu-check", "DEVICE=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "-m bench.gpu" in done.stdout
