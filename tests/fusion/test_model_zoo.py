"""Registered weights from a server on this machine: downloads, tampering, names wherever a model is named."""

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sites import Site

from smfnet.cli import main
from smfnet.compare.collection import live_models
from smfnet.compare.explorer import explore
from smfnet.core.checks import InputError
from smfnet.core.download import FETCHED_FROM, Published
from smfnet.core.provenance import sha256
from smfnet.data.acquire import STAGE
from smfnet.fusion import load_model
from smfnet.fusion.model_zoo import (
    REGISTRY,
    as_entry,
    find_weights,
    get_weights,
    identify,
    is_registered,
    load_registered,
    locate_weights,
    pin_weights,
    verify_weights,
    weights_file,
    zoo,
)
from smfnet.network.model import SMFNet

pytest.importorskip("pooch")

ENTRIES = ("DIDF_Encoder", "DIDF_Decoder", "BaseFuseLayer", "DetailFuseLayer", "GraphModel")
RELEASED = "Abraham-Einstein/SMFNet/5097711d29c0adb515d12bd366d4e56536dbbc2a/models/model_VIF.pth"
SPEC = importlib.util.spec_from_file_location("literal", Path(__file__).parents[2] / "bench/literal.py")
literal = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(literal)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights as the authors save theirs: five dictionaries, `module.` before each name."""
    torch.manual_seed(0)
    flat = {literal.released_key(k): v for k, v in literal.LiteralSMFNet().state_dict().items()}
    state = {e: {k.split("/", 1)[1]: v for k, v in flat.items() if k.split("/")[0] == e} for e in ENTRIES}
    assert all(state.values()) and all(k.startswith("module.") for part in state.values() for k in part)
    path = tmp_path_factory.mktemp("authors") / "model_VIF.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def site(tmp_path, checkpoint):
    """Serves the checkpoint where the authors' would be, and whatever lies in published/."""

    def read(path):
        return checkpoint.read_bytes() if path == RELEASED else (tmp_path / "published" / path).read_bytes()

    s = Site(read, continues=True)
    yield s
    s.server.shutdown()
    s.server.server_close()


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("SMFNET_WEIGHTS", raising=False)
    return tmp_path / "work"


@pytest.fixture
def toy(tmp_path):
    """A small network, pinned, published in published/."""
    (tmp_path / "published").mkdir()
    torch.manual_seed(0)
    SMFNet("tiny").save(tmp_path / "published/toy.safetensors")
    return pin_weights(tmp_path / "published/toy.safetensors", "toy", "http://127.0.0.1:1/toy.safetensors")


def fetch(weights, site, **options):
    quick = {"mirror": site.url, "timeout": 0.3, "pause": 0.01}
    return get_weights(weights, **{**quick, **options})


def register(folder, **entries):
    """A registry of the user."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": 1, "weights": {n: as_entry(w) for n, w in entries.items()}})
    (folder / "weights.json").write_text(text)


def as_released(checkpoint, **changes):
    """The entry of the authors' weights, with what is known of this checkpoint in place of theirs."""
    w = find_weights("released")
    digest = hashlib.sha1(b"blob %d\0" % checkpoint.stat().st_size + checkpoint.read_bytes()).hexdigest()
    return replace(w, file=replace(w.file, blob=digest), **changes)


def below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- the registry -------------------------------------------------------------------------------------------


