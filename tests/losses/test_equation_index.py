"""The index of equations 17-30 agrees with the notebooks and tests, and its checker notices damage."""

import json
import shutil
from pathlib import Path

import pytest

from smfnet.core.checks import InputError
from smfnet.losses.index import (
    EQUATIONS,
    Row,
    check_index,
    docstring_equations,
    heading_equations,
    locate,
    sections,
)

ROOT = Path(__file__).resolve().parents[2]


def test_every_equation_is_found():
    assert check_index(ROOT) == []
    assert {row.equation for row in EQUATIONS} == set(range(17, 31))


def test_functions_exist_in_the_package():
    import importlib

    for row in EQUATIONS:
        module = importlib.import_module(f"smfnet.losses.{row.notebook[3:]}")
        assert callable(getattr(module, row.function))


def test_located_cells_define_the_functions():
    for place in locate(ROOT):
        notebook = json.loads(
            (ROOT / "nbs" / "02_losses" / f"{place['notebook']}.ipynb").read_text(encoding="utf-8")
        )
        source = "".join(notebook["cells"][place["cell"]]["source"])
        assert source.startswith("#| export") and f"def {place['function']}(" in source
        assert f"({place['equation']})" in place["section"]


def test_markers():
    assert heading_equations("## Steps: Eqs. (24) and (25)") == (24, 25)
    assert heading_equations("## Steps (24)") == () == heading_equations("see Eq. (24)")
    assert docstring_equations("Total of eqs 17-19 and 26, over 4 pixels") == {17, 18, 19, 26}


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "nbs" / "02_losses", tmp_path / "nbs" / "02_losses")
    (tmp_path / "tests" / "losses").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "losses" / "test_losses.py", tmp_path / "tests" / "losses")
    return tmp_path


def edit(root, stem, old, new):
    "Replace text in the cells of a copied notebook."
    path = root / "nbs" / "02_losses" / f"{stem}.ipynb"
    notebook, hits = json.loads(path.read_text(encoding="utf-8")), 0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        hits += old in source
        cell["source"] = source.replace(old, new)
    assert hits
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.mark.parametrize(
    "stem, old, new, finding",
    [
        ("02_intensity", "Eq. (20)", "equation 20", "exports it"),
        ("02_intensity", "def gram_mse(", "def gram_square(", "exports it"),
        ("03_semantic", "the set function Δ of eq 21", "a set function", "docstring"),
        (
            "03_semantic",
            "## Errors of pixels: Eq. (22)",
            "## Errors of pixels: Eq. (22) and Eq. (12)",
            "no row for eq 12",
        ),
        ("05_stages", "$$", "", "no displayed equation"),
        ("04_decomposition", "assert", "_ =", "no lesson cell"),
        ("02_intensity", "gram_mse(half", "gram_distance(half", "gram_mse: no lesson cell"),
    ],
)
def test_damaged_notebook_is_reported(copy, stem, old, new, finding):
    assert check_index(copy) == []
    edit(copy, stem, old, new)
    assert any(finding in f for f in check_index(copy))


def test_damaged_tests_are_reported(copy):
    path = copy / "tests" / "losses" / "test_losses.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("def test_eq21_jaccard(", "def test_jaccard("), encoding="utf-8")
    assert any("test_eq21_jaccard does not exist" in f for f in check_index(copy))
    path.write_text(
        text.replace(
            "def test_eq21_jaccard():\n", "def test_eq21_jaccard():\n    return\n\n\ndef other():\n"
        ),
        encoding="utf-8",
    )
    assert any("test_eq21_jaccard does not check it" in f for f in check_index(copy))


def test_missing_row_is_reported():
    rows = tuple(r for r in EQUATIONS if r.equation != 29)
    findings = check_index(ROOT, rows)
    assert "equation 29 is missing from the index" in findings and any(
        "no row for eq 29" in f for f in findings
    )


def notebook_of(path, *cells):
    "A notebook file with (kind, source) cells."
    made = [{"cell_type": kind, "metadata": {}, "source": source} for kind, source in cells]
    path.write_text(json.dumps({"cells": made}), encoding="utf-8")
    return path


def test_section_with_several_exported_cells(tmp_path):
    """Functions of all exported cells belong to the section, as do lessons below smaller headings."""
    first, second = (f'#| export\ndef {name}(x):\n    "eq 20"\n    return x' for name in ("f", "g"))
    path = notebook_of(
        tmp_path / "many.ipynb",
        ("markdown", "## Two: Eq. (20)\n\n$$x$$"),
        ("code", first),
        ("markdown", "A sentence."),
        ("code", second),
        ("markdown", "### By hand"),
        ("code", "assert g(1) == 1"),
        ("markdown", "## Another"),
        ("code", "assert f(1) == 1"),
    )
    section, other = sections(path)[1:]
    assert set(section.functions) == {"f", "g"} and section.latex
    assert section.lessons == {5: {"g"}}
    assert other.heading == "## Another" and other.lessons == {7: {"f"}}


def test_heading_with_an_equation_opens_a_section_at_any_depth(tmp_path):
    path = notebook_of(tmp_path / "deep.ipynb", ("markdown", "## Outer: Eq. (20)\n### Inner: Eq. (21)"))
    assert [s.equations for s in sections(path)] == [(), (20,), (21,)]


def test_unreadable_notebook_is_an_input_error(tmp_path):
    (tmp_path / "bad.ipynb").write_text("{")
    with pytest.raises(InputError, match="bad.ipynb"):
        sections(tmp_path / "bad.ipynb")
    with pytest.raises(InputError, match="no such section"):
        locate(ROOT, (Row(20, "02_intensity", "gramm", "test_eq20_gram"),))
