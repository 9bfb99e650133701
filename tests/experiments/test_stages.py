"""The stage engine with small notebooks: what runs, what does not, what a failure or a kill leaves."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

pytest.importorskip("papermill")
pytest.importorskip("pydantic")

from jupyter_client.kernelspec import NoSuchKernel
from reproduce import Plan, keep, reproduce
from stages import NotebookFailure, Progress, check_parameters, fingerprint, parameters, run_notebook

from smfnet.core.checks import InputError

ROOT = Path(__file__).resolve().parents[2]
needs_snakemake = pytest.mark.skipif(sys.version_info < (3, 11), reason="Snakemake needs Python 3.11")

CONFIG = """
profile: demo
make: [total, alone]
count: {length: 4, seed: 3}
alone: {length: 2}
needs: [TNO]
sets: {TNO: TNO}
with_data: {total: {data: "{data}"}}
"""
RULES = """
rule count:
    input: reads("count")
    output: record.format("count"), directory(run + "/count/numbers")
    log: notebook=executed.format("count"),
    params: **passes("count")
    shell: notebook


rule total:
    input: reads("total")
    output: record.format("total"), run + "/total/total.json", directory(figures)
    log: notebook=executed.format("total"),
    params: **passes("total")
    shell: notebook


rule alone:
    input: reads("alone")
    output: record.format("alone"), directory(run + "/alone/numbers")
    log: notebook=executed.format("alone"),
    params: **passes("alone", "alone")
    shell: notebook
"""
LAST = """

rule last:
    input: reads("last")
    output: record.format("last"), run + "/last/last.txt"
    log: notebook=executed.format("last"),
    params: **passes("last")
    shell: notebook
"""
COUNT = (
    "out: str = 'runs/demo/count'  # folder of the stage\nlength: int = 2  # how many numbers\n"
    "seed: int = 0  # first number\npause: float = 0.0  # seconds to wait",
    "import time\nfrom pathlib import Path\n\nfrom tqdm import tqdm",
    "folder = Path(out) / 'numbers'\nfolder.mkdir(parents=True, exist_ok=True)\n"
    "with open('diary.txt', 'a') as f: f.write('begin\\n')\ntime.sleep(pause)\n"
    "if length < 0: raise ValueError(f'length is {length}')",
    "for i in tqdm(range(length)): (folder / f'{i}.txt').write_text(str(seed + i))\n"
    "with open('diary.txt', 'a') as f: f.write('end\\n')",
)
TOTAL = (
    "numbers: str = 'runs/demo/count/numbers'  # folder of numbers\n"
    "out: str = 'runs/demo/total'  # folder of the stage\n"
    "figures: str = 'figures/demo'  # folder of figures\ndata: str = ''  # folder of real data",
    "import json\nfrom pathlib import Path\n\nfrom smfnet.core.toy import double",
    "found = [int(p.read_text()) for p in Path(numbers).glob('*.txt')]\n"
    "found += [100 for p in Path(data).glob('TNO/*')] if data else []",
    "Path(figures).mkdir(parents=True, exist_ok=True)\n(Path(figures) / 'bar.svg').write_text('<svg/>')\n"
    "(Path(out) / 'total.json').write_text(json.dumps(double(sum(found))))",
)
ONE_LINE = (
    "total: str = 'runs/demo/total/total.json'  # file\nout: str = 'runs/demo/last'  # folder",
    "from pathlib import Path\n(Path(out) / 'last.txt').write_text(Path(total).read_text())",
)
TOY = "from .toy_factor import FACTOR\n\n\ndef double(x):\n    return FACTOR * x\n"


def write_notebook(path: Path, sources: tuple[str, ...], tag: str = "parameters", prose: str = "") -> None:
    """A notebook of code cells, the first with the tag, and a cell of prose."""
    cell = {"cell_type": "code", "execution_count": None, "outputs": []}
    cells = [
        cell | {"id": f"c{i}", "metadata": {"tags": [tag]} if i == 0 else {}, "source": s}
        for i, s in enumerate(sources)
    ]
    cells.append({"cell_type": "markdown", "id": "prose", "metadata": {}, "source": prose})
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook))


def make_lab(folder: Path) -> Path:
    """A small project: the head of the real Snakefile, rules and a package of its own, three stages."""
    place = folder / "nbs/experiments"
    (place / "config").mkdir(parents=True)
    for name in ("stages.py", "reproduce.py"):
        shutil.copy(ROOT / "nbs/experiments" / name, place)
    head = (ROOT / "nbs/experiments/Snakefile").read_text().partition("# --- rules")[0]
    (place / "Snakefile").write_text(head + RULES)
    (place / "config/demo.yaml").write_text(CONFIG)
    for name, sources in (("count", COUNT), ("total", TOTAL), ("alone", COUNT)):
        write_notebook(place / f"{name}.ipynb", sources)
    shutil.copytree(
        ROOT / "smfnet", folder / "smfnet", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    (folder / "smfnet/core/toy.py").write_text(TOY)
    (folder / "smfnet/core/toy_factor.py").write_text("FACTOR = 2\n")
    return folder


@pytest.fixture
def lab(tmp_path) -> Path:
    """A new small project."""
    return make_lab(tmp_path / "the lab")  # a blank in the path


@pytest.fixture(scope="module")
def done_lab(tmp_path_factory) -> Path:
    """A small project whose stages are all done; tests leave it as it is."""
    place = make_lab(tmp_path_factory.mktemp("lab"))
    assert make(place).returncode == 0
    return place


def environment(lab: Path) -> dict[str, str]:
    """The lab's package comes first."""
    return {
        **os.environ,
        "PYTHONPATH": str(lab),
        "XDG_CACHE_HOME": str(lab / "cache"),
        "OMP_NUM_THREADS": "1",
    }


