"""`make reproduce`: what is passed to each notebook, Snakemake on what is missing or changed, and the page of results."""

import argparse
import functools
import json
import os
import re
import shutil
import sys
import zipfile
from glob import glob
from pathlib import Path

import yaml
from stages import check_parameters, fingerprint, hold, parameters

from smfnet.core.checks import InputError
from smfnet.core.provenance import sha256

EXPERIMENTS = "nbs/experiments"
LOCK = ".snakemake/reproduction"
OWN = ("out", "profile_dir", "figures")  # parameters that name what a notebook writes


def texts(value):
    """All texts in a value, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from texts(v)


@functools.cache
def checksum(folder: str) -> str:
    """Checksum of a folder of the user's, which may be large."""
    return sha256(folder)


class Plan:
    """The stages of one configuration: what is passed to each notebook, and what it reads for that reason."""

    def __init__(self, config: dict, each: dict[str, list[str]]):
        """`each` holds the values of the wildcards; `InputError` for missing data and for changes of no parameter."""
        config, self.each, self.stages, self.idle = dict(config), each, {}, set()
        profile, data, with_data = config.pop("profile"), str(config.pop("DATA", "") or ""), config.pop("with_data", {})
        self.run, self.figures, self.make = f"runs/{profile}", f"figures/{profile}", config.pop("make")
        self.sets, needs, partial = config.pop("sets", {}), config.pop("needs", []), config.pop("partial", False)
        self.changes = [change(text) for text in config.pop("SET", None) or []]
        if partial and not data:
            raise InputError("this profile measures real data: name their folder, DATA=DIR (smfnet data list says how)")
        for folder in (Path(data, name) for name in ["", *needs] if data):
            if not folder.is_dir():
                text = f"{folder}: is not a folder; DATA must name one that has {', '.join(needs) or 'the data'}"
                raise InputError(f"{text}; smfnet data list says how to get them")
        self.absent = {n: f for n, f in self.sets.items() if partial and not Path(data, f).is_dir()}
        if partial and len(self.absent) == len(self.sets):
            raise InputError(f"{data}: has none of {', '.join(self.sets.values())}; smfnet data list says how to get them")
        self.data = Path(os.path.relpath(data)).as_posix() if data else ""
        layers = (config, with_data if data else {})
        self.config = {k: {**(config.get(k) or {}), **(layers[1].get(k) or {})} for k in [*config, *layers[1]]}

    def values(self, pattern: str, **wildcards: str) -> dict:
        """All parameters of a stage: defaults moved from demo to this profile, wildcards, configuration, changes."""
        notebook, name = self.stages[pattern], pattern.format(**wildcards)
        moved = lambda text: text.replace("runs/demo/", f"{self.run}/").replace("figures/demo/", f"{self.figures}/")
        known = {n: json.loads(moved(json.dumps(default))) for n, (_, default, _) in parameters(notebook).items()}
        own = {"out": f"{self.run}/{name}", **wildcards}
        base = name if pattern.startswith("{") else pattern.split("-{")[0]
        given = json.loads(json.dumps(self.config.get(base, {})).replace("{data}", json.dumps(self.data)[1:-1]))
        changed = {n: value for stage, n, value in self.changes if stage == base}
        values = check_parameters(notebook, known | {n: v for n, v in own.items() if n in known} | given | changed)
        if self.absent and set(values.get("sets", ())) & set(self.sets):
            values["sets"] = [n for n in values["sets"] if n not in self.absent]
            self.idle |= set() if values["sets"] else {base}
        return values

    def inputs(self, values: dict) -> tuple[list[str], list[str]]:
        """Files that parameters name, made by stages or given; and given folders."""
        files, folders = [], []
        for text in dict.fromkeys(t for n, v in values.items() if n not in OWN for t in texts(v) if t):
            if text.startswith("runs/"):
                for path in self.matching(text) if "*" in text else [text]:
                    files.append(f"{path}/provenance.json" if path.count("/") == 2 else path)
            elif text.startswith("results/"):
                found = sorted(glob(text)) or [text]
                files += [f for p in found for f in (sorted(glob(f"{p}/*")) if os.path.isdir(p) else [p])]
            elif text == self.data:
                folders += [f"{text}/{f}" for n, f in self.sets.items() if n in values.get("sets", self.sets)]
                folders += [f"{text}/fused"]
            elif os.path.exists(text):
                (folders if os.path.isdir(text) else files).append(text)
        return files, [f for f in folders if os.path.isdir(f)]

    def matching(self, text: str) -> list[str]:
        """A path with * for each stage that it stands for."""
        pattern = next(p for p in self.stages if p.split("-{")[0] == text.split("/")[2].removesuffix("-*"))
        return [text.replace("*", value) for value in self.each[pattern.split("{")[1].rstrip("}")]]

    def reads(self, pattern: str):
        """The `input` of a rule."""
        return lambda w: self.inputs(self.values(pattern, **w))[0]

    def passes(self, pattern: str, notebook: str = "") -> dict:
        """The `params` of a rule; `InputError` for settings that do not fit the notebook."""
        self.stages[pattern] = path = f"{EXPERIMENTS}/{notebook or pattern.split('-{')[0]}.ipynb"
        words = re.findall(r"{(\w+)}", pattern)
        for value in self.each[words[0]] if words else [""]:
            self.values(pattern, **({words[0]: value} if words else {}))
        values = lambda w: self.values(pattern, **w)
        job = lambda w: json.dumps({"params": values(w), "inputs": sum(self.inputs(values(w)), [])})
        folders = lambda w: {f: checksum(f) for f in self.inputs(values(w))[1]}
        code = lambda w: fingerprint(path)
        return {"notebook": path, "folder": f"{self.run}/{pattern}", "job": job, "folders": folders, "code": code}

    def targets(self) -> list[str]:
        """Records of the stages to make; `InputError` for a name that is no stage."""
        known = [s for p in self.stages for s in (self.each[p[1:-1]] if p[0] == "{" else [p.split("-{")[0]])]
        for name in (*self.config, *self.make, *(stage for stage, _, _ in self.changes)):
            if name not in known:
                raise InputError(f"'{name}' is no stage; there are {', '.join(known)}")
        return [f"{self.run}/{name}/provenance.json" for name in self.make if name not in self.idle]


