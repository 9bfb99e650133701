"""The map of the paper: every row is there once, and every link, name and test in it exists."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from rooms import NBS, ROOT, every_notebook, module_of

from smfnet.core.paper_map import (
    equations_table,
    exhibits_table,
    find_definition,
    glossary_table,
    ledger_rows,
    ledger_table,
    read_map,
    split_list,
)
from smfnet.losses.index import EQUATIONS

MAPS = ("equations", "exhibits", "glossary")
ROWS = range(1, 26)


def short(path):
    """Test name of a file."""
    return path.relative_to(ROOT).as_posix()


# --- links -------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The identifier that JupyterLab and exported pages give a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading.lstrip("#").strip())
    return text.replace(" ", "-")


def targets(notebook: Path) -> set[str]:
    """What `notebook.ipynb#…` can lead to: cells and headings."""
    found = set()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        found.add(f"cell-id={cell['id']}")
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^```.*?^```", "", "".join(cell["source"]), flags=re.M | re.S)
            found |= {anchor(line) for line in text.splitlines() if re.match(r"#+ ", line)}
    return found


def markdown_of(notebook: Path) -> str:
    """All Markdown of a notebook: cells, and what its code shows as Markdown."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append("".join(cell["source"]))
        for output in cell.get("outputs", ()):
            parts.append("".join(output.get("data", {}).get("text/markdown", "")))
    return "\n\n".join(parts)


def links_of(text: str) -> list[tuple[str, str]]:
    """Relative links as file and anchor; either may be empty."""
    found = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text)
    return [(file, part) for file, part in found if not re.match(r"[a-z]+:", file)]


def broken(notebook: Path, text: str) -> list[str]:
    """Links that lead to no file, or to a notebook without such a heading or cell."""
    found = []
    for file, part in links_of(text):
        target = (notebook.parent / file).resolve() if file else notebook
        reached = target.exists() and (not part or target.suffix != ".ipynb" or part in targets(target))
        if not reached:
            found.append(f"{file}#{part}")
    return sorted(set(found))


def test_links_are_seen_and_followed(tmp_path):
    """Both kinds of anchors, links within a page, and what is broken."""
    cell = {"cell_type": "markdown", "id": "ab", "source": "## row 3\n\n```\n# no heading\n```"}
    for name in ("a.ipynb", "b.ipynb"):
        (tmp_path / name).write_text(json.dumps({"cells": [cell]}))
    good = "[a](b.ipynb#row-3) [b](b.ipynb#cell-id=ab) [c](#row-3) [d](https://e.f/g#h) [i](b.ipynb)"
    bad = "[a](b.ipynb#row-4) [b](b.ipynb#cell-id=a) [c](#no-heading) [d](c.ipynb)"
    assert broken(tmp_path / "a.ipynb", good) == []
    assert len(broken(tmp_path / "a.ipynb", bad)) == 4


@pytest.mark.parametrize("notebook", every_notebook(), ids=short)
def test_links_with_their_anchors_resolve(notebook):
    """A link to a heading or a cell finds it."""
    assert broken(notebook, markdown_of(notebook)) == []


# --- the files of the map ----------------------------------------------------------------------------------


def test_every_number_is_there_once():
    """Equations 1-30, Tables 1-5, Figures 1-6, ledger rows 1-25; no term of the glossary twice."""
    assert [int(r["equation"]) for r in read_map("equations", ROOT)] == list(range(1, 31))
    exhibits = [f"Table {n}" for n in range(1, 6)] + [f"Figure {n}" for n in range(1, 7)]
    assert [r["exhibit"] for r in read_map("exhibits", ROOT)] == exhibits
    assert [int(r["row"]) for r in ledger_rows(ROOT)] == list(ROWS)
    terms = [(r["symbol"], r["term"]) for r in read_map("glossary", ROOT)]
    assert len(terms) == len(set(terms)) > 30


@pytest.mark.parametrize("name", MAPS)
def test_nothing_is_left_empty(name):
    """Each line has its meaning, its names and, but for the glossary, tests and a state."""
    for row in read_map(name, ROOT):
        empty = [k for k, v in row.items() if not v and k != "rows" and (name, k) != ("glossary", "meaning")]
        assert not empty and None not in row, row


