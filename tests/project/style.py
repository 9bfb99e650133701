"""What the house style measures: lengths of cells and lines, nested conditionals, unexplained lessons.

python tests/project/style.py                 # a line for each room, then for the whole house
python tests/project/style.py 02_losses -v    # one room, with every fault
"""

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
WIDTH = 110  # characters in a line of code
MEDIAN, P90, MOST = 12, 25, 45  # lines of an exported cell
HIDDEN = re.compile(r"^#\|\s*(export|exporti|exports|hide|default_exp|echo: false)\b", re.M)  # no lesson cell


@dataclass
class Measures:
    """What was counted in some notebooks."""

    exported: list[int] = field(default_factory=list)  # lines of each exported cell
    long_cells: list[str] = field(default_factory=list)
    long_lines: list[str] = field(default_factory=list)
    compound: list[str] = field(default_factory=list)  # a raise behind a colon, a semicolon
    nested: list[str] = field(default_factory=list)  # conditional expressions inside one another
    unexplained: list[str] = field(default_factory=list)  # lesson cells without a sentence before them

    @property
    def median(self) -> float:
        """Median length of an exported cell."""
        return statistics.median(self.exported) if self.exported else 0

    @property
    def p90(self) -> float:
        """Nine of ten exported cells are not longer."""
        if len(self.exported) < 2:
            return self.median
        return statistics.quantiles(self.exported, n=10, method="inclusive")[-1]

    def faults(self) -> list[str]:
        """Everything that the house does not allow, each with its place."""
        found = []
        if self.median > MEDIAN:
            found.append(f"median of the exported cells: {self.median:g} lines, at most {MEDIAN}")
        if self.p90 > P90:
            found.append(f"p90 of the exported cells: {self.p90:g} lines, at most {P90}")
        parts = {
            "long cell": self.long_cells,
            "long line": self.long_lines,
            "compound statement": self.compound,
            "nested conditional": self.nested,
            "lesson without a sentence": self.unexplained,
        }
        return found + [f"{name}: {place}" for name, places in parts.items() for place in places]

    def text(self) -> str:
        """One line for people."""
        return (
            f"{len(self.exported)} exported cells: median {self.median:g}, p90 {self.p90:g}, "
            f"max {max(self.exported, default=0)} lines ({len(self.long_cells)} above {MOST}); "
            f"lines over {WIDTH}: {len(self.long_lines)}; compound statements: {len(self.compound)}; "
            f"nested conditionals: {len(self.nested)}; "
            f"lesson cells without a sentence: {len(self.unexplained)}"
        )


def is_export(source: str) -> bool:
    """Whether nbdev writes a cell into the package."""
    return any(line.startswith(("#| export", "#|export")) for line in source.splitlines())


def python(source: str) -> str:
    """A cell's source without the lines that only Jupyter understands."""
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


def is_imports(tree: ast.Module) -> bool:
    """Whether a cell only imports."""
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)


# What a conditional may stand in and still belong to the expression that the reader is in the middle of.
_THROUGH = (
    *(ast.JoinedStr, ast.FormattedValue),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    *(ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Starred),
)


def _inner(node: ast.AST) -> Iterator[ast.IfExp]:
    """Conditionals in the parts of an expression, through f-strings, comprehensions and operators."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.IfExp):
            yield part
        elif isinstance(part, _THROUGH):
            yield from _inner(part)


def nested_conditionals(tree: ast.AST) -> Iterator[int]:
    """Lines of conditional expressions that hold another one, unless that one is an argument of a call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and any(_inner(node)):
            yield node.lineno


def compound_statements(tree: ast.AST, source: str) -> Iterator[int]:
    """Lines with a statement after a semicolon, or a `raise` behind a colon."""
    lines = source.splitlines()
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield from (b.lineno for a, b in zip(block, block[1:]) if a.end_lineno == b.lineno)
        before = lines[node.lineno - 1].encode()[: node.col_offset] if isinstance(node, ast.Raise) else b""
        if before.rstrip().endswith(b":"):
            yield node.lineno


def measure(notebook: Path, into: Measures) -> None:
    """Count one notebook."""
    name = notebook.relative_to(NBS).as_posix() if notebook.is_relative_to(NBS) else notebook.name
    explained = False
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            explained = cell["cell_type"] == "markdown"
            continue
        tree, where = ast.parse(python(source)), f"{name} cell {number}"
        lines = [line for line in source.splitlines() if line.strip()]
        into.long_lines += [f"{where}: {line[:60]}… ({len(line)})" for line in lines if len(line) > WIDTH]
        into.compound += [f"{where} line {n}" for n in compound_statements(tree, source)]
        into.nested += [f"{where} line {n}" for n in nested_conditionals(tree)]
        if is_export(source) and not is_imports(tree):
            length = len([line for line in lines if not line.startswith("#|")])
            into.exported.append(length)
            into.long_cells += [f"{where}: {length} lines"] * (length > MOST)
        lesson = not HIDDEN.search(source) and not is_imports(tree)
        into.unexplained += [f"{where}: {lines[0][:60]}"] * (lesson and not explained)
        explained = False


def rooms() -> dict[str, list[Path]]:
    """Notebooks by folder; those beside the folders under 'top'."""
    found: dict[str, list[Path]] = {}
    for path in sorted(NBS.rglob("*.ipynb")):
        parts = path.relative_to(NBS).parts
        if not any(part.startswith((".", "_")) for part in parts):
            found.setdefault(parts[0] if len(parts) > 1 else "top", []).append(path)
    return found


def measure_all(paths: list[Path]) -> Measures:
    """Count many notebooks."""
    into = Measures()
    for path in paths:
        measure(path, into)
    return into


def main(argv: list[str]) -> None:
    """Print the measures of some rooms or all, and with -v every fault."""
    asked = [a for a in argv if a != "-v"]
    chosen = {room: paths for room, paths in rooms().items() if not asked or room in asked}
    for room, paths in chosen.items():
        print(f"{room:<12} {measure_all(paths).text()}")
    whole = measure_all([p for paths in chosen.values() for p in paths])
    print(f"{'all':<12} {whole.text()}")
    if "-v" in argv:
        print(*whole.faults(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
