"""Graphics cards as a resource: who says that a card is needed, one job a card, and a plan without any.

No card is here. A card is a name in CUDA_VISIBLE_DEVICES, which is all that a stage is told.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("snakemake")

from test_stages import ROOT, command, environment, make_lab, write_notebook

sys.path.insert(0, str(ROOT / "nbs/experiments"))
import stages

SNAKEFILE = (ROOT / "nbs/experiments/Snakefile").read_text(encoding="utf-8")
NOTEBOOK = (
    "out: str = 'runs/demo/{name}'  # folder of the stage\ndevice: str = 'cuda'  # cpu or cuda",
    "import os, time\nfrom pathlib import Path",
    "seen = os.environ.get('CUDA_VISIBLE_DEVICES')\n"
    "with open('diary.txt', 'a') as f: f.write(f'begin {name} {seen}\\n')\ntime.sleep(0.5)\n"
    "with open('diary.txt', 'a') as f: f.write(f'end {name}\\n')\n"
    "(Path(out) / 'seen.txt').write_text(str(seen))",
)
RULE = """
rule {name}:
    output: record.format("{name}"), run + "/{name}/seen.txt"
    log: notebook=executed.format("{name}"),
    params: **passes("{name}")
    resources: gpu=cards("{name}")
    shell: notebook
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """Two stages that compute on a card."""
    place = make_lab(tmp_path_factory.mktemp("cards"))
    head = SNAKEFILE.partition("# --- rules")[0]
    experiments = place / "nbs/experiments"
    (experiments / "Snakefile").write_text(head + "".join(RULE.format(name=n) for n in ("first", "second")))
    (experiments / "config/demo.yaml").write_text("profile: demo\nmake: [first, second]\n")
    for name in ("first", "second"):
        sources = tuple(s.replace("{name}", name) for s in NOTEBOOK)
        write_notebook(experiments / f"{name}.ipynb", sources)
    return place


def run(lab: Path, cards: str, *arguments) -> subprocess.CompletedProcess:
    """`make reproduce` where these cards are visible."""
    env = environment(lab) | {"CUDA_VISIBLE_DEVICES": cards}
    return subprocess.run(command(*arguments), cwd=lab, env=env, capture_output=True, text=True, timeout=600)


def test_every_stage_with_a_device_says_that_it_takes_a_card():
    """A rule whose notebook has the parameter `device` declares the resource."""
    rules = dict(re.findall(r"(?ms)^rule (\w+):\n(.*?)(?=^rule |\Z)", SNAKEFILE))
    for name, text in rules.items():
        if name in ("everything", "keep"):
            continue
        notebook = ROOT / "nbs/experiments" / f"{name}.ipynb"
        assert ("device" in stages.parameters(notebook)) == ("resources: gpu=cards(" in text), name


def test_without_a_card_there_is_a_plan_and_one_clear_line(lab):
    """A dry run says which stages want one; a run is refused before anything is computed."""
    planned = run(lab, "", "--dry-run")
    assert planned.returncode == 0
    assert len(re.findall(r"would run (?:first|second): .*, on 1 card\(s\)", planned.stdout)) == 2
    refused = run(lab, "")
    assert refused.returncode and not (lab / "diary.txt").exists()
    words = r"error: (first|second): device=cuda on 1 card\(s\), but this machine has 0"
    assert re.search(words, refused.stderr)
    assert 'SET="' in refused.stderr


def test_one_job_a_card(lab):
    """On one card the stages follow each other; each is told its own."""
    done = run(lab, "7")
    assert done.returncode == 0, done.stderr
    diary = (lab / "diary.txt").read_text().splitlines()
    assert [line.split()[0] for line in diary] == ["begin", "end"] * 2
    assert {line.split()[2] for line in diary[::2]} == {"7"}
    for name in ("first", "second"):
        assert (lab / f"runs/demo/{name}/seen.txt").read_text() == "7"


@pytest.mark.parametrize(
    ("given", "found"),
    [("", []), ("-1", []), ("0,1", ["0", "1"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("NoDevFiles", [])],
)
def test_cards_that_are_visible(monkeypatch, given, found):
    """As the variable says, before anything else."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert stages.cards() == found


def test_cards_of_the_driver(tmp_path, monkeypatch):
    """Without the variable the driver's own program is asked, and nothing of CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: GPU-1)'\necho 'GPU 1: two (UUID: GPU-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert stages.cards() == ["0", "1"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert stages.cards() == []


def test_two_jobs_never_share_a_card(tmp_path, monkeypatch):
    """Also when they were started by hand: each takes one that is free."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    locks = stages.take_cards(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4" and len(locks) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    locks += stages.take_cards(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    for lock in locks:
        os.close(lock)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for lock in stages.take_cards(2):
        os.close(lock)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize(
    ("params", "count"),
    [
        ({}, 0),
        ({"device": "cpu", "processes": 4}, 0),
        ({"device": "cuda"}, 1),
        ({"device": "cuda", "processes": 4}, 4),
        ({"device": "cuda:1"}, 1),
    ],
)
def test_how_many_cards_a_stage_wants(params, count):
    """One, or one a process."""
    assert stages.wanted_cards(params) == count


def test_a_stage_by_hand_without_a_card_is_refused(lab):
    """One line before its kernel starts."""
    job = json.dumps({"params": {"device": "cuda"}})
    arguments = ["nbs/experiments/stages.py", "nbs/experiments/first.ipynb", "runs/hand", job]
    env = environment(lab) | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *arguments], cwd=lab, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "but there are 0 here; use device=cpu" in done.stderr