@pytest.mark.parametrize("name", MAPS)
def test_names_exist_in_notebook_and_package(name):
    """Every name is defined by an exported cell, and the module has it."""
    for dotted in {d for row in read_map(name, ROOT) for d in split_list(row["names"])}:
        found = find_definition(dotted, ROOT)
        module = module_of(found.notebook).removesuffix(".__init__")
        assert dotted.startswith(module.removeprefix("smfnet.") + "."), dotted
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        defined = {getattr(n, "name", "") for n in tree.body}
        defined |= {
            t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if hasattr(t, "id")
        }
        assert found.name in defined, f"{module} does not define {found.name}"
        assert importlib.util.find_spec(module), module


def test_functions_of(path: Path) -> set[str]:
    """Names of the tests that pytest collects from a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


test_functions_of.__test__ = False


def named_tests() -> list[str]:
    """Every `folder/file.py::test` of the map and the ledger."""
    rows = [row for name in ("equations", "exhibits") for row in read_map(name, ROOT)]
    found = {t for row in rows for t in split_list(row["tests"])}
    for row in ledger_rows(ROOT):
        mentioned = re.findall(r"`([\w/]+\.py::\w+)`", row["Tests"])
        assert mentioned, row["row"]
        found |= set(mentioned)
    return sorted(found)


@pytest.mark.parametrize("test", named_tests())
def test_named_tests_exist(test):
    """The file has the test, at its top level and with a check in it."""
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    assert path.is_file() and re.match(r"test_\w+\.py", path.name), file
    assert name in test_functions_of(path), test


def test_experiments_exist():
    """Whatever makes a table or figure again is a notebook there, and each has one of its own number."""
    for row in read_map("exhibits", ROOT):
        makers = split_list(row["experiments"])
        assert all((NBS / "experiments" / f"{maker}.ipynb").is_file() for maker in makers)
        assert row["exhibit"].lower().replace(" ", "") in makers


def test_map_and_index_of_the_losses_agree():
    """Equations 17-30 have an index of their own, with stricter checks; nothing in it is missing here."""
    rows = {int(r["equation"]): r for r in read_map("equations", ROOT)}
    for entry in EQUATIONS:
        row = rows[entry.equation]
        assert f"losses.{entry.notebook[3:]}.{entry.function}" in split_list(row["names"]), entry
        assert f"losses/test_losses.py::{entry.test}" in split_list(row["tests"]), entry
    assert all(len(split_list(rows[n]["names"])) == len({e.function for e in EQUATIONS if e.equation == n})
               for n in range(17, 31))  # fmt: skip


def test_equations_are_named_where_they_are_defined():
    """The docstring of at least one name of each equation carries its number."""
    for row in read_map("equations", ROOT):
        number, docs = int(row["equation"]), []
        for dotted in split_list(row["names"]):
            found = find_definition(dotted, ROOT)
            cells = json.loads(found.notebook.read_text(encoding="utf-8"))["cells"]
            source = "".join(next(c for c in cells if c["id"] == found.cell)["source"])
            docs += re.findall(r'^    "(.*)"$', source, re.M)
        spans = [m for d in docs for m in re.findall(r"\beqs? (\d+)(?:[-–](\d+))?", d)]
        lone = [int(n) for d in docs for n in re.findall(r"\b(?:eqs? [\d\-– and,]*?)(\d+)", d)]
        inside = any(int(a) <= number <= int(b or a) for a, b in spans) or number in lone
        assert inside, f"equation {number}: no docstring of {row['names']} names it"


# --- pages and ledger --------------------------------------------------------------------------------------


def test_the_page_shows_what_the_files_say():
    """The stored tables of paper.ipynb are those that its cells would write now."""
    fresh = {
        "Markdown(equations_table(root))": equations_table(ROOT),
        'Markdown(exhibits_table("Table", root))': exhibits_table("Table", ROOT),
        'Markdown(exhibits_table("Figure", root))': exhibits_table("Figure", ROOT),
        "Markdown(ledger_table(root))": ledger_table(ROOT),
        "Markdown(glossary_table(root))": glossary_table(ROOT),
    }
    shown = {}
    for cell in json.loads((NBS / "paper.ipynb").read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            if text := output.get("data", {}).get("text/markdown"):
                shown["".join(cell["source"]).splitlines()[-1]] = "".join(text)
    assert set(shown) == set(fresh)
    for call, text in fresh.items():
        assert shown[call] == text, f"{call}: run nbs/paper.ipynb and store its results"


def test_the_page_names_its_sources():
    """Paper and authors' repository are one click away."""
    for page in ("paper", "ledger"):
        assert "https://github.com/Abraham-Einstein/SMFNet" in markdown_of(NBS / f"{page}.ipynb")
    assert "https://arxiv.org/abs/2407.06159" in markdown_of(NBS / "paper.ipynb")


