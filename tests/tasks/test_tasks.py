"""The notebooks around detection and segmentation: streets, Tables 2 and 3, and the comparison of inputs."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from stages import NotebookFailure, run_notebook

from smfnet.core.checks import InputError
from smfnet.tasks.comparison import DIFFERENCES, read_differences
from smfnet.tasks.results import PRINTED, TASK_COLUMNS

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, folder: Path, **params) -> None:
    """Run an experiment notebook from the top of the repository."""
    run_notebook(
        f"nbs/experiments/{name}.ipynb", output_dir=folder / "run", params=params, cwd=ROOT, progress=False
    )


def rows(task: str, input: str, seed: int, value: float) -> pd.DataFrame:
    """Made-up results of one input: every score is `value`."""
    labels = {
        "task": task,
        "set": "streets",
        "input": input,
        "seed": seed,
        "kind": "all",
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "n_images": 12,
        "conditions": "c0ffee",
        "revision": "0123456789ab",
    }
    return pd.DataFrame([labels | {"metric": m} for m in PRINTED[task]])[list(TASK_COLUMNS)]


def test_streets(tmp_path):
    """Scenes with masks and boxes, each fused by every method; no training part unless asked for."""
    run("streets", tmp_path, out=str(tmp_path), n_train=0, n_test=2, size=[64, 96])
    test = tmp_path / "streets" / "test"
    stems = {p.stem for p in (test / "ir").iterdir()}
    assert len(stems) == 2 and not (tmp_path / "streets" / "train").exists()
    for part in ("vi", "masks", "boxes", "fused/ours", "fused/average", "fused/maximum"):
        assert {p.stem for p in (test / part).iterdir()} == stems, part


@pytest.mark.parametrize(
    ("number", "task", "published"), [(2, "detection", "M3FD"), (3, "segmentation", "MFNet")]
)
def test_tables(tmp_path, number, task, published):
    """Published and measured values in one page, seeds with their spread, earlier revisions named."""
    for input, seed, value in (("ours", 0, 0.4), ("ours", 1, 0.6), ("visible", 0, 0.3), ("visible", 1, 0.3)):
        rows(task, input, seed, value).to_csv(tmp_path / f"{input}-{seed}.csv", index=False)
    run(f"table{number}", tmp_path, results=[str(tmp_path / "*.csv")], out=str(tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out" / f"table{number}.csv")
    ours = table[(table["set"] == "streets") & (table["method"] == "ours")]
    assert set(ours["metric"]) == set(PRINTED[task].values())
    assert (ours["measured"].round(6) == 0.5).all() and (ours["n_seeds"] == 2).all()
    printed = table[table["set"] == published]
    assert printed["published"].notna().any() and printed["measured"].isna().all()
    page = (tmp_path / "out" / f"table{number}.html").read_text(encoding="utf-8")
    assert "0.5000" in page and "(2 seeds)" in page and "0123456789ab" in page and "12 test images" in page


def test_downstream_shows_kept_differences(tmp_path):
    """Differences of an earlier run are drawn and put into words without computing anything."""
    row = {
        "task": "detection",
        "input": "ours",
        "against": "visible",
        "kind": "all",
        "metric": "mAP",
        "a": 0.3,
        "b": 0.4,
        "difference": 0.1,
        "low": 0.02,
        "high": 0.18,
        "spread": 0.03,
        "n_images": 25,
        "n_seeds": 3,
    }
    two = row | {"kind": "night", "n_seeds": 2}
    table = pd.DataFrame([row, row | {"task": "segmentation", "metric": "mIoU", "low": -0.1}, two])
    table[list(DIFFERENCES)].to_csv(tmp_path / "kept.csv", index=False)
    run("downstream", tmp_path, kept=str(tmp_path / "kept.csv"), out=str(tmp_path / "out"))
    page = (tmp_path / "out" / "differences.html").read_text(encoding="utf-8")
    assert "better than visible" in page and "not told apart from visible" in page
    assert page.count("ahead of visible") == page.count("too few seeds for a verdict") == 1
    assert "<svg" in (tmp_path / "out" / "differences.svg").read_text(encoding="utf-8")
    assert len(read_differences(tmp_path / "out" / "differences.csv")) == 3


def test_missing_results_name_the_stage(tmp_path):
    """The message of a failed notebook says which stage to run."""
    with pytest.raises(NotebookFailure, match="run the stage 'segmentation'"):
        run("table3", tmp_path, results=[str(tmp_path / "none-*.csv")], out=str(tmp_path / "out"))


def test_package_works_without_the_libraries_of_the_tasks():
    """Everything imports where transformers, MONAI and the COCO evaluator are absent; use is refused."""
    code = (
        "import sys\n"
        "absent = 'transformers', 'monai', 'faster_coco_eval'\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import smfnet.cli, smfnet.report.claims, smfnet.report.tables\n"
        "import smfnet.tasks.results, smfnet.tasks.comparison, smfnet.tasks.loop\n"
        "import smfnet.tasks.segmentation, smfnet.tasks.detection\n"
        "from fastcore.test import test_fail\n"
        "from smfnet.tasks import detection_scores, detector, segmenter\n"
        "small = segmenter.segmenter_config(), detector.detector_config()\n"
        "test_fail(lambda: segmenter.new_segmenter(small[0]), contains='smfnet[downstream]')\n"
        "test_fail(lambda: detector.new_detector(small[1]), contains='smfnet[downstream]')\n"
        "test_fail(detection_scores._evaluator, contains='smfnet[downstream]')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_input_error_is_readable():
    """Differences of a file that holds none."""
    with pytest.raises(InputError, match="run the notebook downstream"):
        read_differences(ROOT / "README.md")
