"""The package has rooms in one order: folders, modules, imports, front doors and tests follow it."""

import importlib
import json
import re
import subprocess
import sys
import time

import pytest
from rooms import (
    BESIDE,
    FREE,
    NBS,
    ROOMS,
    ROOT,
    cells,
    every_notebook,
    front_names,
    imported,
    module_of,
    module_of_path,
    rooms_used,
)

TOP = front_names(ROOT / "smfnet" / "__init__.py")
LIMIT = 0.2  # seconds that `import smfnet` may take, beyond starting Python


def short(path):
    """Test name of a file."""
    return path.relative_to(ROOT).as_posix()


def room_folder(notebook) -> str | None:
    """The room whose folder holds a notebook; None for those above all rooms."""
    parts = notebook.relative_to(NBS).parts
    return re.sub(r"^\d+_", "", parts[0]) if len(parts) > 1 and parts[0] not in FREE else None


INSIDE = [n for n in every_notebook() if room_folder(n)]


def test_folders_are_numbered_in_the_order_of_the_rooms():
    """nbs/ and smfnet/ hold the rooms of the list and no others; the folders' numbers count them."""
    found = {n.relative_to(NBS).parts[0] for n in INSIDE}
    assert sorted(found) == [f"{i:02d}_{room}" for i, room in enumerate(ROOMS)]
    assert {p.parent.name for p in (ROOT / "smfnet").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("notebook", every_notebook(), ids=short)
def test_module_path_is_notebook_path(notebook):
    """Whoever knows a module's name knows where its notebook is. Other notebooks export nothing."""
    path, module = notebook.relative_to(NBS), module_of(notebook)
    if module is None:
        code = [c["source"] for c in cells(notebook)]
        assert not any(re.search(r"^#\|\s*export", source, re.M) for source in code), "exports to no module"
        return
    assert path.parts[0] not in FREE and module == module_of_path(path.as_posix())


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("01_network/04_graph.ipynb", "smfnet.network.graph"),
        ("01_network/00_network.ipynb", "smfnet.network.__init__"),
        ("03_data/scenes/02_street.ipynb", "smfnet.data.scenes.street"),
        ("03_data/08_scenes/08_scenes.ipynb", "smfnet.data.scenes.__init__"),
        ("smfnet.ipynb", "smfnet.__init__"),
        ("cli.ipynb", "smfnet.cli"),
    ],
)
def test_rule_of_module_paths(path, module):
    """The rule itself, on one example of each kind."""
    assert module_of_path(path) == module


@pytest.mark.parametrize("notebook", INSIDE, ids=short)
def test_notebook_imports_only_from_rooms_before_it(notebook):
    """All cells, lessons too, lean on their room and those before it: `network` knows nothing of `fast`."""
    room = room_folder(notebook)
    package = (module_of(notebook) or f"smfnet.{room}.lesson").rpartition(".")[0]
    used = set().union(*(rooms_used(cell["source"], package, TOP) for cell in cells(notebook)))
    later = sorted(used - set(ROOMS[: ROOMS.index(room) + 1]))
    assert not later, f"{room} comes before {', '.join(later)} in the list of rooms and must not import it"


def test_imports_are_seen_in_all_their_forms():
    """Absolute and relative imports, and names that the front door of the package takes from a room."""
    code = "%time 1\nimport smfnet.core.checks\nfrom smfnet.data import x\n"
    code += "from smfnet import network, fuse_pair, cli"
    assert set(imported(code)) == {
        "smfnet.core.checks",
        "smfnet.data.x",
        "smfnet.network",
        "smfnet.fuse_pair",
        "smfnet.cli",
    }
    assert rooms_used(code, "smfnet", TOP) == {"core", "data", "network", "fusion"}
    relative = "from . import graph\nfrom .graph import x\nfrom ..core.checks import y\nfrom .. import fast"
    assert rooms_used(relative, "smfnet.network", TOP) == {"network", "core", "fast"}


@pytest.mark.parametrize("room", ROOMS)
def test_front_door_opens(room):
    """Every room shows some names; all of them exist, and each comes from the room or one before it."""
    module = importlib.import_module(f"smfnet.{room}")
    assert module.__all__ and len(set(module.__all__)) == len(module.__all__) and module.__doc__
    for name in module.__all__:
        found = getattr(module, name)
        home = getattr(found, "__module__", "") or ""
        if home.startswith("smfnet."):
            assert ROOMS.index(home.split(".")[1]) <= ROOMS.index(room), f"{name} is defined in {home}"
    with pytest.raises(AttributeError):
        _ = module.no_such_name
    assert set(module.__all__) <= set(dir(module))


def test_package_front_door_opens():
    """The names of README and docs are there, and each room before which they stand has the same object."""
    import smfnet

    assert {"SMFNet", "fuse_pair", "evaluate_folder", "get_pairs"} <= set(smfnet.__all__) == set(TOP)
    for name, where in TOP.items():
        assert where.split(".")[0] in ROOMS
        assert getattr(smfnet, name) is getattr(importlib.import_module(f"smfnet.{where}"), name)


def test_one_folder_of_tests_for_each_room():
    """tests/ has a folder for each room, and those that look at the project as a whole."""
    found = {p.name for p in (ROOT / "tests").iterdir() if any(p.glob("test_*.py"))}
    assert found == {*ROOMS, *BESIDE}
    assert not list((ROOT / "tests").glob("test_*.py")), "a test belongs to a room"


def seconds(code: str) -> float:
    """What a fresh interpreter takes for a line of code, on the wall clock."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
    return time.perf_counter() - start


def test_importing_the_package_takes_no_time():
    """The increase over a bare interpreter; the least of several runs, since a busy machine only adds."""
    bare, loaded = [], []
    for _ in range(7):
        bare.append(seconds("pass"))
        loaded.append(seconds("import smfnet"))
    assert min(loaded) - min(bare) < LIMIT


def test_importing_the_package_imports_no_library():
    """Neither NumPy nor PyTorch nor any room's module comes along before a name is asked for."""
    code = "import smfnet, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert not loaded & {"numpy", "torch", "pandas", "scipy", "matplotlib", "PIL"}
    assert {name for name in loaded if name.startswith("smfnet.")} <= {
        "smfnet.core",
        "smfnet.core.front_door",
    }


def test_files_of_tests_have_names_of_their_own():
    """pytest imports test files by their base name: two of one name cannot be collected together."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def links(text: str) -> list[str]:
    """Relative targets of the links and pictures in a piece of markdown."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def test_links_are_found():
    """Anchors are cut off, addresses left out."""
    text = "[a](b.ipynb) [c](../d/e.ipynb#part) ![f](https://g.h/i.png) [j](#k)"
    assert links(text) == ["b.ipynb", "../d/e.ipynb"]


@pytest.mark.parametrize("notebook", every_notebook(), ids=short)
def test_links_between_notebooks_resolve(notebook):
    """Every relative link leads to a file."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in found if c["cell_type"] == "markdown")
    broken = [target for target in links(text) if not (notebook.parent / target).exists()]
    assert not broken
