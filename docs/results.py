"""The page of results, and README's short table, from what the pipeline measured on real images.

`python docs/results.py keep NAME=RUN …` takes the stages table1 and claims of finished runs of the profile
real, one for each of the shipped weights, over to results/real, with what made them;
`python docs/results.py readme` writes the short table into nbs/index.ipynb.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from smfnet.core.checks import InputError
from smfnet.core.provenance import atomic_path
from smfnet.report.evidence import LAYERS
from smfnet.report.tables import to_html

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "real"
FIGURES = ROOT / "figures" / "demo"
SHORT = {  # README's rows: which method of which run, and which of its values
    "SMFNet (paper), published": ("ours", None, "published"),
    "ours, paper's size": ("ours", "paper", "measured"),
    "ours, tiny": ("ours", "tiny", "measured"),
    "SwinFusion, its public images measured here": ("SwinFusion", "tiny", "measured"),
    "brighter pixel of the two": ("maximum", "tiny", "measured"),
}
RECORD = ("time", "git", "environment", "params", "inputs", "notebook")
MARKS = "<!-- results -->", "<!-- end of results -->"


def read(stage: str) -> tuple[pd.DataFrame, dict[str, dict]]:
    """Kept rows of a stage with a column `weights`, and the record of each run."""
    folder = KEPT / stage
    rows = pd.read_csv(folder / "rows.csv", dtype={"printed": str, "id": str})
    text = rows.columns.intersection(["note", "published_note", "why", "shows"])
    rows[text] = rows[text].fillna("")
    return rows, json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["runs"]


def made(record: dict) -> str:
    """Day and revision of a run."""
    return f"{record['time'][:10]}, revision {record['git']['revision'][:10]}"


def short_table(name: str = "TNO") -> str:
    """README's table as Markdown: one set, five rows."""
    rows, runs = read("table1")
    rows = rows[rows["set"] == name]
    metrics = list(dict.fromkeys(rows.loc[rows["published"].notna(), "metric"]))
    lines = [f"| {name} | {' | '.join(metrics)} |", f"|---|{'---|' * len(metrics)}"]
    for label, (method, weights, side) in SHORT.items():
        own = rows[(rows["method"] == method) & (rows["weights"] == (weights or next(iter(runs))))]
        values = own.set_index("metric")[side].reindex(metrics)
        lines.append(f"| {label} | {' | '.join(f'{v:.3f}' for v in values)} |")
    return "\n".join([*lines, "", *short_notes(rows, name, made(runs["paper"]))])


def short_notes(rows: pd.DataFrame, name: str, when: str) -> list[str]:
    """What must be said below the short table, in sentences."""
    own = rows[rows["weights"] == "paper"]
    check = own[(own["method"] == "DIDFuse") & own["difference"].notna()]
    exact, away = (check["difference"].abs() < 5e-5).sum(), check["difference"].abs().max()
    size = own[(own["method"] == "ours") & own["difference"].notna()]
    reached = (size["difference"] >= 0).sum()
    shown = own[own["method"].isin(["ours", "SwinFusion", "maximum"])]
    best = shown.pivot(index="metric", columns="method", values="measured").max(axis=1)
    best = pd.concat([best, own[own["method"] == "ours"].set_index("metric")["published"]], axis=1).max(
        axis=1
    )
    trivial = own[own["method"] == "maximum"].set_index("metric")["measured"]
    wins = [m for m in size["metric"] if trivial[m] >= best[m]]
    return [
        f"**The paper's own row is not reproduced.** Weights of its size, trained here, reach {reached} of "
        f"{len(size)} of its values on {name}; the authors' checkpoint has not been measured here. The tiny "
        "network was trained on after a look at test means, which flatters its row.",
        "",
        "Higher counts as better in every column; that picking the brighter pixel wins "
        f"{', '.join(wins)} says what these numbers are worth ([worth](../nbs/09_report/12_worth.ipynb)). "
        "Means over the "
        f"{int(rows['n'].max())} pairs of {name}'s test set under the protocol `table1`, which meets "
        f"{exact} of "
        f"DIDFuse's {len(check)} printed values to the last digit and the others within {away:.4f}. Our "
        "networks' "
        f"images are measured as the authors' code saves them: {when}, `make reproduce DATA=DIR "
        "WEIGHTS=paper` "
        "and `WEIGHTS=tiny`.",
    ]


WORDS = " ".join(
    """
    *In print*: the paper's own tables. *Public sets*: how many pairs they have. *In code*: what the
    definitions do. *Our weights*: the network of the paper's size that was trained here. *Other
    methods' images*: public images, measured. *Stand-ins*: small networks or rendered scenes, which can
    only illustrate. *Open*: the numbers do not decide. *Not printed*, *not known*: the numbers that
    would decide are not stated. *For your eyes*: a statement about looks.
    """.split()
)


