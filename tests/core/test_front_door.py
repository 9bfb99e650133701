"""Front doors: names are loaded when they are used, once, and Python's own errors stay what they are."""

import importlib
import sys
from pathlib import Path

import pytest

DOOR = """from smfnet.core.front_door import front_door
__getattr__, __dir__, __all__ = front_door(__name__, {"value": "inner", "gone": "inner", "lost": "nowhere"})
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch):
    """A package `doorway` with a front door, whose module `inner` counts how often it is imported."""
    (tmp_path / "doorway").mkdir()
    (tmp_path / "doorway/__init__.py").write_text(DOOR)
    (tmp_path / "doorway/inner.py").write_text("import sys\nsys.doorway_loads += 1\nvalue = [1]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "doorway_loads", 0, raising=False)
    yield importlib.import_module("doorway")
    for name in [n for n in sys.modules if n.split(".")[0] == "doorway"]:
        del sys.modules[name]


def test_nothing_is_imported_before_a_name_is_used(package):
    """The module behind a name is imported on first use; afterwards the name is an ordinary attribute."""
    assert sys.doorway_loads == 0 and "value" not in vars(package)
    first = package.value
    assert first is package.value is vars(package)["value"] and sys.doorway_loads == 1


def test_unknown_names_are_python_errors(package):
    """`hasattr` works, `from … import …` says ImportError, and the message names package and attribute."""
    assert not hasattr(package, "other")
    with pytest.raises(AttributeError, match="module 'doorway' has no attribute 'other'"):
        _ = package.other
    with pytest.raises(ImportError, match="other"):
        exec("from doorway import other", {})


def test_a_promise_that_no_module_meets_is_an_error(package):
    """A name that its module lacks, or a module that is not there: the error names what is missing."""
    with pytest.raises(AttributeError, match="gone"):
        _ = package.gone
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        _ = package.lost


def test_names_are_listed(package):
    """`dir` and `__all__` know the names before they are loaded, so that completion works."""
    assert dir(package) == sorted(package.__all__) == ["gone", "lost", "value"]