def command(*arguments) -> list[str]:
    """`make reproduce` without make."""
    return [sys.executable, "nbs/experiments/reproduce.py", "--cores", "2", *map(str, arguments)]


def make(lab: Path, *arguments) -> subprocess.CompletedProcess:
    """Run it."""
    return subprocess.run(
        command(*arguments), cwd=lab, env=environment(lab), capture_output=True, text=True, timeout=600
    )


def planned(lab: Path, *arguments) -> set[str]:
    """Stages that a dry run names."""
    done = make(lab, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return {line.split()[2].rstrip(":") for line in done.stdout.splitlines() if line.startswith("would run")}


def stamps(lab: Path) -> dict[str, int]:
    """When each stage last ran."""
    return {p.parent.name: p.stat().st_mtime_ns for p in (lab / "runs/demo").glob("*/executed.ipynb")}


def reran(lab: Path, before: dict[str, int]) -> set[str]:
    """Stages that ran since."""
    return {name for name, time in stamps(lab).items() if before.get(name) != time}


def total(lab: Path) -> int:
    """Result of the stage `total`."""
    return json.loads((lab / "runs/demo/total/total.json").read_text())


@contextlib.contextmanager
def changed(path: Path, text: str):
    """A file with other contents, and as it was afterwards."""
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


# --- one notebook -------------------------------------------------------------------------------------------


def test_bad_parameters_are_refused_before_anything_runs(lab, monkeypatch):
    """Unknown names, wrong types, a missing tag and a missing notebook; nothing is written."""
    monkeypatch.chdir(lab)
    notebook = "nbs/experiments/count.ipynb"
    for params, word in (
        ({"lenght": 3}, "has no parameter 'lenght'; did you mean 'length'"),
        ({"zzz": 3}, "it has out, length, seed, pause"),
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
    Path("broken.ipynb").write_text('{"cells": [')
    with pytest.raises(InputError, match="is not a notebook"):
        run_notebook("broken.ipynb", output_dir="here")
    assert not (lab / "here").exists()


@pytest.mark.parametrize(
    "line", ["steps = 3", "steps: int", "steps: int = 1 + n", "import os", "steps: Path = 'x'"]
)
def test_every_line_of_the_parameters_is_typed_and_literal(tmp_path, line):
    """What papermill would pass over in silence is refused, with the form to write."""
    write_notebook(tmp_path / "a.ipynb", (line,))
    with pytest.raises(InputError, match="write 'name: type = literal"):
        parameters(tmp_path / "a.ipynb")


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [3], ["3", True, 3.0]),
        ("float", [3, 2.5], ["3", True]),
        ("list[float]", [[1, 2.5], []], [[1, "x"], "ab"]),
        ("list", [["a", 1]], ["abc"]),
        ("dict[str, list[int]]", [{"a": [1]}, {}], [{"a": 1.5}, {"a": ["1"]}]),
    ],
)
def test_types(tmp_path, annotation, good, bad):
    """Values are not converted: text is no number, a bool no int."""
    write_notebook(tmp_path / "a.ipynb", (f"x: {annotation} = {good[0]!r}  # a value",))
    for value in good:
        assert check_parameters(tmp_path / "a.ipynb", {"x": value}) == {"x": value}
    for value in bad:
        with pytest.raises(InputError, match="is not of type"):
            check_parameters(tmp_path / "a.ipynb", {"x": value})


