"""The rooms of the package in the order in which they build on each other, and the rule of module paths."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"

# Written down once. A room imports only from rooms before it, and from itself.
ROOMS = (
    "core",
    "network",
    "losses",
    "data",
    "fast",
    "training",
    "fusion",
    "metrics",
    "tasks",
    "report",
    "compare",
)
FREE = ("tutorials", "experiments", "apps")  # folders of notebooks that use the package and export nothing
BESIDE = ("project", "experiments")  # test folders that belong to no room


def cells(notebook: Path) -> list[dict]:
    """Code cells of a notebook, `source` joined."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in found if c["cell_type"] == "code"]


def python(source: str) -> str:
    """A cell's source without the lines that only Jupyter understands."""
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


def every_notebook() -> list[Path]:
    """All notebooks below nbs/ that are not hidden."""

    def hidden(path: Path) -> bool:
        return any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)

    return sorted(p for p in NBS.rglob("*.ipynb") if not hidden(p))


def module_of(notebook: Path) -> str | None:
    """Dotted name of the module that a notebook exports, `__init__` included, if it exports any."""
    for cell in cells(notebook):
        if found := re.search(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.M):
            return f"smfnet.{found[1]}"
    return None


def module_of_path(notebook: str) -> str:
    """Module that belongs to a path below nbs/: numbers go, and a folder's namesake is its `__init__`."""
    parts = ["smfnet", *(re.sub(r"^\d+_", "", part) for part in Path(notebook).with_suffix("").parts)]
    if parts[-1] == parts[-2]:
        parts[-1] = "__init__"
    return ".".join(parts)


def room_of(module: str) -> str | None:
    """The room of a dotted name such as smfnet.network.graph; None above all rooms (smfnet.cli)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "smfnet" and parts[1] in ROOMS else None


def front_names(init: Path) -> dict[str, str]:
    """Public name -> module of a front door that calls `front_door`; empty for one that imports its names."""
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "front_door":
            return ast.literal_eval(node.args[1])
    return {}


def imported(source: str, package: str = "smfnet") -> Iterator[str]:
    """Dotted names below smfnet that a piece of code imports; relative ones are read as within `package`."""
    for node in ast.walk(ast.parse(python(source))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            base = ".".join(p for p in (base, node.module) if p)
            names = [f"{base}.{a.name}" for a in node.names]
        yield from (name for name in names if name.startswith("smfnet."))


def rooms_used(source: str, package: str, top: dict[str, str]) -> set[str]:
    """Rooms that a piece of code imports from; `top` tells where the names of `smfnet` itself come from."""
    used = set()
    for name in imported(source, package):
        first = name.split(".")[1]
        if room := room_of(name) or room_of(f"smfnet.{top.get(first, '')}"):
            used.add(room)
    return used