def test_the_registry_is_what_the_package_holds():
    stored = json.loads(REGISTRY.read_text(encoding="utf-8"))["weights"]
    shipped = {p.stem for p in REGISTRY.with_name("weights").glob("*.safetensors")}
    assert shipped == {n for n, e in stored.items() if e["access"] == "shipped"}
    assert list(zoo()) == list(stored) and {"tiny", "released"} <= set(stored)
    for w in zoo().values():
        assert w.title and w.about and w.origin and w.licence and w.citation and w.training_data
        if w.access == "shipped":
            assert verify_weights(w)[0].ok and (REGISTRY.with_name("weights") / w.card).is_file()
    released = find_weights("released")
    assert released.file.url == f"{FETCHED_FROM}/{RELEASED}" and released.origin == "authors"
    assert released.file.blob == "2196069a9d0c939a6fb7dac3373380cac6ffea4c"
    assert released.at_least == 4 << 20 and released.licence.startswith("unknown")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("not json", "no registry of weights"),
        ([], "no registry of weights"),
        ({"weights": {"x": 3}}, "weights 'x'"),
        ({"weights": {"../x": None}}, "a name has letters"),
        ({"file": {}}, "'path' is missing"),
        ({"file": {"path": "x.pth", "url": "http://h/x"}}, "neither sha256 nor git blob id"),
        ({"file": {"path": "../x.pth", "url": "http://h/x", "blob": "1"}}, "no plain name"),
        ({"file": {"path": "x.pth", "blob": "1"}}, "no address"),
        ({"access": "magic"}, "access: 'magic' is unknown"),
        ({"format": "onnx"}, "format: 'onnx' is unknown"),
        ({"preset": "huge"}, "preset: 'huge' is unknown"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_a_registry_that_is_none(place, toy, change, says, capsys):
    whole = {"weights": {"x": as_entry(toy)}}
    if isinstance(change, dict) and "weights" not in change:
        whole["weights"]["x"] |= change
    else:
        whole = change
        if isinstance(change, dict) and "../x" in change["weights"]:
            change["weights"]["../x"] = as_entry(toy)
    (place / "data/weights").mkdir(parents=True)
    text = whole if isinstance(whole, str) else json.dumps(whole)
    (place / "data/weights/weights.json").write_text(text)
    assert main(["weights", "list"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "weights.json: " in err and says in err


def test_a_registry_of_the_user_adds_and_replaces_aloud(place, checkpoint, site, tmp_path, capsys):
    """The replacement states its origin itself; each use by name says whose registry it is."""
    assert find_weights("released").registry == REGISTRY and not capsys.readouterr().out
    register(place / "data/weights", released=as_released(checkpoint), other=as_released(checkpoint))
    w = find_weights("released")
    remark = "weights 'released' are those of data/weights/weights.json, not of the package's registry"
    assert remark in capsys.readouterr().out and w.origin == "authors"
    assert find_weights("other").name == "other" and not capsys.readouterr().out
    assert list(zoo()) == ["tiny", "released", "paper", "other"] and identify(checkpoint).name == "released"


# --- downloads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mood", "says"),
    [
        ("cut", "connection broke"),
        ("stall", "stalled"),
        ("corrupt", "not what the registry knows"),
        ("endless", "sends more than"),
        ("unsized", "not what the registry knows"),
        ("page", "not what the registry knows"),
        (404, "404"),
        (503, "503"),
    ],
)
def test_a_server_that_fails_for_good(toy, site, place, mood, says):
    site.mood = lambda path, visit: mood
    with pytest.raises(InputError, match=says) as e:
        fetch(toy, site)
    assert "toy.safetensors" in str(e.value) and site.visits["toy.safetensors"] == (1 if mood == 404 else 3)
    kept = below(place)
    assert all(name == f"data/weights/{STAGE}/toy/toy.safetensors.part" for name in kept)
    assert bool(kept) == (mood in ("cut", "stall"))  # a half may be continued, what is wrong is not kept
    assert locate_weights(toy) is None

    site.mood = lambda path, visit: None
    assert fetch(toy, site).installed
    assert below(place) == ["data/weights/toy.safetensors", "data/weights/toy.safetensors.json"]
    assert verify_weights(toy)[0].ok


@pytest.mark.parametrize("continues", [True, False])
def test_a_half_is_continued(toy, site, continues):
    """The rest is asked for, also by the next command; a server that knows no rest sends all."""
    site.continues, length = continues, toy.file.bytes
    site.mood = lambda path, visit: "cut" if visit < 4 else None
    with pytest.raises(InputError, match="run the same command again"):
        fetch(toy, site)
    assert fetch(toy, site).installed and site.visits["toy.safetensors"] == 4
    starts = [start for _, start in site.asked]
    assert len(starts) == (3 if continues else 0) and starts == sorted(starts)
    assert not continues or starts[0] >= length // 2 - 4096 and starts[-1] > length * 0.8


@pytest.mark.parametrize("half", [b"the half of something else", bytes(10**6)])
def test_a_half_of_another_file_costs_one_attempt(toy, site, place, half):
    stage = place / "data/weights" / STAGE / "toy"
    stage.mkdir(parents=True)
    (stage / "toy.safetensors.part").write_bytes(half)
    (stage / "tmp1234").write_bytes(b"what a killed download left")
    assert fetch(toy, site).installed and site.visits["toy.safetensors"] == 2
    assert verify_weights(toy)[0].ok and not stage.parent.exists()


def test_what_is_here_is_not_fetched_again(toy, site, place, tmp_path, monkeypatch):
    fetch(toy, site)
    outcome = fetch(toy, site)
    assert not outcome.installed and "is complete already" in outcome.notes[0]
    monkeypatch.setenv("SMFNET_WEIGHTS", str(place / "data/weights"))
    monkeypatch.chdir(tmp_path)
    assert not fetch(toy, site).installed and site.visits == {"toy.safetensors": 1}
    assert fetch(toy, site, root=tmp_path / "own").installed and (tmp_path / "own/toy.safetensors").is_file()
    assert "ships with the package" in get_weights("tiny").notes[0]


def test_interrupted_from_the_keyboard(toy, site, place, monkeypatch):
    """Nothing is installed; what came before is continued."""
    from smfnet.core import download

    def interrupted(known, answer, out, size, timeout):
        out.write(next(answer.iter_content(1000)))
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(download, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(toy, site)
    assert below(place) == [f"data/weights/{STAGE}/toy/toy.safetensors.part"]
    assert fetch(toy, site).installed and site.asked == [("toy.safetensors", 1000)]


def test_full_disk(toy, site, place, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(InputError, match="are needed"):
        fetch(toy, site)
    with pytest.raises(InputError, match="4 MB are needed"):
        fetch("released", site)
    assert not site.visits and not below(place)


def test_only_the_blob_is_known(toy, site, place):
    """Length and SHA-256 are noted once seen, and later checks use both."""
    bare = replace(toy, file=replace(toy.file, bytes=None, sha256=None))
    site.mood = lambda path, visit: "corrupt" if visit == 1 else None
    assert fetch(bare, site).installed and site.visits["toy.safetensors"] == 2
    noted = json.loads(Path("data/weights/toy.safetensors.json").read_text())
    assert (noted["bytes"], noted["sha256"], noted["blob"]) == (
        toy.file.bytes,
        toy.file.sha256,
        toy.file.blob,
    )
    (report,) = verify_weights(bare)
    assert report.ok and "git blob id, sha256 as noted" in "".join(report.lines())
    Path("data/weights/toy.safetensors.json").write_text(json.dumps({**noted, "sha256": 64 * "0"}))
    (report,) = verify_weights(bare)
    assert report.ok and "states another sha256" in report.notes[0]


def test_unknown_content_is_never_fetched():
    with pytest.raises(InputError, match="neither sha256 nor git blob id"):
        Published("x.pth", "http://127.0.0.1:1/x.pth")


# --- what lies under a name ---------------------------------------------------------------------------------


def wrong(path, kind, right):
    """Something else under the name of registered weights."""
    if kind == "half":
        path.write_bytes(right[: len(right) // 2])
    elif kind == "flipped":
        path.write_bytes(right[:-9] + bytes([right[-9] ^ 1]) + right[-8:])
    elif kind == "page":
        path.write_text("<!DOCTYPE html><html>please sign in</html>")
    elif kind == "architecture":
        torch.save({"conv.weight": torch.zeros(3, 3)}, path)
    else:
        SMFNet("tiny").save(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("half", "not a safetensors file"),
        ("flipped", "its sha256 is"),
        ("page", "it is a web page"),
        ("architecture", "not weights of smfnet"),
        ("numbers", "this network with other numbers"),
    ],
)
def test_something_else_under_the_name(toy, site, place, kind, says, capsys):
    """Refused when it is loaded, named by `verify`, moved aside by `get`: nobody's file is overwritten."""
    fetch(toy, site)
    path, registered = place / "data/weights/toy.safetensors", Path("data/weights")
    wrong(path, kind, path.read_bytes())
    content = path.read_bytes()
    register(registered, toy=toy)
    with pytest.raises(InputError, match=says) as e:
        load_model("toy", device="cpu")
    for words in ("data/weights/toy.safetensors: ", "'toy'", "run: smfnet weights get toy"):
        assert words in str(e.value)
    assert main(["weights", "verify", "toy"]) == 1
    out = capsys.readouterr().out
    assert "mismatched: data/weights/toy.safetensors" in out and says in out
    aside = registered / f"toy-{sha256(path)[:8]}.safetensors"
    assert main(["weights", "get", "toy", "--mirror", site.url]) == 0
    assert f"note: what lay in its place is now {aside}" in capsys.readouterr().out
    assert aside.read_bytes() == content and main(["weights", "verify", "toy"]) == 0


def test_the_right_file_is_found_behind_a_wrong_one(toy, site, place, tmp_path, monkeypatch):
    fetch(toy, site)
    (tmp_path / "first").mkdir()
    (tmp_path / "first/toy.safetensors").write_bytes(b"half")
    monkeypatch.setenv("SMFNET_WEIGHTS", str(tmp_path / "first"))
    assert weights_file(toy) == Path("data/weights/toy.safetensors") and not load_registered(toy).training
    Path("data/weights/toy.safetensors").unlink()
    with pytest.raises(InputError, match="first/toy.safetensors: not the registered weights"):
        weights_file(toy)
    assert fetch(toy, site).installed and (tmp_path / "first/toy.safetensors").read_bytes() == b"half"


def test_another_network_than_the_registry_says(toy, site):
    fetch(toy, site)
    with pytest.raises(InputError, match="holds another network than its registry says .paper"):
        load_registered(replace(toy, preset="paper"))


def test_content_is_recognised_under_any_name(toy, site, place, tmp_path):
    fetch(toy, site)
    register(place / "data/weights", toy=toy)
    copied = tmp_path / "anything.bin"
    copied.write_bytes((tmp_path / "published/toy.safetensors").read_bytes())
    assert identify(copied).name == "toy" and identify(tmp_path) is None and identify("gone") is None
    assert identify(REGISTRY.with_name("weights") / "tiny.safetensors").origin == "this project"
    copied.write_bytes(b"x" + copied.read_bytes())
    assert identify(copied) is None


# --- names wherever a model is named ------------------------------------------------------------------------


@pytest.fixture
def pair(place):
    """A pair of 48×64 pixels in ir/ and vi/."""
    for i, side in enumerate(("ir", "vi")):
        (place / side).mkdir()
        noise = np.random.default_rng(i).integers(0, 255, (48, 64), dtype=np.uint8)
        Image.fromarray(noise).save(place / side / "a.png")


FUSE = "fuse --ir ir --vis vi --out out --device cpu --weights"


def test_the_authors_weights_by_name(checkpoint, site, pair, place, capsys):
    """From a server to a fused picture, as the commands of a user."""
    register(place / "data/weights", released=as_released(checkpoint))
    assert main(f"{FUSE} released".split()) == 2
    assert "run: smfnet weights get released" in capsys.readouterr().err and not list(Path("out").iterdir())
    site.mood = lambda path, visit: "cut" if visit == 1 else None
    assert main(f"weights get released --mirror {site.url}".split()) == 0
    assert f"{checkpoint.stat().st_size} bytes in data/weights/released.pth" in capsys.readouterr().out
    assert site.visits == {RELEASED: 2} and site.asked[0][1] > checkpoint.stat().st_size // 3
    assert main(["weights", "verify", "released"]) == 0 and main(["weights", "list"]) == 0
    out = capsys.readouterr().out
    assert "git blob id, sha256 as noted at the download" in out and " here " in out
    assert main(f"{FUSE} released".split()) == 0
    assert "not of the package's registry" in capsys.readouterr().out
    named = Path("out/a.png").read_bytes()
    assert main(f"{FUSE} {checkpoint}".split()) == 0 and Path("out/a.png").read_bytes() == named
    assert load_model("released").config.edge_gating == "channel_interleaved"
    assert identify("data/weights/released.pth").origin == "authors"


def test_the_packages_own_entry_refuses_a_substitute(site, place, capsys):
    """The checkpoint of this test is not the authors', and no address makes it theirs."""
    assert main(f"weights get released --mirror {site.url}".split()) == 2
    err = capsys.readouterr().err
    assert "not what the registry knows" in err and err.count("\n") == 1
    assert not below(place) and site.visits == {RELEASED: 3}


@pytest.mark.parametrize("line", ["fuse", "video", "export-onnx"])
def test_commands_say_how_to_get_them(pair, line, capsys):
    if line == "export-onnx":
        pytest.importorskip("onnx")
    sources = "" if line == "export-onnx" else " --ir ir --vis vi"
    out = {"fuse": "out", "video": "out/film.mkv", "export-onnx": "out.onnx"}[line]
    assert main(f"{line}{sources} --out {out} --weights released".split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data/weights; run: smfnet weights get released" in err
    assert main(f"{line}{sources} --out {out} --weights relesed".split()) == 2
    assert "did you mean released? known are tiny, released" in capsys.readouterr().err


def test_widgets_say_how_to_get_them():
    problems = []
    assert list(live_models("released", problems)) == ["average", "maximum"]
    assert "run: smfnet weights get released" in problems[0]
    assert list(live_models("tiny"))[0] == "smfnet tiny"
    message = explore(weights="released").message
    assert message.error and "run: smfnet weights get released" in message.text


def test_names_and_paths(toy, site, place, tmp_path):
    """A file of that name comes first, as before; upper case is no other name."""
    assert is_registered("tiny") and is_registered("TINY") and not is_registered("./tiny")
    assert not load_model("Tiny", device="cpu").training
    (place / "tiny").write_bytes((tmp_path / "published/toy.safetensors").read_bytes())
    assert not is_registered("tiny") and identify("tiny") is None
    assert torch.equal(
        load_model("tiny", device="cpu").encoder.embed.weight,
        load_model(tmp_path / "published/toy.safetensors", device="cpu").encoder.embed.weight,
    )


# --- the commands -------------------------------------------------------------------------------------------


def test_list_and_show(capsys):
    assert main(["weights", "list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "to get" in rows["released"] and "authors" in rows["released"] and "shipped" in rows["tiny"]
    assert main(["weights", "show", "released"]) == 0
    out = capsys.readouterr().out
    for words in (RELEASED, "2196069a9d0c", "sha256:      unknown", "run: smfnet weights get released"):
        assert words in out
    assert main(["weights", "show", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "RoadScene" in out and "| TNO | EN |" in out  # its card


@pytest.mark.parametrize(
    "line",
    [
        "weights",
        "weights verify released",
        "weights verify nothing",
        "weights show nothing",
        "weights get nothing",
        "weights get released --mirror http://127.0.0.1:1 --root new",
        "weights get released --mirror http://127.0.0.1:1 --root ../published/toy.safetensors",
    ],
)
def test_bad_requests_are_one_line(toy, line, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    try:
        assert main(line.split()) == 2
    except SystemExit as e:
        assert e.code == 2  # argparse has printed the usage
        return
    out, err = capsys.readouterr()
    assert not out and err.startswith("smfnet: error: ") and err.count("\n") == 1


def test_verify_all(toy, site, place, capsys):
    fetch(toy, site)
    register(place / "data/weights", toy=toy)
    assert main(["weights", "verify"]) == 0
    out = capsys.readouterr().out
    assert "tiny weights: as in the registry" in out and "toy weights: as in the registry" in out
    Path("data/weights/toy.safetensors").write_bytes(b"x")
    assert main(["weights", "verify"]) == 1
