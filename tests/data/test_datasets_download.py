"""Downloads from a server on this machine that cuts, stalls, corrupts and refuses."""

from pathlib import Path

import pytest
from datasets_toys import files_below, real, toy  # noqa: F401  (fixtures)
from sites import Site

from smfnet.core.checks import InputError
from smfnet.data import acquire
from smfnet.data.acquire import STAGE, get, verify
from smfnet.data.registry import find_set

pytest.importorskip("pooch")


@pytest.fixture
def site(tmp_path):
    s = Site(lambda path: (tmp_path / "home" / path).read_bytes())
    yield s
    s.server.shutdown()
    s.server.server_close()


def fetch(toy, site, tmp_path, **options):  # noqa: F811
    return get(
        toy,
        **{
            "root": tmp_path / "data",
            "mirror": site.url,
            "timeout": 0.3,
            "pause": 0.01,
            "progress": False,
            **options,
        },
    )


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
        (429, "429"),
        (503, "503"),
    ],
)
def test_a_server_that_fails_for_good(toy, site, tmp_path, mood, says):  # noqa: F811
    site.mood = lambda path, visit: mood if path == "toy/test/vi/1.png" else None
    with pytest.raises(InputError, match=says) as e:
        fetch(toy, site, tmp_path, splits=["test"])
    assert "vi/1.png" in str(e.value) and not (tmp_path / "data/toy").exists()
    assert site.visits["toy/test/vi/1.png"] == (1 if mood == 404 else 3)
    kept = files_below(tmp_path / "data")
    assert kept and all(name.startswith(STAGE) for name in kept)  # checked files wait in the staging folder

    site.mood, before = (lambda path, visit: None), dict(site.visits)
    assert fetch(toy, site, tmp_path, splits=["test"]).installed
    again = [path for path, n in site.visits.items() if n > before.get(path, 0) and path in before]
    assert again == ["toy/test/vi/1.png"]  # nothing else was fetched twice
    assert verify(toy, root=tmp_path / "data").ok and not (tmp_path / "data" / STAGE).exists()


@pytest.mark.parametrize("mood", ["cut", "stall", "corrupt", 429, 503])
def test_a_server_that_fails_at_first(toy, site, tmp_path, mood):  # noqa: F811
    site.mood = lambda path, visit: mood if visit == 1 and path.endswith("0.png") else None
    assert len(fetch(toy, site, tmp_path).installed) == 2
    assert verify(toy, root=tmp_path / "data").ok


def test_nobody_listens(toy, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="connection broke or could not be made"):
        get(toy, root=tmp_path / "data", timeout=0.3, attempts=1, progress=False)  # port 1 of this machine


def test_tampered_staging_is_fetched_again(toy, site, tmp_path):  # noqa: F811
    site.mood = lambda path, visit: 404 if path.endswith("2.png") else None
    with pytest.raises(InputError):
        fetch(toy, site, tmp_path)
    staged = next(p for p in (tmp_path / "data").rglob("0.png"))
    staged.write_bytes(b"not what was checked")
    site.mood = lambda path, visit: None
    fetch(toy, site, tmp_path)
    assert verify(toy, root=tmp_path / "data").ok


def test_user_files_stay(toy, site, tmp_path):  # noqa: F811
    fetch(toy, site, tmp_path)
    (tmp_path / "data/toy/test/notes.txt").write_text("mine")
    (tmp_path / "data/toy/test/ir/0.png").write_bytes(b"damaged")
    (tmp_path / "data/toy/test/vi/2.png").unlink()
    report = verify(toy, root=tmp_path / "data")
    assert (
        list(report.corrupt) == ["toy/test/ir/0.png"]
        and list(report.missing) == ["toy/test/vi/2.png"]
        and list(report.extra) == ["toy/test/notes.txt"]
    )
    fetch(toy, site, tmp_path)
    report = verify(toy, root=tmp_path / "data")
    assert (
        not (report.corrupt or report.missing)
        and (tmp_path / "data/toy/test/notes.txt").read_text() == "mine"
    )


def test_sets_behind_pages_are_not_fetched(tmp_path):
    for name in ("M3FD", "MFNet", "scenes"):
        with pytest.raises(InputError, match="cannot be fetched automatically"):
            get(name, root=tmp_path)
    with pytest.raises(InputError, match="cannot be fetched automatically"):
        get("MSRS", ["full-train"], root=tmp_path)


def test_real_sets_end_to_end(real, tmp_path):  # noqa: F811
    """The addresses of the registry, served from here: what arrives is what the registry says."""
    known = {
        f.url.split("/", 3)[3]: real / f.path
        for n in ("TNO", "RoadScene", "MSRS")
        for s in find_set(n).splits.values()
        for f in s.files
        if (real / f.path).is_file()
    }
    site = Site(lambda path: Path(known[path]).read_bytes())
    site.mood = lambda path, visit: "cut" if visit == 1 and hash(path) % 50 == 0 else None
    for name, parts, pairs in (("TNO", (), 25), ("RoadScene", (), 221), ("MSRS", ("test",), 25)):
        site.visits.clear()
        get(name, parts, root=tmp_path, mirror=site.url, timeout=5, pause=0.01, progress=False)
        assert verify(name, root=tmp_path).ok and len(site.visits) == 2 * pairs
    site.server.shutdown()
    site.server.server_close()


def test_what_is_in_the_shared_place_is_not_fetched(toy, site, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path / "home"))
    outcome = get(toy, mirror=site.url, progress=False)
    assert (
        not outcome.installed
        and len(outcome.notes) == 2
        and not site.visits
        and not (tmp_path / "data/toy").exists()
    )


def test_interrupted_from_the_keyboard(toy, site, tmp_path, monkeypatch):  # noqa: F811
    """Nothing is installed, what was checked is not fetched again, and partial files never reach the set."""
    real_fetch, count = acquire.fetch, []

    def interrupted(*args, **options):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return real_fetch(*args, **options)

    monkeypatch.setattr(acquire, "fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(toy, site, tmp_path)
    assert not (tmp_path / "data/toy").exists() and len(site.visits) == 3
    staged = next((tmp_path / "data" / STAGE).rglob("ir"))
    (staged / "tmp1234.png").write_bytes(b"half a file")
    fetch(toy, site, tmp_path)
    assert set(site.visits.values()) == {1} and len(site.visits) == 12
    assert verify(toy, root=tmp_path / "data").ok and not (tmp_path / "data" / STAGE).exists()


def test_full_disk(toy, site, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(InputError, match="are needed"):
        fetch(toy, site, tmp_path)
    assert not site.visits and not (tmp_path / "data/toy").exists()