def test_failure_names_notebook_and_cell_and_keeps_the_notebook(lab, monkeypatch, capfd):
    """The executed copy holds the traceback, and no record claims success."""
    monkeypatch.chdir(lab)
    with pytest.raises(NotebookFailure, match=r"count.ipynb: code cell 3 .* raised ValueError: length is -1"):
        run_notebook("nbs/experiments/count.ipynb", output_dir="here", params={"length": -1, "out": "here"})
    assert sorted(p.name for p in (lab / "here").iterdir()) == ["executed.ipynb", "numbers", "params.json"]
    assert "length is -1" in (lab / "here/executed.ipynb").read_text()


def test_kernel_that_ends_and_results_that_are_missing(tmp_path):
    """A dead kernel is told from an error; a notebook must make what it promises, or there is no record."""
    write_notebook(tmp_path / "a.ipynb", ("x: int = 1  # nothing", "import os\nos._exit(1)"))
    with pytest.raises(NotebookFailure, match=r"code cell 2 \(`import os`\) ended the kernel"):
        run_notebook("a.ipynb", output_dir="run", cwd=tmp_path)
    write_notebook(tmp_path / "a.ipynb", ("x: int = 1  # nothing",))
    with pytest.raises(NotebookFailure, match="did not make run/file.txt"):
        run_notebook("a.ipynb", output_dir="run", cwd=tmp_path, outputs=["run/file.txt"])
    assert not (tmp_path / "run/provenance.json").exists()


def test_missing_tools_are_named(tmp_path, monkeypatch):
    """Without a kernel, or without Snakemake, the message says what to install."""

    def no_kernel(*args, **options):
        raise NoSuchKernel("python3")

    monkeypatch.setattr("papermill.execute_notebook", no_kernel)
    write_notebook(tmp_path / "a.ipynb", ("x: int = 1  # nothing",))
    with pytest.raises(InputError, match="kernel 'python3' is not installed; install ipykernel"):
        run_notebook("a.ipynb", output_dir="run", cwd=tmp_path)
    monkeypatch.setitem(sys.modules, "snakemake.cli", None)
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="Snakemake is not installed"):
        reproduce(argparse.Namespace(profile="demo"))


def test_progress_is_shown_and_a_complete_notebook_ends_quietly(lab, monkeypatch, capfd):
    """The notebook's own bar becomes a line with the stage's name; the kernel's end leaves no line."""
    monkeypatch.chdir(lab)
    params = {"out": "here", "length": 7}
    run_notebook("nbs/experiments/count.ipynb", output_dir="here", params=params, progress=True, every=0)
    shown = capfd.readouterr().err
    assert "here: 7 of 7" in shown and "KeyboardInterrupt" not in shown and "\r" not in shown
    run_notebook("nbs/experiments/count.ipynb", output_dir="here", params=params)
    assert capfd.readouterr().err == ""


