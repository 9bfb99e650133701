"""`make reproduce`: what is passed to each notebook, Snakemake on what changed, the page of results."""

import argparse
import functools
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from glob import glob
from pathlib import Path

import yaml
from stages import cards, check_parameters, fingerprint, hold, parameters, wanted_cards

from smfnet.core.checks import InputError, user_path
from smfnet.core.command import run_command
from smfnet.core.provenance import sha256
from smfnet.fusion.baselines import BASELINES
from smfnet.fusion.model_zoo import is_registered, weights_file
from smfnet.report.page import StageRecord, write_report
from smfnet.report.published import load_published
from smfnet.report.tables import AS_FUSED, SAVED, name_key

EXPERIMENTS = "nbs/experiments"
LOCK = ".snakemake/reproduction"
HELP = "smfnet data list says how to get them"
OWN = ("out", "profile_dir", "figures")  # parameters that name what a notebook writes

checksum = functools.cache(sha256)  # of folders of the user's, which may be large


def texts(value):
    """All texts in a value, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from texts(v)


def change(text: str) -> tuple[str, str, object]:
    """One change of a parameter, STAGE.NAME=VALUE: its three parts."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise InputError(f"SET {text}: write STAGE.PARAMETER=VALUE")
    try:
        return *key.split(".", 1), yaml.safe_load(value)
    except yaml.YAMLError as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"SET {text}: the value is not YAML ({reason}); write it without spaces") from e


def named_weights(text: str) -> dict[str, str]:
    """Networks to fuse with: registered name or path -> file; `InputError` for one that is not here."""
    found = {}
    names = [name for part in text.split(",") if (name := part.strip())]
    for name in [text] if text and user_path(text).is_file() else names:
        path = weights_file(name) if is_registered(name) else user_path(name)
        if not path.is_file():
            raise InputError(f"{path}: no such weights file; see: smfnet weights list")
        found[name if is_registered(name) else str(path)] = os.path.relpath(path)
    return found


def methods_of(weights: dict[str, str], published: str = "data/published") -> dict[str, str]:
    """What each network is called: the first `ours`, others by their files; `InputError` for a taken name."""
    printed = load_published(published, 1)["method"]
    taken, found = {name_key(m) for m in (*BASELINES, *printed, "ours", "ours-medical")}, {}
    for name in weights:
        method = Path(name).stem if found else "ours"
        odd = method.startswith(".") or method.endswith((SAVED, AS_FUSED)) or name_key(method) in taken
        if found and odd:
            raise InputError(f"{name}: its rows would be called {method!r}, which is taken; rename the file")
        taken.add(name_key(method))
        found[method] = name
    return found


