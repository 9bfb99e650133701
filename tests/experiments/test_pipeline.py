"""The pipeline with two small notebooks under Snakemake: what runs, what does not, and what a failure stops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smfnet.core.checks import InputError
from smfnet.pipeline import (
    NotebookFailure,
    load_plan,
    main,
    project_root,
    reproduce,
    run_notebook,
    run_stage,
    stage_states,
)

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("papermill")

PROFILES = """
stages:
  count:
    notebook: count.ipynb
    outputs: ["{out}/numbers"]
    params: {out: "{out}", seed: 3}
  total:
    notebook: total.ipynb
    after: [count]
    outputs: ["{out}/total.json", "{figures}"]
    params: {numbers: "{count}/numbers", out: "{out}", figures: "{figures}"}
profiles:
  demo:
    params:
      count: {length: 4}
    with_data:
      needs: [TNO]
      params:
        total: {data: "{data}"}
"""
ALONE = """
  alone:
    notebook: count.ipynb
    outputs: ["{out}/numbers"]
    params: {out: "{out}", length: 2}
"""
LAST = """
  last:
    notebook: total.ipynb
    after: [total]
    outputs: ["{out}/total.json"]
    params: {numbers: "{total}", out: "{out}", figures: "{out}/pictures"}
"""
COUNT = (
    "out: str = 'runs/demo/count'  # folder of the stage\nlength: int = 2  # how many numbers\nseed: int = 0  # first number",
    "from pathlib import Path\n\nfrom tqdm import tqdm",
    "folder = Path(out) / 'numbers'\nfolder.mkdir(parents=True, exist_ok=True)\nif length < 0: raise ValueError(f'length is {length}')",
    "for i in tqdm(range(length)): (folder / f'{i}.txt').write_text(str(seed + i))",
)
TOTAL = (
    "numbers: str = 'runs/demo/count/numbers'  # folder of numbers\nout: str = 'runs/demo/total'  # folder of the stage\n"
    "figures: str = 'figures/demo'  # folder of figures\ndata: str = ''  # folder of real data",
    "import json\nfrom pathlib import Path",
    "found = [int(p.read_text()) for p in Path(numbers).glob('*.txt')]\nfound += [100 for p in Path(data).glob('TNO/*')] if data else []",
    "Path(figures).mkdir(parents=True, exist_ok=True)\n(Path(figures) / 'bar.svg').write_text('<svg/>')\n"
    "(Path(out) / 'total.json').write_text(json.dumps(sum(found)))",
)


def write_notebook(path: Path, sources: tuple[str, ...], tag: str = "parameters") -> None:
    """A notebook of code cells, the first with the tag."""
    cell = {"cell_type": "code", "execution_count": None, "outputs": []}
    cells = [
        cell | {"id": f"c{i}", "metadata": {"tags": [tag]} if i == 0 else {}, "source": s}
        for i, s in enumerate(sources)
    ]
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    path.write_text(
        json.dumps({"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5})
    )


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """A small project: the real Snakefile, two stages with a notebook each."""
    folder = tmp_path / "nbs" / "experiments"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "nbs/experiments/Snakefile", folder)
    (folder / "profiles.yaml").write_text(PROFILES)
    write_notebook(folder / "count.ipynb", COUNT)
    write_notebook(folder / "total.ipynb", TOTAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def stamps(lab: Path) -> dict[str, int]:
    """When each stage last ran."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (lab / "runs/demo").glob("*/executed.ipynb")}


def reran(lab: Path, before: dict[str, int]) -> set[str]:
    """Stages that ran since."""
    return {name for name, time in stamps(lab).items() if before.get(name) != time}


def total(lab: Path) -> int:
    """Result of the last stage."""
    return json.loads((lab / "runs/demo/total/total.json").read_text())


# --- one notebook ----------------------------------------------------------------------------------------------


def test_bad_parameters_are_refused_before_anything_runs(lab):
    """Unknown names, wrong types, a missing tag and a missing notebook; nothing is written."""
    notebook = "nbs/experiments/count.ipynb"
    for params, word in (
        ({"lenght": 3}, "did you mean 'length'"),
        ({"length": "3"}, "not of type int"),
        ({"length": True}, "not of type int"),
    ):
        with pytest.raises(InputError, match=word):
            run_notebook(notebook, output_dir="here", params=params)
    write_notebook(lab / "untagged.ipynb", COUNT, tag="other")
    with pytest.raises(InputError, match="untagged.ipynb: 0 cells carry the tag"):
        run_notebook("untagged.ipynb", output_dir="here")
    with pytest.raises(InputError, match="absent.ipynb"):
        run_notebook("absent.ipynb", output_dir="here")
    assert not (lab / "here").exists()


