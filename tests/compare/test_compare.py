"""The widgets without a browser: what they are told, what they send, what they say about bad input."""

import base64
import importlib
import io
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smfnet.compare import (
    Browser,
    Explorer,
    LinkedZoom,
    Swipe,
    browse,
    explore,
    explore_metrics,
    open_collection,
    upload,
)
from smfnet.compare.collection import LIVE_PIXELS, Collection, live_limit, live_models, ranks
from smfnet.compare.panel import Panel, watch
from smfnet.compare.swipe import SWIPE_JS
from smfnet.compare.uploads import DOWNLOAD_JS, MOST, PICK_JS, PIECE, FilePick, _InMemory, read_upload
from smfnet.compare.zoom import ZOOM_JS, crop_of
from smfnet.core.checks import InputError
from smfnet.data.pairs import PairSet
from smfnet.data.registry import registry
from smfnet.data.scenes import render_scene
from smfnet.metrics.protocols import METRICS
from smfnet.network.model import SMFNet

ROOT = Path(__file__).resolve().parents[2]
SCENE = render_scene(267, size=(96, 128))


def encoded(image, kind="PNG", **options) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def decoded(png: bytes) -> np.ndarray:
    """A file as an image."""
    return np.asarray(Image.open(io.BytesIO(png)))


def send(panel, side: str, name: str, data: bytes) -> None:
    """What a browser sends for one file."""
    count = max(1, -(-len(data) // PIECE))
    for i in range(count):
        panel.picks[side].receive(
            {"name": name, "size": len(data), "index": i, "count": count},
            [memoryview(data[i * PIECE : (i + 1) * PIECE])],
        )


# --- fixed range --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [0.1, 0.5, 1.0])
def test_no_picture_is_stretched(top):
    """The grey level of a value does not depend on what else is in the picture, in every view."""
    image = np.linspace(0, top, 64 * 48).reshape(48, 64)
    expected = np.rint(image * 255).astype(np.uint8)
    assert (decoded(Swipe(image, image).left) == expected).all()
    assert (decoded(LinkedZoom({"a": image}).images[0]) == expected).all()


def test_a_pair_of_1280x1024_is_sent_at_full_size():
    """Such a pair is not made smaller, and nothing is sent while nothing changes."""
    rng = np.random.default_rng(0)
    swipe = Swipe(*(rng.integers(0, 256, (1024, 1280), dtype=np.uint8) for _ in range(2)))
    assert decoded(swipe.left).shape == (1024, 1280) and not swipe.note
    sent = []
    swipe.comm.send = lambda *args, **kwargs: sent.append(kwargs)
    swipe.position = 0.25
    assert len(sent) == 1 and set(sent[0]["data"]["state"]) == {"position"}  # a few bytes, no image


def test_huge_images_are_made_smaller_with_a_note():
    """A view says what it did to an image beyond the limit."""
    wide = np.zeros((1000, 5000), np.uint8)
    assert (
        "made smaller from 5000×1000" in Swipe(wide, wide).note
        and "made smaller from 5000×1000" in LinkedZoom({"a": wide}).note
    )


# --- the browser's side -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", [SWIPE_JS, ZOOM_JS, PICK_JS, DOWNLOAD_JS], ids=["swipe", "zoom", "pick", "download"]
)
def test_scripts_need_no_network_and_write_no_html(code):
    """The widgets load nothing from elsewhere, and text from users never becomes HTML."""
    assert (
        "http" not in code
        and "import " not in code
        and "innerHTML" not in code
        and "insertAdjacentHTML" not in code
    )
    assert "export default {render};" in code


def test_everything_shown_has_a_static_picture():
    """What a notebook stores holds the live view and a PNG."""
    for widget in (
        Swipe(SCENE.ir, SCENE.vis),
        LinkedZoom({"a": SCENE.ir}),
        browse(weights=None),
        explore_metrics(weights=None),
        explore(),
        upload(weights=None),
    ):
        bundle = widget._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert "application/vnd.jupyter.widget-view+json" in data
        assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width > 100


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs" / "apps").glob("*.ipynb")), ids=lambda p: p.stem)
def test_app_notebooks_tell_their_story_without_a_kernel(notebook):
    """They are stored with pictures, without live views, errors or numbers of execution."""
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    outputs = [o for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert [list(o["data"]) for o in outputs] == [["image/png"]]
    assert "widgets" not in nb["metadata"] and "traceback" not in notebook.read_text(encoding="utf-8")


def test_pages_are_served_on_the_loopback_interface():
    """`make app` binds to this machine only, and hides the cell that only nbdev reads."""
    recipe = re.search(r"^app:.*\n\t(.+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    assert "nbs/apps/serve.py" in recipe
    settings = json.loads((ROOT / "nbs/apps/voila.json").read_text(encoding="utf-8"))
    assert settings["Voila"]["ip"] == "127.0.0.1"
    assert settings["TagRemovePreprocessor"]["remove_cell_tags"] == ["remove-cell"]
    for notebook in (ROOT / "nbs" / "apps").glob("*.ipynb"):
        assert json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["metadata"]["tags"] == [
            "remove-cell"
        ]


def test_the_wheel_alone_brings_the_widgets():
    """What the modules import is required by the package itself, not by an extra."""
    if sys.version_info < (3, 11):
        pytest.skip("reads pyproject.toml with tomllib, of Python 3.11")
    import tomllib

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {"ipywidgets", "anywidget"} <= {re.match(r"[\w-]+", d)[0] for d in needed}


# --- properties ---------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    zoom=st.floats(-5, 100),
    x=st.floats(-2, 3),
    y=st.floats(-2, 3),
    h=st.integers(1, 3000),
    w=st.integers(1, 3000),
)
def test_a_crop_lies_inside(zoom, x, y, h, w):
    """Whatever view a browser sends, the crop is a part of the image."""
    top, left, rows, columns = crop_of({"zoom": zoom, "x": x, "y": y}, (h, w))
    assert rows >= 1 and columns >= 1 and top >= 0 and left >= 0 and top + rows <= h and left + columns <= w


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6))
def test_ranks_follow_the_values(values):
    """The best is never below the second best, and everybody else is below both."""
    scores = {f"m{i}": {"EN": v} for i, v in enumerate(values)}
    by = {
        r: [values[int(m[1:])] for m, marks in ranks(scores).items() if marks["EN"] == r] for r in (0, 1, 2)
    }
    assert (
        by[1]
        and all(a >= b - 0.01 for a in by[1] for b in by[2] + by[0])
        and all(a >= b - 0.01 for a in by[2] for b in by[0])
    )