def change(text: str) -> tuple[str, str, object]:
    """One change of a parameter, STAGE.NAME=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise InputError(f"SET {text}: write STAGE.PARAMETER=VALUE")
    try:
        return *key.split(".", 1), yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise InputError(f"SET {text}: the value is not YAML ({str(e).splitlines()[0]}); write it without spaces") from e


def refusing(function):
    """The function for use in a Snakefile: an `InputError` ends the process with its message and status 2."""
    def call(*args, **options):
        try:
            return function(*args, **options)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
    return call


def finish(workflow, plan: Plan) -> None:
    """After a run: write the page of results, and say what is done."""
    from smfnet.report.page import StageRecord, write_report

    dag, order, records = workflow.dag, [r.name for r in workflow.rules], []
    if dag is None or workflow.executor_plugin is None or not workflow.is_main_process:
        return
    jobs = sorted((j for j in dag.jobs if j.log), key=lambda j: (order.index(j.rule.name), j.log[0]))
    if workflow.dryrun:
        why = {Path(j.log[0]).parent.name: ", ".join(dag.reason(j).get_names()) for j in jobs if dag.needrun(j)}
        print(*(f"would run {name}: {text}" for name, text in why.items()), sep="\n")
        return
    for job in jobs:
        folder = Path(job.log[0]).parent
        state = "failed" if (folder / "executed.ipynb").exists() else "missing"
        if (folder / "provenance.json").exists():
            state = "stale" if dag.needrun(job) and not dag.finished(job) else "done"
        after = tuple(Path(j.log[0]).parent.name for j in jobs if j in dag.dependencies[job])
        made, kept = (tuple(map(Path, files)) for files in (job.output, job.input))
        records.append(StageRecord(folder.name, job.params.notebook, folder, state, made, after, kept))
    names = ", ".join(f"{n} ({f})" for n, f in plan.absent.items())
    missing = [f"Not below {plan.data}, and so in no table or figure: {names}; 'smfnet data list' says how to get them."]
    title = f"Reproduction, profile {Path(plan.run).name}"
    page = write_report(records, f"{plan.run}/report.html", title=title, notices=missing if names else [])
    wide = max(len(r.name) for r in records)
    for r in records:
        print(f"  {r.name:<{wide}} {'done' if r.state == 'done' else 'NOT DONE: ' + r.state}  {r.folder}")
    print(f"Look at {page}; executed notebooks are in {plan.run}/, pictures in {plan.figures}/.")
    print(*(missing if names else []), sep="\n", flush=True)


def keep(plan: Plan) -> None:
    """Copy to results/ what quick reproductions show: tables, what made them, and the predictions that figures draw."""
    target, inputs = Path("results", Path(plan.run).name), plan.each["input"]
    rows = [f"{task}-{name}/rows.csv" for task in ("detection", "segmentation") for name in inputs]
    for file in map(Path, ["evaluate/summary.csv", "downstream/differences.csv", "table5/rows.csv", *rows]):
        (target / file.parent).mkdir(parents=True, exist_ok=True)
        for name in (file.name, "provenance.json"):
            shutil.copyfile(plan.run / file.parent / name, target / file.parent / name)
    for figure, task in (("figure4", "detection"), ("figure5", "segmentation")):
        drawn = json.loads(Path(plan.figures, figure, f"{figure}.json").read_text(encoding="utf-8"))["scenes"]
        for stage in (f"{task}-{name}" for name in inputs):
            with zipfile.ZipFile(target / stage / "predictions.zip", "w", zipfile.ZIP_DEFLATED) as packed:
                for file in sorted(f for f in Path(plan.run, stage, "predictions").iterdir() if f.stem in drawn):
                    packed.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


def damaged(profile: str) -> list[str]:
    """Records of stages whose results are no longer what they were."""
    found = []
    for record in sorted(Path("runs", profile).glob("*/provenance.json")):
        outputs = json.loads(record.read_text(encoding="utf-8")).get("outputs", {})
        if any(not Path(o).exists() or sha256(o) != was for o, was in outputs.items()):
            found.append(record.as_posix())
    return found


def reproduce(args: argparse.Namespace) -> int:
    """Run Snakemake on what is missing or out of date, never beside another run or a stage that a killed run left."""
    from snakemake.cli import main as snakemake

    if not (config := Path(EXPERIMENTS, "config", f"{args.profile}.yaml")).is_file():
        names = ", ".join(sorted(p.stem for p in config.parent.glob("*.yaml")))
        raise InputError(f"no profile '{args.profile}'; there are {names}")
    if not args.dry_run:
        if hold(LOCK) is None:
            print(f"error: another reproduction is running (process {Path(LOCK).read_text()}); wait for it", file=sys.stderr)
            return 1
        for path in sorted(glob(".snakemake/running/*")):
            os.close(hold(path, f"waiting for process {{}}: it still runs {Path(path).name}, which a killed run began"))
        shutil.rmtree(".snakemake/locks", ignore_errors=True)  # nobody is running: a killed run left them
    force = [part for record in damaged(args.profile) for part in ("--forcerun", record)]
    given = [f"DATA={json.dumps(os.path.abspath(args.data))}"] if args.data else []
    given += [f"SET={json.dumps(args.set)}"] if args.set else []
    snakemake([
        "--snakefile", f"{EXPERIMENTS}/Snakefile", "--configfile", str(config), *(["--config", *given] if given else []),
        "--cores", args.cores, "--keep-going", "--rerun-incomplete", "--max-checksum-file-size", str(2**40),
        "--quiet", *(["all", "--dry-run"] if args.dry_run else ["host", "rules", "progress"]), *force, *args.snakemake,
    ])


def main(argv: list[str] | None = None) -> int:
    """Run every stage that is missing or out of date; 0 success, 1 a notebook failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="reproduce.py", description=main.__doc__)
    parser.add_argument("--profile", default="demo", help="set of parameters: demo, real or full")
    parser.add_argument("--data", metavar="DIR", help="folder with the real test sets")
    parser.add_argument("--set", metavar="STAGE.NAME=VALUE", action="append", help="change a parameter; may be repeated")
    parser.add_argument("--cores", default="all", help="processors to use")
    parser.add_argument("--dry-run", action="store_true", help="only say what would run")
    parser.add_argument("snakemake", nargs="*", help="further arguments for Snakemake, behind --")
    return refusing(reproduce)(parser.parse_args(argv))


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main())
