"""The site: built without a warning, without dead links, and usable in a browser, on a phone and offline."""

import functools
import html.parser
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGE_BYTES, PICTURE_BYTES, SITE_BYTES = 1_000_000, 1_000_000, 90_000_000
pytest.importorskip("myst_nb", reason="the site's tools are not installed: pip install -e '.[docs]'")
sys.path.insert(0, str(DOCS))
import build  # noqa: E402

CHROMIUM = os.environ.get("SMFNET_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium: run 'make browser', or set SMFNET_CHROMIUM to its path"
)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The pages, built once for all workers, with the experiments as they are stored."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    pages = shared / "site"
    with FileLock(f"{pages}.lock"):
        if not (pages / "search.html").is_file():
            command = [sys.executable, str(DOCS / "build.py"), str(pages), "--runs", str(shared / "none")]
            done = subprocess.run(command, capture_output=True, text=True, cwd=shared)
            assert done.returncode == 0, done.stdout + done.stderr
    return pages


class Page(html.parser.HTMLParser):
    """Anchors and targets of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.names, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names.update(found[k] for k in ("id", "name") if found.get(k))
        self.links.extend(found[k] for k in ("href", "src") if found.get(k))


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, Page]:
    """All pages of the site, read."""
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


def test_every_notebook_and_module_has_a_page(site):
    notebooks = [p for p in build.NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    lacking = [
        p.name
        for p in notebooks
        if p not in build.NO_PAGE and not (site / p.relative_to(ROOT).with_suffix(".html")).is_file()
    ]
    assert len(notebooks) > 100 and not lacking
    assert (site / "api" / "smfnet.network.graph.html").is_file()
    assert (site / "results.html").is_file()


def test_no_link_within_the_site_is_dead(site, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            if target.is_dir():
                target = target / "index.html"
            anchor = urllib.parse.unquote(url.fragment)
            if not target.is_file():
                dead.append(f"{path.relative_to(site)}: {link}")
            elif anchor and target in pages and anchor not in pages[target].names:
                dead.append(f"{path.relative_to(site)}: {link} (no such anchor)")
    assert sum(len(page.links) for page in pages.values()) > 5000
    assert not dead, "\n".join(dead[:30])


def test_links_into_the_repository_lead_to_files_that_are_there(pages):
    import conf

    found, dead = 0, set()
    for page in pages.values():
        for link in page.links:
            for kind in ("blob", "tree"):
                place = f"{conf.SETTINGS['git_url']}/{kind}/{conf.SETTINGS['branch']}/"
                if link.startswith(place):
                    found += 1
                    path = urllib.parse.unquote(link.removeprefix(place).split("#")[0])
                    dead |= {path} if not (ROOT / path).exists() else set()
    assert found > 20 and not dead


def test_pages_are_light(site):
    sizes = {p: p.stat().st_size for p in site.rglob("*") if p.is_file()}
    heavy = [p.name for p, n in sizes.items() if p.suffix == ".html" and n > PAGE_BYTES]
    heavy += [p.name for p, n in sizes.items() if p.suffix in (".png", ".webp", ".svg") and n > PICTURE_BYTES]
    assert not heavy and sum(sizes.values()) < SITE_BYTES


def test_nothing_of_this_machine_is_on_the_pages(site):
    assert not [p.name for p in site.rglob("*.html") if str(ROOT) in p.read_text(encoding="utf-8")]


@pytest.fixture(scope="session")
def address(site):
    """The site, served."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Open a page in a window of a given size and scheme, without any other network."""
    contexts = []

    def go(path: str, size=(1366, 768), scheme="light"):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=size[0] < 500
        )
        contexts.append(context)
        away = lambda route: route.abort()  # noqa: E731
        context.route(lambda url: not url.startswith((address, "data:", "blob:")), away)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{address}/{path}")
        return page

    yield go
    for context in contexts:
        context.close()


@needs_browser
def test_search_finds_graph_reasoning(visit):
    page = visit("search.html?q=graph+reasoning")
    page.wait_for_selector("#search-results ul.search li a")
    titles = page.locator("#search-results ul.search li a").all_inner_texts()
    assert "Graph reasoning" in [t.strip() for t in titles]