@settings(max_examples=50, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_pieces_make_the_file(data, cuts):
    """However a file is cut, it arrives as it was."""
    got, edges = [], sorted({0, len(data), *(c for c in cuts if c < len(data))})
    pick = FilePick("x", lambda name, content: got.append(content), lambda *a: got.append(None))
    for i, (a, b) in enumerate(zip(edges, edges[1:])):
        pick.receive(
            {"name": "f", "size": len(data), "index": i, "count": len(edges) - 1}, [memoryview(data[a:b])]
        )
    assert got == [data]


# --- bad input ----------------------------------------------------------------------------------------------

GOOD = ("street.png", encoded(SCENE.vis))
MULTI = encoded(Image.fromarray(SCENE.ir), "TIFF", save_all=True, append_images=[Image.fromarray(SCENE.ir)])


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("notes.pdf", b"%PDF-1.7", "notes.pdf: not a readable image"),
        ("empty.png", b"", "empty.png: not a readable image"),
        ("half.png", encoded(SCENE.ir)[:2000], "half.png: damaged or truncated"),
        ("small.png", encoded(SCENE.ir[:50]), "differ in size"),
        ("dot.png", encoded(SCENE.ir[:3, :3]), "differ in size"),
        (
            "flat.png",
            encoded(np.full_like(SCENE.ir, 7)),
            "flat.png: every pixel of this infrared image has the same value",
        ),
        ("pages.tif", MULTI, "pages.tif: holds 2 pages"),
        ("../../etc/x.png", b"no image", "x.png: not a readable image"),
        ("..\\..\\x.png", b"no image", "x.png: not a readable image"),
        (".png", b"no image", "png: not a readable image"),
        ("n" * 4000 + ".png", b"no image", "n.png: not a readable image"),
        ("<img src=x onerror=alert(1)>.png", b"no image", ">.png: not a readable image"),
    ],
)
def test_bad_uploads_become_sentences(name, data, says):
    """Every bad file is named, the panel lives on, and a good file works afterwards."""
    panel = upload(weights=None)
    send(panel, "vis", *GOOD)
    send(panel, "ir", name, data)
    assert panel.message.error and says in panel.message.text
    assert (
        tempfile.gettempdir() not in panel.message.text
        and "<img" not in panel.message.value
        and "Traceback" not in panel.message.value
    )
    send(panel, "ir", "hot.png", encoded(SCENE.ir))
    assert not panel.message.error and panel.zoom.titles == ["infrared", "visible", "average"]


