"""What all tests share: the root of the project, quiet threads, and the count that ends a run."""

import os
import sys
from pathlib import Path

# Before anything imports torch: workers of pytest-xdist share the processors, so each keeps to one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs/experiments"))  # helpers of the Snakefile, no part of the package


def pytest_addoption(parser):
    """Add the option that also runs flagged notebook cells."""
    parser.addoption(
        "--notebook-flags", default="", help="run notebook cells with these flags too, e.g. 'slow cuda'"
    )


@pytest.fixture(scope="session")
def root() -> Path:
    """Top of the repository."""
    return ROOT


def pytest_terminal_summary(terminalreporter):
    """Show what tests handed over by `record_property("measures", text)`, whether they passed or not."""
    reports = [
        r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", "") == "call"
    ]
    lines = [value for r in reports for name, value in r.user_properties if name == "measures"]
    if lines:
        terminalreporter.section("measures")
        terminalreporter.write("".join(f"{line}\n" for line in lines))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Write `N passed, N failed[, N skipped]` where `make test` finds it; a notebook counts as a test."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput") or reporter is None:
        return
    number = {key: len(found) for key, found in reporter.stats.items()}
    passed = number.get("passed", 0) + number.get("xpassed", 0)
    failed = number.get("failed", 0) + number.get("error", 0)
    skipped = number.get("skipped", 0) + number.get("xfailed", 0)
    text = f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else "")
    (ROOT / ".last-test-count").write_text(text + "\n", encoding="utf-8")