class Plan:
    """The stages of one configuration: what is passed to each notebook, and what it reads for that reason."""

    def __init__(self, config: dict, each: dict[str, list[str]]):
        """`each` holds the values of the wildcards; `InputError` for data that are not there."""
        config, self.each, self.stages, self.idle = dict(config), each, {}, set()
        profile, data = config.pop("profile"), config.pop("DATA", "") or ""
        data = str(data[0] if isinstance(data, list) else data)
        if any("\ud800" <= c <= "\udfff" for c in data):  # a notebook is UTF-8 and could not say this name
            raise InputError(f"{data}: has bytes that are no text; rename the folder")
        self.run, self.figures, self.make = f"runs/{profile}", f"figures/{profile}", config.pop("make")
        self.changes = [change(text) for text in config.pop("SET", None) or []]
        self.weights = named_weights((config.pop("WEIGHTS", None) or [""])[0])
        self.sets, needs = config.pop("sets", {}), config.pop("needs", [])
        partial, more = config.pop("partial", False), config.pop("with_data", {})
        self.absent = {n: f for n, f in self.sets.items() if partial and not Path(data, f).is_dir()}
        if partial and not data:
            raise InputError(f"this profile measures real data: name their folder, DATA=DIR ({HELP})")
        for folder in (Path(data, name) for name in ["", *needs] if data):
            if not folder.is_dir():
                wanted = ", ".join(needs) or "the data"
                raise InputError(f"{folder}: is not a folder; DATA must name one that has {wanted}; {HELP}")
        if partial and len(self.absent) == len(self.sets):
            raise InputError(f"{data}: has none of {', '.join(self.sets.values())}; {HELP}")
        self.data = Path(os.path.relpath(data)).as_posix() if data else ""
        more = more if data else {}
        self.config = {k: {**(config.get(k) or {}), **(more.get(k) or {})} for k in [*config, *more]}
        for method, name in methods_of(self.weights).items() if self.weights else ():
            fuse = self.config.setdefault("fuse", {})
            if method == "ours":
                fuse["weights"] = name
                for table in ("table1", "table4"):  # whose network it is, is read from its weights now
                    self.config.get(table, {}).pop("notes", None)
            else:
                fuse["models"] = {**fuse.get("models", {}), method: name}

    def values(self, pattern: str, **wildcards: str) -> dict:
        """All parameters of a stage: defaults moved to this profile, wildcards, configuration, changes."""
        notebook, name = self.stages[pattern], pattern.format(**wildcards)
        base = name if pattern.startswith("{") else pattern.split("-{")[0]
        folders = {"runs/demo/": f"{self.run}/", "figures/demo": self.figures}
        moved = lambda text: re.sub("|".join(folders), lambda m: folders[m[0]], text)
        known = {n: json.loads(moved(json.dumps(p[1]))) for n, p in parameters(notebook).items()}
        own = {n: v for n, v in {"out": f"{self.run}/{name}", **wildcards}.items() if n in known}
        given = json.dumps(self.config.get(base, {})).replace("{data}", json.dumps(self.data)[1:-1])
        changed = {n: value for stage, n, value in self.changes if stage == base}
        values = check_parameters(notebook, known | own | json.loads(given) | changed)
        if self.absent and set(values.get("sets", ())) & set(self.sets):
            values["sets"] = [n for n in values["sets"] if n not in self.absent]
            self.idle |= set() if values["sets"] else {base}
        return values

    def inputs(self, values: dict) -> tuple[list[str], list[str]]:
        """Files that parameters name, those of other stages too; and folders that no stage makes."""
        files, folders = [], []
        weights = {t for n in ("weights", "models", "init") for t in texts(values.get(n, ""))}
        for text in dict.fromkeys(t for n, v in values.items() if n not in OWN for t in texts(v) if t):
            if text in self.weights and text in weights:
                files.append(self.weights[text])
            elif text.startswith("runs/"):
                for path in self.matching(text) if "*" in text else [text]:
                    files.append(f"{path}/provenance.json" if path.count("/") == 2 else path)
            elif text.startswith("results/"):
                for path in sorted(glob(text)) or [text]:
                    files += sorted(glob(f"{path}/*")) if os.path.isdir(path) else [path]
            elif text == self.data:
                wanted = values.get("sets", self.sets)
                folders += [f"{text}/{f}" for n, f in self.sets.items() if n in wanted]
                folders += [f"{text}/fused"]
            elif os.path.exists(text):
                (folders if os.path.isdir(text) else files).append(text)
        return files, [f for f in folders if os.path.isdir(f)]

    def matching(self, text: str) -> list[str]:
        """A path with * for each value of the stage that it names."""
        base = text.split("/")[2].removesuffix("-*")
        word = next(p.partition("-{")[2].rstrip("}") for p in self.stages if p.split("-{")[0] == base)
        return [text.replace("*", value) for value in self.each[word]]

    def reads(self, pattern: str):
        """The `input` of a rule."""
        return lambda w: self.inputs(self.values(pattern, **w))[0]

    def passes(self, pattern: str, notebook: str = "") -> dict:
        """The `params` of a rule; `InputError` for settings that do not fit the notebook."""
        self.stages[pattern] = path = f"{EXPERIMENTS}/{notebook or pattern.split('-{')[0]}.ipynb"
        word = pattern.partition("{")[2].partition("}")[0]
        for wildcards in [{word: value} for value in self.each[word]] if word else [{}]:
            self.values(pattern, **wildcards)

        def job(w):
            values = self.values(pattern, **w)
            return json.dumps({"params": values, "inputs": sum(self.inputs(values), [])})

        return {
            "notebook": path,
            "folder": f"{self.run}/{pattern}",
            "job": job,
            "code": lambda w: fingerprint(path),
            "folders": lambda w: {f: checksum(f) for f in self.inputs(self.values(pattern, **w))[1]},
        }

    def cards(self, pattern: str):
        """The resource `gpu` of a rule: how many graphics cards a stage computes on."""
        return lambda w: wanted_cards(self.values(pattern, **w))

    def targets(self) -> list[str]:
        """Records of the stages to make; `InputError` for a name that is no stage."""
        names = lambda pattern: self.each[pattern[1:-1]] if pattern[0] == "{" else [pattern.split("-{")[0]]
        known = [name for pattern in self.stages for name in names(pattern)]
        for name in (*self.config, *self.make, *(stage for stage, _, _ in self.changes)):
            if name not in known:
                raise InputError(f"'{name}' is no stage; there are {', '.join(known)}")
        return [f"{self.run}/{name}/provenance.json" for name in self.make if name not in self.idle]


