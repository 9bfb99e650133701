"""Every module notebook runs from top to bottom; its lesson cells are its tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds; a notebook that takes longer hangs

# nbdev's own tester: it skips cells with a flag of settings.ini (tst_flags) unless the flag is asked for.
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
config = get_config()
passed, _ = test_nb(Path(sys.argv[1]), skip_flags=config.tst_flags.split(), force_flags=sys.argv[2].split(),
                    basepath=config.config_path)
sys.exit(not passed)
"""


def module_notebooks() -> list[Path]:
    """All notebooks but those in hidden folders and in folders marked `.notest` (experiments, apps)."""
    found = (p for p in (ROOT / "nbs").rglob("*.ipynb") if not (p.parent / ".notest").exists())
    return sorted(
        p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)
    )


@pytest.mark.parametrize("notebook", module_notebooks(), ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook(notebook, request):
    """The notebook runs in a process of its own, in its own folder, and no cell fails."""
    flags = request.config.getoption("--notebook-flags")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook), flags],
        cwd=ROOT / "nbs",
        env=os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{notebook.name} failed\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def test_notebooks_were_found():
    """An empty list would pass without testing anything."""
    assert len(module_notebooks()) >= 2


def test_a_failing_notebook_fails(tmp_path):
    """The tester reports an error in a cell, so a green run means something."""
    bad = tmp_path / "bad.ipynb"
    bad.write_text(
        '{"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": null, "outputs": [], '
        '"source": ["assert 1 == 2"]}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(bad), ""],
        cwd=ROOT / "nbs",
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1 and "AssertionError" in done.stderr