def test_failure_names_notebook_and_cell_and_keeps_the_notebook(lab, capfd):
    """The executed copy holds the traceback, and no record claims success."""
    with pytest.raises(NotebookFailure, match=r"count.ipynb: code cell 3 .* raised ValueError: length is -1"):
        run_notebook("nbs/experiments/count.ipynb", output_dir="here", params={"length": -1, "out": "here"})
    assert sorted(p.name for p in (lab / "here").iterdir()) == ["executed.ipynb", "numbers", "params.json"]
    assert "length is -1" in (lab / "here/executed.ipynb").read_text()


def test_progress_is_shown(lab, capfd):
    """The notebook's own bar reaches the terminal, besides the bar of cells."""
    run_notebook("nbs/experiments/count.ipynb", output_dir="here", params={"out": "here", "length": 7})
    shown = capfd.readouterr().err
    assert "7/7" in shown and "here:" in shown and "cell" in shown
    assert "TQDM_MININTERVAL" not in os.environ


def test_every_stage_runs_with_plain_papermill(lab, capsys):
    """`show` prints a command line that does the same without this package's help."""
    import shlex

    assert main(["show"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("papermill")]
    assert len(lines) == 2
    Path("runs/demo/count").mkdir(parents=True)
    command = [sys.executable, "-m", *shlex.split(lines[0])]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert [p.read_text() for p in sorted(Path("runs/demo/count/numbers").iterdir())] == ["3", "4", "5", "6"]


# --- stages by hand --------------------------------------------------------------------------------------------


def test_stage_clears_old_results_and_keeps_its_own_notes(lab):
    """Files of a longer run do not survive a shorter one; what a stage does not promise (a checkpoint) does."""
    run_stage("count", load_plan(lab), lab, progress=False)
    (lab / "runs/demo/count/checkpoint.pt").touch()
    run_stage("count", load_plan(lab, overrides={"count.length": 1}), lab, progress=False)
    assert len(list((lab / "runs/demo/count/numbers").iterdir())) == 1
    assert (lab / "runs/demo/count/checkpoint.pt").exists()
    found = json.loads((lab / "runs/demo/count/provenance.json").read_text())
    assert (
        found["params"]["length"] == 1
        and found["seed"] == 3
        and found["notebook"]["path"] == "nbs/experiments/count.ipynb"
    )


def test_exit_status_of_the_command_line(lab, capsys):
    """0 success, 1 a failed notebook, 2 bad input; messages, not tracebacks."""
    assert main(["run", "total"]) == 2 and "run it first" in capsys.readouterr().err
    assert (
        main(["run", "count", "--set", "count.length=-1"]) == 1
        and "raised ValueError" in capsys.readouterr().err
    )
    assert (
        main(["reproduce", "--set", "total.number=1"]) == 2
        and "has no parameter 'number'" in capsys.readouterr().err
    )
    assert main(["reproduce", "--data", str(lab)]) == 2 and "TNO" in capsys.readouterr().err
    assert main(["run", "count"]) == 0


def test_root_is_found_from_below(lab, monkeypatch):
    """Commands work in any folder of the project."""
    assert project_root(lab / "nbs" / "experiments").samefile(lab)


# --- the whole graph -------------------------------------------------------------------------------------------

snakemake = pytest.mark.skipif(sys.version_info < (3, 11), reason="Snakemake needs Python 3.11")


@snakemake
def test_only_what_changed_runs_again(lab, capfd):
    """Nothing the second time, nothing after touching, and exactly what depends on a change after one."""
    assert reproduce(lab, dry_run=True) == 0 and not (lab / "runs").exists()
    assert reproduce(lab) == 0 and total(lab) == 3 + 4 + 5 + 6
    assert "Look at runs/demo/" in capfd.readouterr().out
    before = stamps(lab)
    assert set(before) == {"count", "total"}
    for path in [
        *lab.glob("nbs/experiments/*"),
        *lab.glob("runs/demo/**/*.txt"),
        *lab.glob("runs/demo/**/*.json"),
    ]:
        path.touch()
    assert reproduce(lab) == 0 and not reran(lab, before)

    changed = {"count.length": 2}
    assert (
        reproduce(lab, overrides=changed) == 0
        and reran(lab, before) == {"count", "total"}
        and total(lab) == 7
    )
    before = stamps(lab)
    write_notebook(lab / "nbs/experiments/total.ipynb", (*TOTAL, "done = True"))
    capfd.readouterr()
    assert reproduce(lab, overrides=changed, dry_run=True) == 0 and "total" in "".join(capfd.readouterr())
    write_notebook(lab / "nbs/experiments/total.ipynb", TOTAL)  # taken back
    assert reproduce(lab, overrides=changed, dry_run=True) == 0 and "total" not in "".join(capfd.readouterr())
    write_notebook(lab / "nbs/experiments/total.ipynb", (*TOTAL, "done = True"))
    assert reproduce(lab, overrides=changed) == 0 and reran(lab, before) == {"total"}


@snakemake
def test_damaged_and_missing_results_are_made_again(lab):
    """A file changed or removed by hand is noticed; stages behind it that see the same results as before rest."""
    assert reproduce(lab) == 0
    before = stamps(lab)
    (lab / "runs/demo/count/numbers/0.txt").write_text("999")
    assert reproduce(lab) == 0 and reran(lab, before) == {"count"} and total(lab) == 18
    before = stamps(lab)
    shutil.rmtree(lab / "figures/demo")
    assert reproduce(lab) == 0 and reran(lab, before) == {"total"} and (lab / "figures/demo/bar.svg").exists()


@snakemake
def test_failure_stops_only_what_depends_on_it(lab, capfd):
    """`alone` runs, `total` does not, the failed notebook stays, and the repaired run goes on from there."""
    (lab / "nbs/experiments/profiles.yaml").write_text(
        PROFILES.replace("profiles:", ALONE.strip("\n") + "\nprofiles:")
    )
    assert reproduce(lab, overrides={"count.length": -1}) != 0
    shown = capfd.readouterr()
    assert "raised ValueError: length is -1" in shown.err and "NOT DONE" in shown.out
    assert (lab / "runs/demo/alone/outputs.json").exists() and not (lab / "runs/demo/total").exists()
    assert "length is -1" in (lab / "runs/demo/count/executed.ipynb").read_text()
    before = stamps(lab)
    assert reproduce(lab) == 0 and reran(lab, before) == {"count", "total"}


@snakemake
def test_nothing_behind_a_failure_counts_as_done(lab, capfd):
    """A stage two steps behind a failed one keeps its file, but is called stale in summary, report and exit status."""
    (lab / "nbs/experiments/profiles.yaml").write_text(
        PROFILES.replace("profiles:", LAST.strip("\n") + "\nprofiles:")
    )
    assert reproduce(lab) == 0
    capfd.readouterr()
    changed = {"count.length": -1}
    assert reproduce(lab, overrides=changed) != 0
    assert stage_states(load_plan(lab, overrides=changed), lab) == {
        "count": "failed",
        "total": "stale",
        "last": "stale",
    }
    shown, page = capfd.readouterr().out, (lab / "runs/demo/report.html").read_text()
    assert (
        shown.count("NOT DONE: stale") == 2
        and "total, last: made from other code" in page
        and "done</span>" not in page
    )
    assert reproduce(lab) == 0 and set(stage_states(load_plan(lab), lab).values()) == {"done"}


def test_a_file_named_by_a_parameter_is_an_input(lab):
    """Other contents under the same name make the stage stale, and its checksum is in the record."""
    weights = lab / "mine.bin"
    weights.write_text("one")
    plan = load_plan(lab, overrides={"count.out": "runs/demo/count", "total.data": str(weights)})
    for name in plan:
        run_stage(name, plan, lab, progress=False)
    assert str(weights) in json.loads((lab / "runs/demo/total/provenance.json").read_text())["inputs"]
    assert stage_states(plan, lab)["total"] == "done"
    weights.write_text("two")
    assert stage_states(plan, lab) == {"count": "done", "total": "stale"}


@snakemake
def test_real_data_adds_to_the_stages_that_use_it(lab):
    """DATA changes only the stage that reads it, also when given from elsewhere, and without DATA all is as before."""
    (lab / "sets" / "TNO").mkdir(parents=True)
    (lab / "sets" / "TNO" / "one.png").touch()
    assert reproduce(lab) == 0
    before = stamps(lab)
    assert reproduce(lab, data=lab / "sets") == 0 and reran(lab, before) == {"total"} and total(lab) == 118
    assert json.loads((lab / "runs/demo/total/params.json").read_text())["data"] == "sets"
    assert reproduce(lab) == 0 and total(lab) == 18