@pytest.mark.parametrize(
    "image",
    [
        SCENE.ir.astype(np.uint16) * 200,
        Image.fromarray(SCENE.ir).convert("RGB"),
        Image.fromarray(SCENE.ir).convert("LA"),
        Image.fromarray(SCENE.ir).convert("P"),
    ],
    ids=["16 bit", "colour", "alpha", "palette"],
)
def test_unusual_uploads_are_fused(image):
    """Depth, colour and transparency of a file are no obstacle."""
    panel = upload(weights=None)
    send(panel, "ir", "hot.png", encoded(image))
    send(panel, "vis", *GOOD)
    assert (
        not panel.message.error
        and np.corrcoef(decoded(panel.zoom.images[0]).ravel(), SCENE.ir.ravel())[0, 1] > 0.99
    )


def test_a_file_above_the_limit_is_refused_before_it_is_sent():
    """The limit is checked in the browser; Python hears the name and the size."""
    panel = upload(weights=None)
    panel.picks["ir"].receive({"name": "film.tif", "size": MOST + 1, "refused": True}, [])
    assert (
        panel.message.error
        and "film.tif" in panel.message.text
        and "send({name: file.name, size: file.size, refused: true})" in PICK_JS
    )


def test_missing_weights_leave_a_working_panel():
    """Each panel says which file is missing and shows what is left."""
    for panel in (
        browse(weights="gone.safetensors"),
        explore_metrics(weights="gone.safetensors"),
        upload(weights="gone.safetensors"),
        explore(weights="gone.safetensors"),
    ):
        assert panel.message.error and "gone.safetensors: no such weights file" in panel.message.text
    assert panel.zoom.images


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ValueError("broken"),
    ],
)
def test_a_failing_model_becomes_a_sentence(error, caplog):
    """Too little memory and errors of a method are shown; the latter are logged in full."""

    class Broken:
        def fuse(self, *, vis, ir):
            raise error

    panel = upload(weights=None)
    panel.models["average"] = Broken()
    send(panel, "ir", "hot.png", encoded(SCENE.ir))
    send(panel, "vis", *GOOD)
    assert panel.message.error
    if isinstance(error, ValueError):
        assert "ValueError" in panel.message.text and "broken" in caplog.text
    else:
        assert "memory" in panel.message.text


def test_a_model_that_returns_nonsense_is_named():
    """NaN and wrong sizes do not reach the screen."""
    content = read_upload(ir=("a.png", encoded(SCENE.ir)), vis=GOOD)

    class Odd:
        def __init__(self, change):
            self.change = change

        def fuse(self, *, vis, ir):
            return self.change(vis)

    for change in (lambda x: x * np.nan, lambda x: x[..., :-1]):
        with pytest.raises(InputError, match="check its weights"):
            Collection(PairSet([("p", _InMemory(content))], name="p"), models={"odd": Odd(change)}).image(
                "p", "odd"
            )


def test_wide_models_fuse_fewer_pixels_live():
    """The limit shrinks with the width of the network."""
    assert (
        live_limit(SMFNet("tiny")) == LIVE_PIXELS
        and live_limit(SMFNet("paper", groups=1, depth=1)) == LIVE_PIXELS // 4
    )


# --- the front door -----------------------------------------------------------------------------------------

DOOR = """
import sys
import smfnet.compare
assert not {"torch", "anywidget", "ipywidgets"} & set(sys.modules), "the room loads its modules too early"
from smfnet.compare import browse, explore, upload, explore_metrics, freeze
import smfnet.compare.uploads, smfnet.compare.frozen
from smfnet.compare import upload as again
assert again is upload and all(map(callable, (browse, explore, upload, explore_metrics, freeze)))
"""


def test_names_load_when_used_and_stay_functions():
    """In a fresh process: importing the room is cheap, importing its modules does not replace its names."""
    done = subprocess.run([sys.executable, "-c", DOOR], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ["compare", "fusion"])
def test_no_name_of_a_front_door_is_a_module(room):
    """Importing such a module would put it where the name is expected."""
    package = importlib.import_module(f"smfnet.{room}")
    assert not {m.name for m in pkgutil.iter_modules(package.__path__)} & set(package.__all__)
    assert all(getattr(package, name).__name__ == name for name in package.__all__)


# --- panels -------------------------------------------------------------------------------------------------


def test_a_message_of_an_inner_callback_survives():
    """A control that is changed by a callback calls another one; its error stays on the screen."""
    import ipywidgets as w

    panel, a, b = Panel(), w.IntText(), w.IntText()

    def outer():
        b.value = a.value

    def inner():
        if b.value == 3:
            raise InputError("three is not a number here")

    watch(panel, inner, b)
    watch(panel, outer, a)
    a.value = 3
    assert panel.message.error and "three" in panel.message.text
    a.value = 4
    assert not panel.message.text


def test_unknown_method_and_pair_are_named():
    """A collection names what it does not have."""
    scenes = open_collection("scenes:test")
    with pytest.raises(InputError, match="no such method"):
        scenes.image(scenes.stems[0], "magic")
    with pytest.raises(InputError, match="has no pair"):
        scenes.image("nobody", "infrared")
    with pytest.raises(InputError):
        open_collection("no/such/folder")