def refusing(function):
    """A function as a Snakefile needs it: an `InputError` ends the process with its message and status 2."""

    def call(*args, **options):
        try:
            return function(*args, **options)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)

    return call


def need_cards(workflow) -> None:
    """`InputError` before anything runs, if a stage that is due wants cards and this machine has too few."""
    if workflow.remote_exec or not workflow.local_exec or not workflow.is_main_process:
        return  # a cluster has its own
    for job in workflow.dag.needrun_jobs():
        count = job.resources.get("gpu", 0)
        if count > len(cards()):
            name = Path(job.params.folder).name
            raise InputError(
                f"{name}: device=cuda on {count} card(s), but this machine has {len(cards())}; "
                f'compute elsewhere, or on the processor: SET="{name.split("-")[0]}.device=cpu"'
            )


# --- after a run --------------------------------------------------------------------------------------------


def finish(workflow, plan: Plan) -> None:
    """Say what a dry run would do; after a run write the page of results, and say what is done."""
    dag, order = workflow.dag, [r.name for r in workflow.rules]
    if dag is None or workflow.executor_plugin is None or not workflow.is_main_process:
        return
    jobs = sorted((j for j in dag.jobs if j.log), key=lambda j: (order.index(j.rule.name), j.log[0]))
    if workflow.dryrun:
        for job in filter(dag.needrun, jobs):
            reasons = ", ".join(dag.reason(job).get_names())
            count = job.resources.get("gpu", 0)
            where = f", on {count} card(s)" if count else ""
            print(f"would run {Path(job.params.folder).name}: {reasons}{where}")
        return
    if not jobs:  # refused before any stage was known
        return
    records = [record_of(job, dag) for job in jobs]
    absent = ", ".join(f"{name} ({folder})" for name, folder in plan.absent.items())
    notices = [f"Not below {plan.data}, and so in no table or figure: {absent}; {HELP}."] if absent else []
    title = f"Reproduction, profile {Path(plan.run).name}"
    page = write_report(records, f"{plan.run}/report.html", title=title, notices=notices)
    wide = max(len(r.name) for r in records)
    for r in records:
        print(f"  {r.name:<{wide}} {'done' if r.state == 'done' else 'NOT DONE: ' + r.state}  {r.folder}")
    print(f"Look at {page}; executed notebooks are in {plan.run}/, pictures in {plan.figures}/.")
    print(*notices, sep="\n", end="\n" if notices else "", flush=True)


def record_of(job, dag) -> StageRecord:
    """A job of Snakemake as the page of results shows it."""
    folder = Path(job.params.folder)
    state = "failed" if (folder / "executed.ipynb").exists() else "missing"
    if (folder / "provenance.json").exists():
        state = "stale" if dag.needrun(job) and not dag.finished(job) else "done"
    after = tuple(Path(j.params.folder).name for j in dag.dependencies[job])
    made, behind = tuple(map(Path, job.output)), list(dag.bfs(dag.dependencies, job))
    kept = dict.fromkeys(Path(i) for j in behind for i in j.input if i.startswith("results/"))
    return StageRecord(folder.name, job.params.notebook, folder, state, made, after, tuple(kept))


def keep(plan: Plan) -> None:
    """Copy to results/ what quick reproductions show: tables, records, predictions that figures draw."""
    target, inputs = Path("results", Path(plan.run).name), plan.each["input"]
    rows = [f"{task}-{name}/rows.csv" for task in ("detection", "segmentation") for name in inputs]
    for file in map(Path, ["evaluate/summary.csv", "downstream/differences.csv", "table5/rows.csv", *rows]):
        (target / file.parent).mkdir(parents=True, exist_ok=True)
        for name in (file.name, "provenance.json"):
            shutil.copyfile(plan.run / file.parent / name, target / file.parent / name)
    for figure, task in (("figure4", "detection"), ("figure5", "segmentation")):
        chosen = Path(plan.figures, figure, f"{figure}.json").read_text(encoding="utf-8")
        drawn = json.loads(chosen)["scenes"]
        for stage in (f"{task}-{name}" for name in inputs):
            files = [f for f in Path(plan.run, stage, "predictions").iterdir() if f.stem in drawn]
            with zipfile.ZipFile(target / stage / "predictions.zip", "w") as packed:
                for file in sorted(files):  # without times, so that the same predictions are the same bytes
                    packed.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


