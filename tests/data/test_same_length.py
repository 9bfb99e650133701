"""What is damaged at an unchanged length, or changed without being damaged: on either side, and on both."""

import shutil

import numpy as np
import pytest
from datasets_toys import files_below, png, real, scenes, toy  # noqa: F401  (fixtures)
from PIL import Image
from test_datasets_download import fetch, site  # noqa: F401  (fixture)
from test_datasets_registry import make_m3fd, make_mfnet

from smfnet.core.checks import InputError
from smfnet.data.acquire import add, inventory, verify
from smfnet.data.pairs import get_pairs
from smfnet.data.registry import coverage, pin_folder

SIDES = [("ir",), ("vi",), ("ir", "vi")]
either_side = pytest.mark.parametrize("sides", SIDES, ids="+".join)


def flip(path):
    """One bit, in the middle of the file: a decoder will notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def repaint(path):
    """Another picture that can be read, in a file of the same length."""
    length = path.stat().st_size
    with Image.open(path) as im:
        values = np.array(im)
    values[3, 3] ^= 1
    Image.fromarray(values).save(path, compress_level=0)
    assert path.stat().st_size == length


damages = pytest.mark.parametrize("damage", [flip, repaint])


@pytest.fixture
def plain(tmp_path):
    """A pinned set of three pairs without compression, published in home/ and installed in data/."""
    for i, s in enumerate(scenes()):
        for side, image in (("ir", s.ir), ("vi", s.vis)):
            path = tmp_path / f"home/toy/test/{side}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, compress_level=0)
    shutil.copytree(tmp_path / "home", tmp_path / "data")
    return pin_folder("toy", tmp_path / "home", ["test"], url="http://127.0.0.1:1")


def names(sides):
    return [f"toy/test/{side}/1.png" for side in sides]


@either_side
@damages
def test_verify_and_coverage_count_by_content(plain, tmp_path, sides, damage):
    for name in names(sides):
        damage(tmp_path / "data" / name)
    report = verify(plain, root=tmp_path / "data")
    found = report.corrupt if damage is flip else report.mismatched
    assert list(found) == names(sides) and not report.ok and report.pairs == {"test": (2, 3)}
    part = coverage(tmp_path / "data/toy/test", plain, "test")
    assert part.proven == ("0", "2") and part.unproven == ("1",) and not part.outside


@either_side
@damages
def test_get_and_add_mend_an_installed_split(plain, site, tmp_path, sides, damage):  # noqa: F811
    """And nothing else is fetched or touched."""
    for mend in (
        lambda: fetch(plain, site, tmp_path),
        lambda: add(plain, tmp_path / "home", root=tmp_path / "data"),
    ):
        for name in names(sides):
            damage(tmp_path / "data" / name)
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*.png")}
        assert mend().installed and verify(plain, root=tmp_path / "data").ok
        changed = [p for p, t in before.items() if p.stat().st_mtime_ns != t]
        assert sorted(changed) == [tmp_path / "data" / name for name in names(sides)]
    assert site.visits == dict.fromkeys(names(sides), 1)


@either_side
def test_a_server_that_changes_a_bit(plain, site, tmp_path, sides):  # noqa: F811
    shutil.rmtree(tmp_path / "data")
    site.mood = lambda path, visit: "corrupt" if path in names(sides) else None
    with pytest.raises(InputError, match=f"{names(sides)[0]}: the content is not what the registry knows"):
        fetch(plain, site, tmp_path)
    assert not (tmp_path / "data/toy").exists() and site.visits[names(sides)[0]] == 3


@either_side
@damages
def test_a_damaged_source_is_not_installed(plain, tmp_path, sides, damage):
    for name in names(sides):
        damage(tmp_path / "home" / name)
    with pytest.raises(
        InputError, match=f"only {6 - len(sides)} of 6 files are there; missing {sides[0]}/1.png"
    ):
        add(plain, tmp_path / "home", root=tmp_path / "new")
    assert not files_below(tmp_path / "new")


@either_side
def test_what_changes_while_it_is_installed_is_noticed(plain, tmp_path, sides, monkeypatch):
    copy = shutil.copyfile

    def careless(source, target):
        copy(source, target)
        if str(target).endswith(tuple(names(sides))):
            flip(target)

    monkeypatch.setattr(shutil, "copyfile", careless)
    with pytest.raises(InputError, match=f"{names(sides)[0]} changed while it was installed"):
        add(plain, tmp_path / "home", root=tmp_path / "new")
    assert not files_below(tmp_path / "new")


@either_side
@damages
def test_a_damaged_set_elsewhere_is_not_complete(plain, site, tmp_path, sides, damage, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").rename(tmp_path / "shared")
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path / "shared"))
    for name in names(sides):
        damage(tmp_path / "shared" / name)
    assert fetch(plain, site, tmp_path, root=None).installed and len(site.visits) == 6
    assert verify(plain, root=tmp_path / "data").ok


@either_side
def test_another_length_is_noticed_when_pairs_are_read(plain, tmp_path, sides, monkeypatch):
    """Longer or shorter, though it can be read; the inventory looks the same way."""
    monkeypatch.setattr("smfnet.data.acquire.registry", lambda: {"toy": plain})
    for change in (lambda p: p.open("ab").write(b"x"), lambda p: png(p, np.zeros((64, 80), np.uint8))):
        shutil.copytree(tmp_path / "home", tmp_path / "data", dirs_exist_ok=True)
        assert len(get_pairs(plain, root=tmp_path / "data")) == 3
        assert [e["state"] for e in inventory(tmp_path / "data")] == ["here"]
        for name in names(sides):
            change(tmp_path / "data" / name)
        with pytest.raises(InputError, match=f"{names(sides)[0]}: missing or of another length"):
            get_pairs(plain, root=tmp_path / "data")
        assert get_pairs(plain, root=tmp_path / "data", strict=False).stems == ["0", "2"]
        assert [e["state"] for e in inventory(tmp_path / "data")] == ["2 of 3 here"]


@pytest.mark.parametrize("sides", [("Ir",), ("Vis",), ("Annotation",)], ids="+".join)
def test_a_hole_in_a_set_without_checksums(tmp_path, sides):
    """Its number of pairs is not known for sure, but a file without partner is."""
    make_m3fd(tmp_path / "M3FD/M3FD_Detection")

    def state():
        return next(e["state"] for e in inventory(tmp_path) if e["split"] == "detection")

    assert state() == "here"
    for side in sides:
        next((tmp_path / "M3FD/M3FD_Detection" / side).glob("00001.*")).unlink()
    assert state() == "damaged"


@pytest.mark.parametrize(
    "damage", [flip, lambda p: p.write_bytes(b"x"), lambda p: png(p, np.zeros((8, 8), np.uint8))]
)
@pytest.mark.parametrize("sides", [("Ir",), ("Vis",), ("Ir", "Vis")], ids="+".join)
def test_damage_in_a_set_without_checksums(tmp_path, sides, damage):
    """A damaged file is named; a smaller picture is no partner, unless both are smaller."""
    make_m3fd(tmp_path / "M3FD/M3FD_Detection", annotated=False)
    for side in sides:
        damage(tmp_path / f"M3FD/M3FD_Detection/{side}/00001.png")
    report, first = verify("M3FD", root=tmp_path), f"M3FD/M3FD_Detection/{sides[0]}/00001.png"
    if first in report.corrupt:
        assert list(report.corrupt) == [first] and not report.mismatched
    else:
        assert list(report.mismatched) == ["M3FD/M3FD_Detection/Ir/00001.png" if len(sides) == 1 else "00001"]
    assert not report.ok


def test_a_hole_in_a_listed_set(tmp_path):
    make_mfnet(tmp_path / "MFNet")
    (tmp_path / "MFNet/images/00001D.png").unlink()
    states = {e["split"]: e["state"] for e in inventory(tmp_path) if e["set"] == "MFNet"}
    assert states["train"] == "damaged" and states["val"] == "here"