def test_progress_shows_a_line_now_and_then(capsys):
    """Bars with and without description, and plain lines; nothing before it is time."""
    now = Progress("fuse", 0)
    now.write("\rfusing:  30%|███   | 12/40 [00:03<00:07,  4.0pair/s]")
    now.write("train: stage 1, step 7 of 160, loss 0.3\n")
    now.write("a remark\n")
    Progress("fuse", 60).write("fusing:  30%|███   | 12/40")
    assert capsys.readouterr().err.splitlines() == [
        "fuse: fusing 12 of 40",
        "fuse: train: stage 1, step 7 of 160, loss 0.3",
    ]


def test_a_stage_runs_with_plain_papermill(done_lab, tmp_path):
    """With the parameters that a stage left, papermill makes the same without our help."""
    place = shutil.copytree(done_lab, tmp_path / "lab", ignore=shutil.ignore_patterns("numbers"))
    papermill = [
        sys.executable,
        "-m",
        "papermill",
        "-k",
        "python3",
        "nbs/experiments/count.ipynb",
        "out.ipynb",
    ]
    done = subprocess.run(
        [*papermill, "-f", "runs/demo/count/params.json"],
        cwd=place, env=environment(place), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [p.read_text() for p in sorted((place / "runs/demo/count/numbers").iterdir())] == [
        "3",
        "4",
        "5",
        "6",
    ]


def test_one_stage_by_hand(done_lab, tmp_path):
    """The helper of the rules by itself: 0 success, 1 a failed notebook, 2 bad input; no tracebacks."""

    def run(job: dict) -> subprocess.CompletedProcess:
        arguments = ["nbs/experiments/stages.py", "nbs/experiments/count.ipynb", "here", json.dumps(job)]
        return subprocess.run(
            [sys.executable, *arguments], cwd=place, env=environment(place), capture_output=True, text=True
        )

    place = shutil.copytree(done_lab, tmp_path / "lab")
    for params, inputs, status, said in (
        ({"out": "here"}, [], 0, ""),
        ({"out": "here", "length": -1}, [], 1, "raised ValueError"),
        ({"number": 1}, [], 2, "has no parameter 'number'"),
        ({}, ["runs/none/numbers"], 2, "runs/none/numbers: is not there; run the stage that makes it first"),
    ):
        done = run({"params": params, "inputs": inputs})
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


def test_fingerprint_is_of_code(tmp_path):
    """Prose, comments and layout do not count; code and imported modules do, also through a front door."""
    cells = ("x: int = 1  # nothing", "%matplotlib inline\nfrom smfnet.network import load_released")
    write_notebook(tmp_path / "a.ipynb", cells)
    before = fingerprint(tmp_path / "a.ipynb")
    assert {
        "a.ipynb",
        "smfnet/network/__init__.py",
        "smfnet/network/released.py",
        "smfnet/core/checks.py",
    } <= set(before)
    assert "smfnet/report/page.py" not in before
    write_notebook(tmp_path / "a.ipynb", (cells[0], cells[1] + "  # a remark\n\n"), prose="A remark.")
    assert fingerprint(tmp_path / "a.ipynb") == before
    write_notebook(tmp_path / "a.ipynb", (*cells, "y = 1"))
    after = fingerprint(tmp_path / "a.ipynb")
    assert {name for name in before if before[name] != after[name]} == {"a.ipynb"}


# --- what is passed to the notebooks ------------------------------------------------------------------------


def plan_of(lab: Path, text: str = CONFIG, **more) -> Plan:
    """The plan of a configuration, with the lab's three stages."""
    plan = Plan(yaml.safe_load(text) | more, {})
    for name in ("count", "total", "alone"):
        plan.passes(name)
    return plan


def test_plan(lab, monkeypatch):
    """Defaults move to the profile's folder, settings and changes replace them, parameters name inputs."""
    monkeypatch.chdir(lab)
    plan = plan_of(lab, CONFIG.replace("profile: demo", "profile: other"), SET=["count.length=9"])
    assert plan.values("count") == {"out": "runs/other/count", "length": 9, "seed": 3, "pause": 0.0}
    assert plan.values("total")["numbers"] == "runs/other/count/numbers"
    assert plan.inputs(plan.values("total")) == (["runs/other/count/numbers"], [])
    assert plan.targets() == ["runs/other/total/provenance.json", "runs/other/alone/provenance.json"]
    (lab / "sets/TNO").mkdir(parents=True)
    plan = plan_of(lab, DATA=str(lab / "sets"))
    assert plan.values("total")["data"] == "sets"
    assert plan.inputs(plan.values("total")) == (["runs/demo/count/numbers"], ["sets/TNO"])
    (lab / "mine.bin").write_text("weights")
    plan = plan_of(lab, SET=["total.data=mine.bin", "total.numbers=results/full/*/rows.csv"])
    assert plan.inputs(plan.values("total"))[0] == ["results/full/*/rows.csv", "mine.bin"]
    for name in ("b", "a"):
        (lab / f"results/full/{name}").mkdir(parents=True)
        (lab / f"results/full/{name}/rows.csv").touch()
    assert plan.inputs(plan.values("total"))[0][:2] == ["results/full/a/rows.csv", "results/full/b/rows.csv"]


def test_plan_refuses(lab, monkeypatch):
    """Misspelt stages, parameters and forms, values of the wrong type, folders that are not there."""
    monkeypatch.chdir(lab)
    for text, more, said in (
        (CONFIG, {"SET": ["length=3"]}, "write STAGE.PARAMETER=VALUE"),
        (CONFIG, {"SET": ["count.length"]}, "write STAGE.PARAMETER=VALUE"),
        (CONFIG, {"SET": ['count.length={"a":']}, "without spaces"),
        (CONFIG, {"SET": ["count.lenght=3"]}, "did you mean 'length'"),
        (CONFIG, {"SET": ["count.length=x"]}, "not of type int"),
        (CONFIG, {"SET": ["cuont.length=3"]}, "'cuont' is no stage; there are count, total, alone"),
        (CONFIG + "cuont: {length: 3}\n", {}, "'cuont' is no stage"),
        (CONFIG.replace("alone]", "aline]"), {}, "'aline' is no stage"),
        (CONFIG, {"DATA": "nowhere"}, "nowhere: is not a folder"),
        (
            CONFIG,
            {"DATA": str(lab)},
            "TNO: is not a folder; DATA must name one that has TNO; smfnet data list",
        ),
        (CONFIG + "partial: true\n", {}, "DATA=DIR"),
        (CONFIG.replace("needs: [TNO]", "partial: true"), {"DATA": str(lab)}, "has none of TNO"),
    ):
        with pytest.raises(InputError, match=said):
            plan_of(lab, text, **more).targets()


def test_sets_that_are_not_there_are_left_out(lab, monkeypatch):
    """A profile of whatever is there: absent sets are named, and a stage without any set is not made."""
    monkeypatch.chdir(lab)
    (lab / "sets/TNO").mkdir(parents=True)
    for name in ("both", "none"):
        write_notebook(lab / f"nbs/experiments/{name}.ipynb", ("sets: list[str] = []  # names",))
    text = "{profile: demo, make: [both, none], partial: true, sets: {TNO: TNO, M3FD: M3FD/all}, "
    text += "both: {sets: [M3FD, TNO]}, none: {sets: [M3FD]}}"
    plan = Plan(yaml.safe_load(text) | {"DATA": "sets"}, {})
    for name in ("both", "none"):
        plan.passes(name)
    assert plan.values("both") == {"sets": ["TNO"]} and plan.absent == {"M3FD": "M3FD/all"}
    assert plan.targets() == ["runs/demo/both/provenance.json"]


def test_repeated_stages(lab, monkeypatch):
    """A wildcard becomes a parameter; a path with * stands for the stage's every value."""
    monkeypatch.chdir(lab)
    cell = "input: str = ''  # name\nout: str = ''  # folder\nread: list[str] = []  # files"
    for name in ("task", "table"):
        write_notebook(lab / f"nbs/experiments/{name}.ipynb", (cell,))
    read = ["runs/demo/task-*/rows.csv", "runs/demo/task-*"]
    plan = Plan({"profile": "demo", "make": ["table"], "table": {"read": read}}, {"input": ["a", "b"]})
    plan.passes("task-{input}", "task")
    plan.passes("table")
    assert plan.values("task-{input}", input="a") == {"input": "a", "out": "runs/demo/task-a", "read": []}
    assert plan.inputs(plan.values("table"))[0] == [
        "runs/demo/task-a/rows.csv",
        "runs/demo/task-b/rows.csv",
        "runs/demo/task-a/provenance.json",
        "runs/demo/task-b/provenance.json",
    ]


def test_keep(tmp_path, monkeypatch):
    """Tables, records and the predictions of the drawn scenes; the same predictions are the same bytes."""
    monkeypatch.chdir(tmp_path)
    plan = Plan({"profile": "full", "make": []}, {"input": ["ours"]})
    rows = {stage: "rows.csv" for stage in ("table5", "detection-ours", "segmentation-ours")}
    for stage, file in {"evaluate": "summary.csv", "downstream": "differences.csv", **rows}.items():
        (tmp_path / f"runs/full/{stage}/predictions").mkdir(parents=True)
        (tmp_path / f"runs/full/{stage}/{file}").write_text(stage)
        (tmp_path / f"runs/full/{stage}/provenance.json").write_text("{}")
        for scene in ("a_day", "b_night"):
            (tmp_path / f"runs/full/{stage}/predictions/{scene}.json").write_text(scene)
    for figure in ("figure4", "figure5"):
        (tmp_path / f"figures/full/{figure}").mkdir(parents=True)
        (tmp_path / f"figures/full/{figure}/{figure}.json").write_text('{"scenes": ["b_night"]}')
    keep(plan)
    packed = tmp_path / "results/full/detection-ours/predictions.zip"
    before = packed.read_bytes()
    assert len([p for p in (tmp_path / "results").rglob("*") if p.is_file()]) == 5 * 2 + 2
    assert (tmp_path / "results/full/table5/rows.csv").read_text() == "table5"
    shutil.unpack_archive(packed, tmp_path / "unpacked")
    assert {p.name: p.read_text() for p in (tmp_path / "unpacked").iterdir()} == {"b_night.json": "b_night"}
    (tmp_path / "runs/full/detection-ours/predictions/b_night.json").touch()
    keep(plan)
    assert packed.read_bytes() == before


# --- the whole graph ----------------------------------------------------------------------------------------


@needs_snakemake
def test_dry_runs_name_what_a_change_concerns(done_lab):
    """Prose: nothing. Code, a module, a parameter, a result: what depends on it. Undone: nothing."""
    place, kept = done_lab / "nbs/experiments", stamps(done_lab)
    for path in [
        *place.glob("*"),
        *done_lab.glob("runs/demo/**/*.txt"),
        *done_lab.glob("runs/demo/**/*.json"),
    ]:
        path.touch()
    write_notebook(place / "count.ipynb", COUNT, prose="Only a remark.")
    assert planned(done_lab) == set()
    write_notebook(place / "count.ipynb", (*COUNT, "done = True"))
    assert planned(done_lab) == {"count", "total"}
    write_notebook(place / "count.ipynb", COUNT)
    with changed(
        place / "total.ipynb", (place / "total.ipynb").read_text().replace("sum(found)", "max(found)")
    ):
        assert planned(done_lab) == {"total"}
    with changed(done_lab / "smfnet/core/toy.py", "# a remark\n" + TOY):
        assert planned(done_lab) == set()
    with changed(done_lab / "smfnet/core/toy_factor.py", "FACTOR = 3\n"):  # imported by what `total` imports
        assert planned(done_lab) == {"total"}
    assert planned(done_lab, "--set", "count.length=2") == {"count", "total"}
    with changed(done_lab / "runs/demo/count/numbers/0.txt", "999"):  # in a folder between two stages
        assert planned(done_lab) == {"count", "total"}
    with changed(done_lab / "runs/demo/total/total.json", "1"):  # at the end
        assert planned(done_lab) == {"total"}
        with changed(done_lab / "runs/demo/alone/numbers/0.txt", "999"):  # two at once
            assert planned(done_lab) == {"total", "alone"}
    assert make(done_lab, "--dry-run", "--set", "count.length=2", "--", "everything").returncode == 0
    assert planned(done_lab) == set() and stamps(done_lab) == kept


@needs_snakemake
def test_only_what_changed_runs_again(lab):
    """Nothing the second time, exactly what depends on a change after one; the record names results."""
    assert planned(lab) == {"count", "total", "alone"} and not (lab / "runs").exists()
    done = make(lab)
    assert done.returncode == 0 and total(lab) == 2 * (3 + 4 + 5 + 6), done.stderr
    assert "Look at runs/demo/report.html" in done.stdout and "NOT DONE" not in done.stdout
    assert (
        "total: done in" in done.stdout and "KeyboardInterrupt" not in done.stderr and "\r" not in done.stderr
    )
    before = stamps(lab)
    (lab / "runs/demo/count/checkpoint.pt").touch()
    done = make(lab)
    assert (
        done.returncode == 0
        and not reran(lab, before)
        and "total done runs/demo/total" in " ".join(done.stdout.split())
    )
    assert make(lab, "--set", "count.length=2").returncode == 0
    assert reran(lab, before) == {"count", "total"} and total(lab) == 14
    numbers = sorted(p.name for p in (lab / "runs/demo/count/numbers").glob("*.txt"))
    assert numbers == ["0.txt", "1.txt"], "files of the longer run do not survive"
    assert (lab / "runs/demo/count/checkpoint.pt").exists(), "what a stage does not promise stays"
    found = json.loads((lab / "runs/demo/count/provenance.json").read_text())
    assert (
        found["params"]["length"] == 2
        and found["seed"] == 3
        and set(found["outputs"]) == {"runs/demo/count/numbers"}
    )
    assert found["notebook"]["path"] == "nbs/experiments/count.ipynb"


@needs_snakemake
def test_one_stage_by_name(lab):
    """ARGS=alone makes that stage and no other; what the dry run names is what runs."""
    assert planned(lab, "--", "alone") == {"alone"}
    done = make(lab, "--", "alone")
    assert done.returncode == 0 and set(stamps(lab)) == {"alone"}, done.stderr


@needs_snakemake
def test_damaged_and_missing_results_are_made_again(lab):
    """A file changed or removed by hand is noticed."""
    assert make(lab).returncode == 0
    before = stamps(lab)
    (lab / "runs/demo/count/numbers/0.txt").write_text("999")
    shutil.rmtree(lab / "figures/demo")
    assert make(lab).returncode == 0 and reran(lab, before) == {"count", "total"}
    assert total(lab) == 36 and (lab / "figures/demo/bar.svg").exists()


@needs_snakemake
def test_nothing_behind_a_failure_counts_as_done(lab):
    """`alone` runs; what is behind a failed stage keeps its files, but is stale in summary and report."""
    with (lab / "nbs/experiments/Snakefile").open("a") as snakefile:
        snakefile.write(LAST)
    write_notebook(lab / "nbs/experiments/last.ipynb", ONE_LINE)
    config = lab / "nbs/experiments/config/demo.yaml"
    config.write_text(CONFIG.replace("[total, alone]", "[last, alone]"))
    assert make(lab).returncode == 0
    before = stamps(lab)
    done = make(lab, "--set", "count.length=-1", "--set", "alone.length=3")
    assert done.returncode == 1 and "raised ValueError: length is -1" in done.stderr
    assert "length is -1" in (lab / "runs/demo/count/executed.ipynb").read_text()
    assert reran(lab, before) == {"count", "alone"}
    states = {
        line.split()[0]: " ".join(line.split()[1:-1])
        for line in done.stdout.splitlines()
        if line.startswith("  ")
    }
    assert states == {
        "count": "NOT DONE: failed",
        "total": "NOT DONE: stale",
        "last": "NOT DONE: stale",
        "alone": "done",
    }
    page = (lab / "runs/demo/report.html").read_text()
    assert (
        "total, last: made from other code" in page and page.count("done</span>") == 2
    )  # heading and list: `alone`
    assert make(lab).returncode == 0 and reran(lab, before) == {"count", "total", "last", "alone"}


@needs_snakemake
def test_exit_status_and_messages(lab):
    """2 for bad input of every kind, before anything runs; messages, not tracebacks."""
    for arguments, said in (
        (["--set", "total.number=1"], "has no parameter 'number'"),
        (["--set", "total.out=1"], "not of type str"),
        (["--set", "third.out=1"], "'third' is no stage; there are count, total, alone"),
        (["--data", lab], "TNO"),
        (["--profile", "dmo"], "no profile 'dmo'; there are demo"),
    ):
        done = make(lab, *arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (lab / "runs").exists()


@needs_snakemake
def test_real_data_adds_to_the_stages_that_use_it(lab):
    """DATA changes only the stage that reads it, whatever its name; changed contents are noticed."""
    data = lab / "my 'own' sets"
    (data / "TNO").mkdir(parents=True)
    (data / "TNO/one.png").write_text("1")
    assert make(lab).returncode == 0
    before = stamps(lab)
    done = make(lab, "--data", data)
    assert done.returncode == 0 and reran(lab, before) == {"total"} and total(lab) == 236, done.stderr
    assert json.loads((lab / "runs/demo/total/params.json").read_text())["data"] == "my 'own' sets"
    assert "my 'own' sets/TNO" in json.loads((lab / "runs/demo/total/provenance.json").read_text())["inputs"]
    assert planned(lab, "--data", data) == set() and planned(lab) == {"total"}
    (data / "TNO/one.png").write_text("2")
    assert planned(lab, "--data", data) == {"total"}


# --- runs that were killed ----------------------------------------------------------------------------------


def start(lab: Path, *arguments) -> subprocess.Popen:
    """Begin a run whose stage `count` takes long, and wait until it is at work."""
    with (lab / "log.txt").open("w") as log:
        run = subprocess.Popen(command(*arguments), cwd=lab, env=environment(lab), stdout=log, stderr=log)
    end = time.monotonic() + 300
    while not (lab / "diary.txt").exists():
        assert run.poll() is None and time.monotonic() < end, (lab / "log.txt").read_text()
        time.sleep(0.2)
    return run


def only_total(lab: Path) -> None:
    """`alone` would write into the diary too."""
    (lab / "nbs/experiments/config/demo.yaml").write_text(CONFIG.replace("[total, alone]", "[total]"))


@needs_snakemake
def test_a_killed_run_continues_without_a_word(lab):
    """Snakemake, the stage and its kernel are killed; the next call does not speak of locks."""
    only_total(lab)
    run = start(lab, "--set", "count.pause=600.0")
    family = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
    assert any("ipykernel" in " ".join(p.cmdline()) for p in family)
    for process in family:
        process.send_signal(signal.SIGKILL)
    run.wait()
    assert list((lab / ".snakemake/locks").iterdir()), "the killed run left Snakemake's lock"
    done = make(lab)
    assert done.returncode == 0 and total(lab) == 36, done.stderr
    assert "lock" not in done.stdout + done.stderr and "waiting" not in done.stderr


@needs_snakemake
def test_a_stage_that_outlives_its_run_is_waited_for(lab):
    """Snakemake alone is killed; the next call waits for the stage, and never works beside it."""
    only_total(lab)
    run = start(lab, "--set", "count.pause=25.0")
    run.kill()
    run.wait()
    done = make(lab)
    assert done.returncode == 0 and total(lab) == 36, done.stderr
    assert "which a killed run began" in done.stderr and "waiting for process" in done.stderr
    assert (lab / "diary.txt").read_text().split() == ["begin", "end", "begin", "end"]


@needs_snakemake
def test_two_runs_at_once_are_refused(lab):
    """A lock whose owner lives is left alone."""
    only_total(lab)
    run = start(lab, "--set", "count.pause=20.0")
    done = make(lab)
    assert done.returncode == 1 and f"another reproduction is running (process {run.pid})" in done.stderr
    assert run.wait(timeout=300) == 0 and total(lab) == 36
    assert (lab / "diary.txt").read_text().split() == ["begin", "end"]