def verdicts() -> list[str]:
    """The paper's claims: a count for each kind of evidence, then every one."""
    rows, runs = read("claims")
    known = rows[(rows["weights"] == "paper") & (rows["verdict"] != "not tested")]
    counts = known.groupby("layer")["verdict"].value_counts()
    lines = ["## What becomes of the paper's claims", "", f"{WORDS} Judged {made(runs['paper'])}.", ""]
    lines += ["| evidence | verdicts |", "|---|---|"]
    for layer in LAYERS:
        if layer not in counts:
            lines.append(f"| {layer} | nothing measured yet |")
        else:
            lines.append(f"| {layer} | {', '.join(f'{n} {word}' for word, n in counts[layer].items())} |")
    for section, part in known.groupby("section", sort=False):
        lines += ["", f"### Section {section}" if section[0].isdigit() else f"### {section.capitalize()}", ""]
        lines += ["| claim | evidence | verdict | why |", "|---|---|---|---|"]
        for r in part.itertuples():
            said = [str(x).replace("|", r"\|") for x in (r.claim, r.layer, r.verdict, r.why)]
            lines.append(f"| {' | '.join(said)} |")
    return lines


def figures() -> list[Path]:
    """Figures of the last run of the profile demo, if there is one: plots and rendered scenes."""
    return sorted(p for p in FIGURES.glob("figure*/*.png") if p.name != "front.png")


def gallery() -> list[str]:
    """The figures as Markdown."""
    shown = [f"![{p.stem}]({p.relative_to(ROOT).with_suffix('.webp').as_posix()})\n" for p in figures()]
    if not shown:
        return []
    text = (
        "From `make reproduce`, which trains a tiny network for minutes; figures of real images are drawn by "
        "`make reproduce DATA=DIR` and are not published here, because the images are not ours."
    )
    return ["## Figures, on rendered scenes", "", text, "", *shown]


TITLES = {
    "paper": (
        "ours, the paper's size",
        "Trained here on RoadScene by one core in three hours and chosen on pairs that were set aside; "
        "nothing about its training was decided by a test set.",
    ),
    "tiny": (
        "ours, tiny",
        "A small relative of the published network. Its last training phases were added after a look at "
        "the means of these very test sets, which flatters its row.",
    ),
}


def page() -> str:
    """The results as MyST Markdown."""
    rows, runs = read("table1")
    own = rows[(rows["method"] == "ours") & (rows["weights"] == "paper") & rows["difference"].notna()]
    reached = [
        f"{(d >= 0).sum()} of {len(d)} ({name})" for name, d in own.groupby("set", sort=False)["difference"]
    ]
    lines = [
        "# Results",
        "",
        "> Table 1 measured on real images beside the published values, and what becomes of the paper's "
        "claims.",
        "",
        "SMFNet's own rows are not reproduced: weights of its size that were trained here reach "
        f"{', '.join(reached)} of the printed values, and the authors' checkpoint has not been measured "
        "here. "
        "Published values are italic and blue, measured ones stand below them with their difference and "
        "interval; "
        "the two are ranked apart.",
        "",
    ]
    for weights, (title, text) in TITLES.items():
        part = rows[rows["weights"] == weights]
        lines += [f"## Table 1: {title}", "", f"{text} Measured {made(runs[weights])}.", ""]
        for name, table in part.groupby("set", sort=False):
            if "images" in table and table["images"].isna().all():
                table = table.drop(columns="images")
            lines += ["```{raw} html", to_html(table.reset_index(drop=True), name), "```", ""]
    return "\n".join([*lines, *verdicts(), "", *gallery(), ""])


def keep(runs: dict[str, Path]) -> None:
    """Take the results of runs over, each under the name of its weights."""
    for stage, file in (("table1", "table1.csv"), ("claims", "claims.csv")):
        tables, records = [], {}
        for weights, folder in runs.items():
            if not (folder / stage / file).is_file():
                continue
            record = json.loads((folder / stage / "provenance.json").read_text(encoding="utf-8"))
            table = pd.read_csv(folder / stage / file, dtype={"printed": str, "id": str})
            tables.append(table.assign(weights=weights))
            records[weights] = {k: record[k] for k in RECORD}
        out = KEPT / stage
        out.mkdir(parents=True, exist_ok=True)
        pd.concat(tables, ignore_index=True).to_csv(out / "rows.csv", index=False)
        (out / "provenance.json").write_text(json.dumps({"runs": records}, indent=1) + "\n", encoding="utf-8")


def write_readme() -> None:
    """Put the short table between its marks in nbs/index.ipynb."""
    path = ROOT / "nbs" / "index.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if MARKS[0] not in text:
            continue
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        text = f"{before}{MARKS[0]}\n{short_table()}\n{MARKS[1]}{after}"
        cell["source"] = text.splitlines(keepends=True)
    with atomic_path(path) as part:
        part.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["keep", *pairs] if pairs:
            keep({name: Path(run) for name, run in (p.split("=", 1) for p in pairs)})
        case ["readme"]:
            write_readme()
        case _:
            raise InputError(__doc__)