def test_rows_that_the_map_names_exist():
    """Rows that the files of the map name exist, and every row but three is named."""
    used = {
        int(n)
        for name in ("equations", "exhibits")
        for r in read_map(name, ROOT)
        for n in split_list(r["rows"])
    }
    assert used <= set(ROWS)
    assert set(ROWS) - used == {
        11,
        12,
        20,
    }  # training, patches and grey belong to no equation, table or figure


MENTION = re.compile(r"\bledger rows? \d|\bledger rows? \d+\]\([^)]*\)(?:,? and |, )\d", re.I)
LINKED = re.compile(r"\[[^\]]*\]\([^)]*\)")


def unlinked(text: str) -> list[str]:
    """Mentions of a ledger row that lead nowhere."""
    return [m[0] for m in MENTION.finditer(LINKED.sub("", text))] + re.findall(
        r"\[ledger rows? \d+\]\([^)]*\)(?:,? and |, )\d+", text, re.I
    )


def test_unlinked_mentions_are_seen():
    """Also the second of two rows."""
    assert unlinked("see ledger row 3") and unlinked("**Ledger rows 1 and 2**")
    assert unlinked("[ledger rows 1](x#row-1) and 2")
    assert not unlinked("[Ledger rows 1](x#row-1) and [2](x#row-2), row 3 of Table 1")


@pytest.mark.parametrize("notebook", every_notebook(), ids=short)
def test_mentions_of_the_ledger_are_links(notebook):
    """Every "ledger row 3" leads to row 3, and to no other."""
    text = markdown_of(notebook)
    assert unlinked(text) == []
    for words, number in re.findall(r"\[([^\]]*)\]\([^)]*ledger\.ipynb#row-(\d+)\)", text):
        if said := re.findall(r"\d+", words):
            assert said == [number], f"[{words}] leads to row {number}"


@pytest.mark.parametrize("row", ledger_rows(ROOT), ids=lambda r: f"row {r['row']}")
def test_a_row_is_explained_where_it_says(row):
    """At least one notebook that a row names links back to the row."""
    places = [(NBS / file).resolve() for file, _ in links_of(row["Where"])]
    assert places
    mentions = [p for p in places if f"ledger.ipynb#row-{row['row']})" in markdown_of(p)]
    assert mentions, f"no notebook of row {row['row']} links back to it"


def numbers_in(text: str) -> set[int]:
    """Numbers of "equations 1–2 and 5–8"."""
    spans = re.findall(r"(\d+)(?:–(\d+))?", text)
    return {n for a, b in spans for n in range(int(a), int(b or a) + 1)}


def test_overviews_link_their_equations():
    """A notebook that defines an equation says so at its top, with a link to the map."""
    homes: dict[Path, set[int]] = {}
    for row in read_map("equations", ROOT):
        for dotted in split_list(row["names"]):
            homes.setdefault(find_definition(dotted, ROOT).notebook, set()).add(int(row["equation"]))
    assert len(homes) == 10
    for notebook, numbers in homes.items():
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"][:3]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        said = re.findall(r"On the map: \[(equations? [^\]]*)\]\(\.\./paper\.ipynb#equations\)", text)
        assert len(said) == 1 and numbers_in(said[0]) == numbers, f"{notebook.name}: {said} for {numbers}"
