"""`make app` as a stranger sees it: no page without the token or under a foreign name, no lasting kernel."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("voila")
ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--MappingKernelManager.cull_idle_timeout=2", "--MappingKernelManager.cull_interval=1")


def wait(condition, seconds=60):
    """The first true answer of a condition, or its last answer when time is up."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


class Server:
    """The app's server over a folder of its own, on a free port; its log gives the address."""

    def __init__(self, place: Path, *options: str):
        for name in ("serve.py", "voila.json"):
            shutil.copy(ROOT / "nbs/apps" / name, place)
        shutil.copytree(ROOT / "nbs/apps/template", place / "template")
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('hello')")])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, place / "page.ipynb")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = place / "log"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
        home = {"HOME": str(place), "JUPYTER_CONFIG_DIR": str(place), "JUPYTER_RUNTIME_DIR": str(place)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, place / "serve.py", f"--port={self.port}", *options],
                cwd=place,
                env={**clean, **home},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert wait(lambda: f":{self.port}/" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        self.token = re.search(r"\?token=(\w+)", self.log.read_text())[1]

    def ask(self, path: str, *, host: str = "", token: bool = False) -> tuple[int, str]:
        """Status and body of a request."""
        address = f"{path}?{urllib.parse.urlencode({'token': self.token})}" if token else path
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as c:
            c.request("GET", address, headers={"Host": host} if host else {})
            answer = c.getresponse()
            return answer.status, answer.read().decode()

    def end(self) -> None:
        """Stop it with its kernels."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def kernels(self) -> int:
        """Connection files, one a kernel that lives."""
        place = re.search(r"Storing connection files in (\S+)\.\n", self.log.read_text())[1]
        return len(list(Path(place).glob("kernel-*.json")))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server whose kernels end after two idle seconds."""
    running = Server(tmp_path_factory.mktemp("app"), "--no-browser", *QUICK)
    yield running
    running.end()


PAGES = ("/", "/voila/tree", "/voila/render/page.ipynb", "/voila/api/contents")


@pytest.mark.parametrize("page", PAGES)
def test_pages_need_the_token(server, page):
    """Without it: the page that asks for it, or a refusal. A wrong token is none. No kernel is started."""
    for path in (page, f"{page}?token=wrong"):
        status, text = server.ask(path)
        assert status in (302, 403) and "hello" not in text
    assert server.kernels() == 0
    assert server.ask("/login")[0] == 200


@pytest.mark.parametrize("page", (*PAGES, "/login"))
def test_foreign_names_are_refused(server, page):
    """A page of another site whose name leads here (DNS rebinding) gets nothing, whatever it brings."""
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "10.0.0.1"):
        assert server.ask(page, host=host, token=True)[0] == 403
    assert server.kernels() == 0


def test_whoever_has_the_token_is_served_and_kernels_end(server):
    """Under both names of this machine; the kernels of pages that nobody uses are gone after a while."""
    for host in (f"localhost:{server.port}", f"127.0.0.1:{server.port}"):
        assert server.ask("/", host=host, token=True)[0] == 200
        status, text = server.ask("/voila/render/page.ipynb", host=host, token=True)
        assert status == 200 and "hello" in text
    assert server.kernels() > 0
    assert wait(lambda: server.kernels() == 0) and "seconds of inactivity" in server.log.read_text()


def test_the_browser_gets_the_token_by_a_private_file(tmp_path):
    """It is told a file; the token is in the file, which only its owner can read, and not in the argument."""
    browser = tmp_path / "browser"
    copy = f"cp \"${{1#file://}}\" '{tmp_path}/seen.html'"
    browser.write_text(f"#!/bin/sh\n{copy}; echo \"$1\" > '{tmp_path}/told'\n")
    browser.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER", str(browser))
        running = Server(tmp_path)
    try:
        assert wait(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text())
        told, seen = (tmp_path / "told").read_text().strip(), (tmp_path / "seen.html").read_text()
        assert running.token not in told and f"127.0.0.1:{running.port}/?token={running.token}" in seen
        assert Path(told.removeprefix("file://")).parent.stat().st_mode & 0o077 == 0
    finally:
        running.end()
    assert not Path(told.removeprefix("file://")).exists()


def test_settings_of_the_app():
    """What a reader of `make help` relies on: this machine only, half an hour, connected pages included."""
    settings = json.loads((ROOT / "nbs/apps/voila.json").read_text())
    assert settings["Voila"]["ip"] == "127.0.0.1" and settings["Voila"]["auto_token"] is True
    assert settings["MappingKernelManager"]["cull_idle_timeout"] <= 3600
    assert settings["MappingKernelManager"]["cull_connected"] is True
