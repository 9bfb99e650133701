"""Build the site: notebooks as they are stored, pages for modules, results, one search over all.

`python docs/build.py [OUT]` writes the pages to OUT (default: _docs/site). Nothing is executed.
A warning of Sphinx is an error, which names the notebook.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NO_PAGE = {NBS / "index.ipynb"}  # its text is README.md, and that is the start page
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
CELL = "#cell-id="


class BrokenNotebook(Exception):
    """A notebook that no page can be made of."""


def jupyter_anchor(title: str) -> str:
    """A heading's anchor as JupyterLab writes it."""
    return title.replace(" ", "-")


def label(notebook: Path, cell: str) -> str:
    """The name that a cell has among all cells of the site."""
    return f"cell-{notebook.relative_to(ROOT).with_suffix('').as_posix().replace('/', '-')}-{cell}".lower()


def rewrite_link(target: str, notebook: Path, url: str) -> str:
    """A link of a notebook as the site's pages need it.

    Cells get labels of their own; files that are not pages lead to the repository.
    """
    if re.match(r"[a-z]+:", target):
        return target
    path, _, anchor = target.partition("#")
    file = (notebook.parent / path).resolve() if path else notebook
    if not file.exists():
        raise BrokenNotebook(f"{notebook.relative_to(ROOT)}: link to {target}, which is not there")
    if anchor.startswith("cell-id="):
        return f"#{label(file, anchor.removeprefix('cell-id='))}"
    if file in NO_PAGE:
        return f"{'../' * len(notebook.relative_to(ROOT).parts[1:])}index.md"
    if not path or file.suffix in {".ipynb", ".png", ".svg", ".jpg"}:
        return target
    return f"{url}/{'tree' if file.is_dir() else 'blob'}/main/{file.relative_to(ROOT).as_posix()}"


def rewrite(text: str, notebook: Path, url: str) -> str:
    """Markdown with its links rewritten; code in backticks stays."""
    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.M | re.S)
    joined = "".join(f"\0{i}\0" if i % 2 and not p.startswith("```") else p for i, p in enumerate(parts))
    done = LINK.sub(lambda m: f"{m[1]}({rewrite_link(m[2], notebook, url)})", joined)
    return re.sub(r"\0(\d+)\0", lambda m: parts[int(m[1])], done)


def visible(output: dict) -> bool:
    """Whether a reader without a kernel sees something: progress bars are left out."""
    data = output.get("data", {})
    return not any("widget-view" in kind for kind in data) or "image/png" in data


def code_cell(cell: dict) -> dict | None:
    """A cell without nbdev's directives; None if it is hidden."""
    lines = "".join(cell["source"]).splitlines()
    orders = {line[2:].strip().split(" ")[0] for line in lines if line.startswith("#|")}
    if orders & {"hide", "default_exp"}:
        return None
    tags = ["exported"] * ("export" in orders) + ["remove-input"] * ("echo:" in orders)
    kept = [line for line in lines if not line.startswith("#|")]
    old = cell.get("metadata", {}).get("tags", [])
    return cell | {
        "source": "\n".join(kept).strip("\n"),
        "metadata": {"tags": [*old, *tags]},
        "outputs": [o for o in cell["outputs"] if visible(o)],
    }


def cell_pages(nb: dict, notebook: Path, url: str, named: set[str]) -> Iterator[dict]:
    """The cells of a notebook as the site shows them, with labels before those that links name."""
    for cell in nb["cells"]:
        name = label(notebook, cell["id"])
        target = f"({name})=\n" if name in named else ""
        if cell["cell_type"] == "markdown":
            yield cell | {"source": f"{target}{rewrite(''.join(cell['source']), notebook, url)}"}
        elif cell["cell_type"] == "code" and (shown := code_cell(cell)):
            for output in shown["outputs"]:
                text = output.get("data", {}).get("text/markdown")
                if text:
                    output["data"]["text/markdown"] = rewrite("".join(text), notebook, url)
            if target:
                yield {"cell_type": "markdown", "metadata": {}, "source": target, "id": f"{cell['id']}-at"}
            yield shown


def read_notebook(path: Path) -> dict:
    """A notebook; `BrokenNotebook` names the file that is none."""
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BrokenNotebook(f"{path}: not a notebook ({e})") from e
    if not isinstance(nb, dict) or not isinstance(nb.get("cells"), list):
        raise BrokenNotebook(f"{path}: not a notebook (no list of cells)")
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                raise BrokenNotebook(f"{path}: a stored output is an error, {output.get('ename')}; run it")
    return nb


def named_cells(books: dict[Path, dict]) -> set[str]:
    """Labels of all cells that some link names."""
    found = set()
    for path, nb in books.items():
        for text in (json.dumps(cell, ensure_ascii=False) for cell in nb["cells"]):
            for target, cell in re.findall(r"\(([^()\s]*)#cell-id=([\w-]+)\)", text):
                found.add(label((path.parent / target).resolve() if target else path, cell))
    return found


def toctree(pages: list[str], caption: str = "", hidden: bool = True) -> str:
    """A MyST toctree."""
    head = [":hidden:"] * hidden + [":titlesonly:"] + [f":caption: {caption}"] * bool(caption)
    return "\n".join(["```{toctree}", *head, "", *pages, "```", ""])


ROOMS = sorted(p for p in NBS.iterdir() if p.is_dir() and p.name[:2].isdigit())


def siblings(front: Path) -> list[str]:
    """Pages below a room's first notebook, in order: its modules, then the rooms inside."""
    pages = [p.stem for p in sorted(front.parent.glob("*.ipynb")) if p != front]
    inner = [f"{p.parent.name}/{p.stem}" for p in sorted(front.parent.glob("*/00_*.ipynb"))]
    return pages + inner