def test_sets_of_this_machine_are_found(tmp_path, monkeypatch):
    """Sets below SMFNET_DATA are offered after the scenes; at most four methods are ticked, with ours."""
    set_ = registry()["M3FD"]
    for side in ("ir", "vis"):
        place = tmp_path / set_.split("fusion").folder / set_.sides[side]
        place.mkdir(parents=True)
        Image.fromarray(getattr(SCENE, side)).save(place / "one.png")
    for method in ("A", "B", "C"):
        (tmp_path / "fused" / "M3FD" / method).mkdir(parents=True)
        Image.fromarray(SCENE.ir).save(tmp_path / "fused" / "M3FD" / method / "one.png")
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path))
    panel = browse()
    assert list(panel.collections) == ["scenes test", "M3FD fusion"]
    panel.set_.value = "M3FD fusion"
    assert panel.zoom.titles == ["infrared", "visible", "smfnet tiny", "A"] and not panel.message.error
    assert [box.description for box in panel.chosen.children][-3:] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("", "nothing is named; give one that holds ir/ and vi/"),
        ("no/where", "no/where: no such folder"),
        ("empty", "empty"),
        ("file", "file: no such folder"),
    ],
)
def test_a_folder_without_pairs_is_named_and_nothing_is_lost(tmp_path, folder, says, monkeypatch):
    """What is chosen in the page may be nothing; the panel says so and shows what it showed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    panel = browse(["scenes:test"], weights=None)
    before = panel.zoom.images, panel.set_.options
    panel.folder.value = folder
    panel.open.click()
    assert panel.message.error and says in panel.message.text and "Traceback" not in panel.message.text
    assert (panel.zoom.images, panel.set_.options) == before


def test_what_was_overtaken_is_dropped(monkeypatch):
    """Ten pairs in quick succession: at most the first and the last are fused, and the last one is shown."""
    from smfnet.compare import panel as frame

    class Slow:
        config, done = SMFNet("tiny").config, 0

        def fuse(self, *, vis, ir):
            for _ in range(100):
                time.sleep(0.005)
                total = vis + ir
            Slow.done += 1
            return total / 2

    monkeypatch.setattr(frame, "in_kernel", lambda: True)
    found = open_collection("scenes:test", models={"slow": Slow()})
    panel = Browser([found])
    for stem in found.stems[1:11]:
        panel.pair.value = stem
        name = dict(zip(panel.zoom.titles, panel.zoom.images))
        assert (decoded(name["infrared"]) == found.image(stem, "infrared")).all(), (
            "sources wait for the network"
        )
        assert name["slow"] == b"" and panel.swipe.right == b"" and panel.zoom.places[2] == "fusing …"
        time.sleep(0.02)
    panel.wait()
    assert Slow.done <= 2
    assert (decoded(panel.zoom.images[2]) == found.image(found.stems[10], "slow")).all()
    assert panel.zoom.stands == [0, 10] and not panel.message.error


def test_methods_of_folders_are_compared_with_live_ones(tmp_path):
    """Own pairs and fused images in folders: values are those of the files; a name that exists is refused."""
    for side, image in (("ir", SCENE.ir), ("vi", SCENE.vis), ("fused/mine/good", SCENE.ir // 2 + 60)):
        place = tmp_path / ("mine" if "/" not in side else "") / side
        place.mkdir(parents=True)
        Image.fromarray(image).save(place / "one.png")
    found = open_collection(tmp_path / "mine", models=live_models(None), fused=tmp_path / "fused")
    assert found.methods == ["infrared", "visible", "average", "maximum", "good"]
    from smfnet.metrics.folder import evaluate_folder

    table = evaluate_folder(
        fused=tmp_path / "fused/mine/good", ir=tmp_path / "mine/ir", vis=tmp_path / "mine/vi", progress=False
    )
    shown = found.scores("one", "good")
    assert set(shown) | set(shown.undefined) == set(METRICS) and all(
        table.loc["one", m] == pytest.approx(v, rel=1e-9) for m, v in shown.items()
    )
    (tmp_path / "fused/mine/average").mkdir()
    with pytest.raises(InputError, match="rename the folder average"):
        open_collection(tmp_path / "mine", models=live_models(None), fused=tmp_path / "fused")


def test_explorer_holds_one_range_for_all_pairs():
    """The range of a feature is found once; a channel beyond the network's width is not offered."""
    panel = explore()
    first, stems = dict(panel.limits), panel.pairs.stems
    for stem in stems[1:3]:
        panel.pair.value = stem
    assert panel.limits == first and isinstance(panel, Explorer) and not panel.message.error
    assert max(v for _, v in panel.channel.options) == panel.model.config.dim - 1