@needs_browser
def test_equations_render_without_network(visit):
    page = visit("nbs/01_network/04_graph.html")
    page.wait_for_selector("mjx-container mjx-math")
    assert page.locator("mjx-container").count() > 10
    assert page.locator("mjx-merror").count() == 0
    assert page.evaluate("document.fonts.ready.then(f => [...f].some(x => x.family.startsWith('MJX')))")


@needs_browser
def test_the_swipe_drags(visit):
    page = visit("index.html")
    frame = page.frame_locator("iframe.swipe")
    handle = frame.locator("[role=slider]").first
    handle.wait_for()
    before = handle.get_attribute("aria-valuenow")
    box = handle.bounding_box()
    frame_width = page.locator("iframe.swipe").bounding_box()["width"]
    assert frame.locator(".smf-swipe").first.bounding_box()["width"] > 0.95 * frame_width
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 80, y, steps=8)
    page.mouse.up()
    assert float(handle.get_attribute("aria-valuenow")) > float(before) + 5


@needs_browser
def test_a_picture_zooms(visit):
    page = visit("nbs/01_network/07_decoder.html")
    picture = page.locator(".bd-article .cell_output img").first
    picture.click()
    assert page.locator("dialog.zoom[open] img").get_attribute("src") == picture.evaluate("e => e.src")


@needs_browser
@pytest.mark.parametrize(
    "path",
    [
        "index.html",
        "results.html",
        "nbs/paper.html",
        "nbs/ledger.html",
        "nbs/01_network/04_graph.html",
        "api/smfnet.fusion.files.html",
    ],
)
@pytest.mark.parametrize("size", [(1366, 768), (390, 844)], ids=["laptop", "phone"])
def test_pages_fit_the_screen(visit, path, size):
    page = visit(path, size)
    page.wait_for_load_state("load")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0] + 1


@needs_browser
def test_pages_follow_a_dark_scheme(visit):
    seen = []
    for scheme in ("light", "dark"):
        page = visit("nbs/01_network/04_graph.html", scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.append(sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])))
    assert seen[0] > 600 > 200 > seen[1]


def broken(tmp_path: Path, spoil) -> str:
    """What the build says of a project in which one notebook was spoilt."""
    for name in ("docs", "nbs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    for folder in ("tests", "data", "smfnet", "results"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    spoil(tmp_path / "nbs" / "01_network" / "04_graph.ipynb")
    command = [sys.executable, str(tmp_path / "docs" / "build.py"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "site").exists()
    return done.stderr


def cut(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:-100], encoding="utf-8")


def fail(path: Path) -> None:
    nb = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in nb["cells"] if c["cell_type"] == "code")
    cell["outputs"] = [{"output_type": "error", "ename": "ValueError", "evalue": "x", "traceback": []}]
    path.write_text(json.dumps(nb), encoding="utf-8")


def mislead(path: Path) -> None:
    nb = json.loads(path.read_text(encoding="utf-8"))
    nb["cells"][0]["source"] += ["\n[gone](no_such_notebook.ipynb)"]
    path.write_text(json.dumps(nb), encoding="utf-8")


@pytest.mark.parametrize(
    "spoil, says", [(cut, "not a notebook"), (fail, "ValueError"), (mislead, "no_such_notebook.ipynb")]
)
def test_a_broken_notebook_is_named(tmp_path, spoil, says):
    said = broken(tmp_path, spoil)
    assert "04_graph.ipynb" in said and says in said and "Traceback" not in said


def test_readme_shows_the_kept_results():
    import results

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split(results.MARKS[0])[1].split(results.MARKS[1])[0].strip()
    assert between == results.short_table().replace("](../", "]("), (
        "run: python docs/results.py readme && make export"
    )


@pytest.mark.parametrize(
    "schema, pattern",
    [
        ("vendor.github-workflows", "workflows/*.yml"),
        ("vendor.github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", "ISSUE_TEMPLATE/config.yml"),
        ("vendor.citation-file-format", "../CITATION.cff"),
    ],
)
def test_files_for_the_forge_are_valid(schema, pattern):
    files = sorted(map(str, (ROOT / ".github").glob(pattern)))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