def executed(runs: Path) -> dict[Path, Path]:
    """For each experiment the executed notebook of a run, as far as there is one."""
    found = {}
    for record in sorted(runs.glob("*/provenance.json"), key=lambda p: p.stat().st_mtime):
        made = json.loads(record.read_text(encoding="utf-8")).get("notebook") or {}
        copy = record.with_name("executed.ipynb")
        if made.get("path") and copy.is_file():
            found[ROOT / made["path"]] = copy
    return found


def stage_notebooks(out: Path, url: str, runs: Path) -> None:
    """Write every notebook as a page's source, and the pictures that they show."""
    paths = [
        p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and p not in NO_PAGE
    ]
    results = executed(runs)
    books = {path: read_notebook(results.get(path, path)) for path in paths}
    named = named_cells(books)
    for path, nb in books.items():
        cells = list(cell_pages(nb, path, url, named))
        if path.stem.startswith("00_"):
            cells.append(
                {"cell_type": "markdown", "metadata": {}, "id": "contents", "source": toctree(siblings(path))}
            )
        page = out / path.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(nb | {"cells": cells, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False)
        page.write_text(text.replace(f"{ROOT}/", ""), encoding="utf-8")


def relative(paths: list[Path]) -> list[str]:
    """Names of notebooks as a toctree has them."""
    return [p.relative_to(ROOT).with_suffix("").as_posix() for p in paths]


def contents() -> str:
    """The toctrees of the start page: first what a visitor does, then the paper, then everything."""
    rooms = [next(room.glob("00_*.ipynb")) for room in ROOMS]
    order = ["results", *relative(sorted((NBS / "tutorials").glob("*.ipynb")))]
    experiments = relative(sorted((NBS / "experiments").glob("*.ipynb")))
    return "\n".join(
        [
            toctree(order, "Start"),
            toctree(relative([NBS / "paper.ipynb", NBS / "ledger.ipynb"]), "The paper"),
            toctree(relative(rooms), "The notebooks"),
            toctree(relative(sorted((NBS / "apps").glob("*.ipynb"))), "Look and compare"),
            toctree(experiments, "Experiments"),
            toctree(["nbs/cli", "nbs/smfnet", "api/index", "contributing", "changelog"], "Reference"),
        ]
    )


HERO = re.compile(r"!\[([^\]]*)\]\(figures/swipe\.webp\)")
INSIDE = "<style>body { margin: 0 } .smf-swipe { width: 100% !important }</style>"  # as wide as its frame
SWIPE = '<iframe class="swipe" src="_static/swipe.html" title="{}" loading="lazy"></iframe>'


def start_page(url: str) -> str:
    """README with the picture that can be dragged, and all other pages in its table of contents."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = HERO.sub(lambda m: SWIPE.format(m[1]), text)
    return f"{rewrite(text, ROOT / 'README.md', url)}\n\n{contents()}"


def copy_static(out: Path) -> None:
    """Style, script, the picture that can be dragged, and MathJax, which then needs no network."""
    static = out / "_static"
    shutil.copytree(ROOT / "docs" / "_static", static)
    swipe = (ROOT / "figures" / "swipe.html").read_text(encoding="utf-8")
    (static / "swipe.html").write_text(swipe.replace("</head>", f"{INSIDE}</head>"), encoding="utf-8")
    mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    shutil.copytree(mathjax / "output" / "chtml", static / "mathjax" / "output" / "chtml")
    shutil.copyfile(mathjax / "tex-chtml.js", static / "mathjax" / "tex-chtml.js")


def stage(out: Path, url: str, runs: Path) -> None:
    """Write all sources of the site below `out`."""
    import api

    import results

    stage_notebooks(out, url, runs)
    api.write_pages(out)
    copy_static(out)
    kept = [p for folder in ("figures", "results/bench") for p in (ROOT / folder).glob("*.png")]
    for p in [*kept, *results.figures()]:
        (out / p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        if p in kept:
            shutil.copyfile(p, out / p.relative_to(ROOT))
        else:  # large, and read on a phone
            Image.open(p).save((out / p.relative_to(ROOT)).with_suffix(".webp"), quality=85)
    (out / "results.md").write_text(results.page(), encoding="utf-8")
    (out / "index.md").write_text(start_page(url), encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = rewrite((ROOT / name).read_text(encoding="utf-8"), ROOT / name, url)
        (out / name.lower()).write_text(text, encoding="utf-8")


def sphinx(source: Path, site: Path) -> int:
    """Run Sphinx; warnings are errors."""
    from sphinx.cmd.build import main

    options = ["-W", "--keep-going", "-q", "-j", "auto", "-d", f"{site}-doctrees", "-c", str(ROOT / "docs")]
    return main([*options, str(source), str(site)])


def main(argv: list[str] | None = None) -> int:
    """Stage the sources and build the pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", default=str(ROOT / "_docs" / "site"), help="folder for the pages")
    parser.add_argument(
        "--runs", default=str(ROOT / "runs" / "demo"), help="run whose executed experiments are shown"
    )
    args = parser.parse_args(argv)
    sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]
    site = Path(args.out)
    source = site.with_name(f"{site.name}-source")
    import conf

    try:
        shutil.rmtree(source, ignore_errors=True)
        stage(source, conf.SETTINGS["git_url"], Path(args.runs))
    except BrokenNotebook as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    shutil.rmtree(site, ignore_errors=True)
    return sphinx(source, site)


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(main())
