"""The house style in numbers, for all notebooks together; each fault that is counted is also planted once."""

import json

import pytest
import style


def test_house_style(record_property):
    """Exported cells are short, lines fit the page, and every lesson has a sentence before it."""
    for room, paths in style.rooms().items():
        record_property("measures", f"{room:<12} {style.measure_all(paths).text()}")
    whole = style.measure_all([p for paths in style.rooms().values() for p in paths])
    record_property("measures", f"{'all':<12} {whole.text()}")
    assert len(whole.exported) > 500, "cells that nobody finds have no faults"
    faults = whole.faults()
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults)


def test_the_numbers_are_those_of_the_house():
    """A limit is not raised in passing."""
    assert (style.MEDIAN, style.P90, style.MOST, style.WIDTH) == (12, 25, 45, 110)


def planted(tmp_path, *cells: str) -> style.Measures:
    """What is counted in a notebook of these cells; one that begins with > is a sentence."""
    nb = tmp_path / "planted.ipynb"
    kinds = [
        {"cell_type": "markdown" if c.startswith(">") else "code", "source": [c.lstrip(">")]} for c in cells
    ]
    nb.write_text(json.dumps({"cells": kinds}), encoding="utf-8")
    return style.measure_all([nb])


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("lesson without a sentence", ["1 + 1"]),
        ("lesson without a sentence", [">Two sums.", "1 + 1", "2 + 2"]),
        ("lesson without a sentence", [">A sum.", "#| export\nx = 1", "1 + x"]),
        ("lesson without a sentence", ["#| slow\n1 + 1"]),
        ("long line", [">A sum.", f"x = 1  # {'x' * 110}"]),
        ("compound statement", ["#| export\nx = 1; y = 2"]),
        ("compound statement", ["#| export\nif x: raise ValueError"]),
        ("compound statement", ["#| export\ntry: f()\nexcept OSError: pass\nelse: raise ValueError"]),
        ("compound statement", ["#| export\nif (x and\n    y): raise ValueError"]),
        ("nested conditional", ["#| export\nx = 1 if a else 2 if b else 3"]),
        ("nested conditional", ["#| export\nx = (1 if a else 2) if b else 3"]),
        ("nested conditional", ["#| export\nx = f'{1 if a else 2 if b else 3}'"]),
        ("nested conditional", ["#| export\nx = '' if a else f'{1 if b else 3}'"]),
        ("nested conditional", ["#| export\nx = [1 if b else 3 for b in c] if a else []"]),
        ("nested conditional", ["#| export\nx = 'x' + ('a' if b else 'c') if a else ''"]),
        ("long cell", ["#| export\n" + "x = 1\n" * 46] + ["#| export\nx = 1"] * 12),
        ("median of the exported cells", ["#| export\n" + "x = 1\n" * 13] * 3),
        ("p90 of the exported cells", ["#| export\nx = 1"] * 8 + ["#| export\n" + "x = 1\n" * 26] * 2),
    ],
)
def test_a_planted_fault_is_found(tmp_path, kind, cells):
    """Each kind of fault, alone in a notebook, is found once and named."""
    faults = planted(tmp_path, *cells).faults()
    assert [fault.partition(":")[0] for fault in faults if fault.startswith(kind)] == [kind], faults


@pytest.mark.parametrize(
    "cells",
    [
        [">A sum.", "1 + 1"],
        ["import math", "#| hide\nx = 1", "#| default_exp here", "#| export\nif x: y = 1"],
        ["#| export\nx = f(1 if a else 2) if b else 3", "#| export\nx, y = 1 if a else 2, 3 if b else 4"],
        ["#| export\nif x:\n    raise ValueError", "#| exporti\ns = 'a; b: raise c'"],
        [">A picture.", "plot(x);", f">{'x' * 200}"],
        ["#| export\n" + "x = 1\n\n# more\n" * 6],
    ],
)
def test_good_style_has_no_faults(tmp_path, cells):
    """What the house allows is not counted."""
    assert planted(tmp_path, *cells).faults() == []


def test_command_line_names_faults(tmp_path, monkeypatch, capsys):
    """`python style.py ROOM -v` prints a line for each room and every fault."""
    (tmp_path / "05_room").mkdir()
    planted(tmp_path / "05_room", "1 + 1")
    monkeypatch.setattr(style, "NBS", tmp_path)
    style.main(["05_room", "-v"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("05_room") and shown[1].startswith("all")
    assert shown[2].startswith("lesson without a sentence: 05_room/planted.ipynb cell 0")