# --- the command --------------------------------------------------------------------------------------------


def damaged(profile: str) -> list[str]:
    """Records of stages whose results are no longer what they were."""
    records = sorted(Path("runs", profile).glob("*/provenance.json"))
    made = {r: json.loads(r.read_text(encoding="utf-8")).get("outputs", {}) for r in records}
    intact = lambda path, was: Path(path).exists() and sha256(path) == was
    return [r.as_posix() for r in records if not all(intact(*item) for item in made[r].items())]


def alone() -> bool:
    """Wait for stages of a killed run, and remove its lock; False while another run is going on."""
    if hold(LOCK) is None:
        owner = Path(LOCK).read_text()
        print(f"error: another reproduction is running (process {owner}); wait for it", file=sys.stderr)
        return False
    for path in sorted(glob(".snakemake/running/*")):
        stage = Path(path).name
        os.close(hold(path, f"waiting for process {{}}: it runs {stage}, which a killed run began"))
    shutil.rmtree(".snakemake/locks", ignore_errors=True)
    return True


def as_yaml(names: list[str]) -> str:
    """A list for Snakemake's --config, which takes the quotes of a text alone and leaves the escapes."""
    text = json.dumps(names, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # bytes of a name that are no text


def reproduce(args: argparse.Namespace) -> int:
    """Run Snakemake on what is missing or out of date; a result that was changed by hand is made again."""
    try:
        from snakemake.cli import main as snakemake
    except ImportError as e:
        text = "Snakemake is not installed (it needs Python 3.11); or run the stages one by one by papermill"
        raise InputError(text) from e
    config = Path(EXPERIMENTS, "config", f"{args.profile}.yaml")
    if not config.is_file():
        names = ", ".join(sorted(p.stem for p in config.parent.glob("*.yaml")))
        raise InputError(f"no profile '{args.profile}'; there are {names}")
    if not args.dry_run and not alone():
        return 1
    given = [f"DATA={as_yaml([os.path.abspath(user_path(args.data))])}"] if args.data else []
    given += [f"SET={as_yaml(args.set)}"] if args.set else []
    given += [f"WEIGHTS={as_yaml([args.weights])}"] if args.weights else []
    force = damaged(args.profile)
    options = ["--snakefile", f"{EXPERIMENTS}/Snakefile", "--configfile", str(config)]
    options += ["--quiet", "host", "rules", "progress"]
    options += ["--config", *given] if given else []
    options += ["--forcerun", *force] if force else []
    options += ["--dry-run"] if args.dry_run else []
    options += ["--keep-going", "--rerun-incomplete", "--max-checksum-file-size", str(2**40)]
    if not any(a.startswith(("--executor", "--profile", "--resources")) for a in args.snakemake):
        options += ["--resources", f"gpu={max(1, len(cards()))}"]  # one job a card
    options += ["--cores", args.cores]  # last an option of one value, so that a target may follow
    if not args.snakemake:  # who passes options of Snakemake wants to read all that it says
        logging.getLogger("snakemake.logging").addFilter(lambda record: record.levelno >= logging.WARNING)
    return snakemake([*options, *args.snakemake])  # ends the process with its own status


def main(argv: list[str] | None = None) -> int:
    """Run every stage that is missing or out of date; 0 success, 1 a notebook failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="reproduce.py", description=main.__doc__)
    add = parser.add_argument
    add("--profile", default="demo", help="set of parameters: demo, real or full")
    add("--data", metavar="DIR", help="folder with the real test sets")
    add("--weights", metavar="NAME", help="registered weights, or a file; several with commas")
    add("--set", metavar="STAGE.NAME=VALUE", action="append", help="change a parameter; may be repeated")
    add("--cores", default="all", help="processors to use")
    add("--dry-run", action="store_true", help="only say what would run")
    add("snakemake", nargs="*", help="further arguments for Snakemake, behind --")
    return run_command(lambda: reproduce(parser.parse_args(argv)), prefix="error")


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main())
