"""Slips that a reader planted in acquisition and that no test had noticed; each test is for their kind."""

import dataclasses
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets_toys import files_below, png, scenes, toy  # noqa: F401  (fixture)
from PIL import Image
from test_datasets_download import fetch, site  # noqa: F401  (fixture)
from test_datasets_registry import OBJECT, VOC, make_m3fd, make_mfnet

from smfnet.core.checks import InputError
from smfnet.data.acquire import add, get, inventory, unpack, verify
from smfnet.data.images import common_range, read_image
from smfnet.data.matching import find_pairs
from smfnet.data.pairs import get_pairs, read_boxes
from smfnet.data.registry import data_roots, write_root

# --- splits that share files ------------------------------------------------------------------------------


@pytest.fixture
def parted(toy):  # noqa: F811
    """The toy set with a part of its test split."""
    test = toy.split("test")
    pairs = tuple(p for p in test.pairs if p.stem != "1")
    part = dataclasses.replace(test, name="part", of="test", leave_out=("1",), count=2, pairs=pairs)
    return dataclasses.replace(toy, splits={**toy.splits, "part": part})


def test_a_part_of_a_split_is_no_split_to_verify_or_fetch(parted, site, tmp_path):  # noqa: F811
    """What a part leaves out is no stranger, and asked for the part, one gets the whole."""
    assert fetch(parted, site, tmp_path, splits=["part"]).installed and len(site.visits) == 6
    assert len(get_pairs(parted, "part", root=tmp_path / "data")) == 2
    for folder in ("home", "data"):
        report = verify(parted, root=tmp_path / folder)
        assert report.ok and not report.notes and "part" not in report.checked
    assert sorted(report.checked) == ["test"] and report.pairs == {"test": (3, 3)}


def test_lists_of_one_folder_share_it_silently(tmp_path):
    """MFNet's lists of day and night name files of the test list; that is no doubled content, a copy is."""
    lists = [("train", (0,)), ("test", (1, 2)), ("test_day", (1,)), ("test_night", (2,))]
    make_mfnet(tmp_path / "MFNet", lists)
    assert not any("share the" in note for note in verify("MFNet", root=tmp_path).notes)
    shutil.copy(tmp_path / "MFNet/images/00001D.png", tmp_path / "MFNet/images/00000D.png")
    notes = verify("MFNet", root=tmp_path).notes
    assert any("train and test share the content of 1 files" in note for note in notes)


def test_a_place_that_is_named_receives_the_set(toy, site, tmp_path, monkeypatch):  # noqa: F811
    """Though it is complete where reading looks first; only without a name is nothing to be done."""
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path / "home"))
    outcome = fetch(toy, site, tmp_path, splits=["test"])
    assert len(outcome.installed) == 1 and not outcome.notes and len(site.visits) == 6
    assert verify(toy, "test", root=tmp_path / "data").pairs == {"test": (3, 3)}


def test_the_home_folder_may_be_written_as_a_tilde(toy, tmp_path, monkeypatch):  # noqa: F811
    """In the variable, where no shell replaces it, and in arguments."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SMFNET_DATA", "~/home")
    monkeypatch.chdir(tmp_path)
    assert data_roots() == [tmp_path / "home", Path("data")] and len(get_pairs(toy, "test")) == 3
    assert data_roots("~/home") == [tmp_path / "home"] and write_root("~/x") == tmp_path / "x"


# --- archives and folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_size_of_all_members_together_is_bounded(tmp_path, kind):
    """None of four members is too large, but three of them are; up to there all is well."""
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        (tmp_path / name).write_bytes(bytes(400_000))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "a", "w") as z:
            for name in names:
                z.write(tmp_path / name, name)
    else:
        with tarfile.open(tmp_path / "a", "w") as t:
            for name in names:
                t.add(tmp_path / name, name)
    assert unpack(tmp_path / "a", tmp_path / "all", largest=1_600_000) == 4
    with pytest.raises(InputError, match="bomb"):
        unpack(tmp_path / "a", tmp_path / "out", largest=1_000_000)


def test_of_two_folders_that_look_alike_none_is_taken(tmp_path):
    """Neither for listed pictures nor for pairs; one of them can be given."""
    for name, make in (("MFNet", make_mfnet), ("M3FD", make_m3fd)):
        for copy in "ab":
            make(tmp_path / name / copy)
        with pytest.raises(InputError, match=f"2 folders look like {name}.*give one of them"):
            add(name, tmp_path / name, root=tmp_path / "data")
        assert not files_below(tmp_path / "data")
        assert add(name, tmp_path / name / "b", root=tmp_path / "data").installed
        shutil.rmtree(tmp_path / "data")


def test_the_list_promises_only_what_can_be_fetched(tmp_path, monkeypatch):
    """Every split `to get` would be fetched if there were space, and every other says how to get it."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})())
    told = {"to get": "are needed", "to add by hand": "cannot be fetched automatically"}
    states = set()
    for entry in inventory(tmp_path):
        if entry["state"] == "rendered":
            continue
        states.add(entry["state"])
        with pytest.raises(InputError, match=told[entry["state"]]):
            get(entry["set"], [entry["split"]], root=tmp_path, progress=False)
    assert states == set(told)


# --- your own folders -------------------------------------------------------------------------------------


def test_masks_and_boxes_beside_two_folders_are_found(tmp_path):
    """Given one by one or by the folder that holds them, the same pairs."""
    s = scenes()[0]
    for name, image in (("ir/a", s.ir), ("vi/a", s.vis), ("masks/a", s.mask)):
        png(tmp_path / f"{name}.png", image)
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes/a.xml").write_text(VOC.format(OBJECT.format("Car", 1, 2, 5, 6)))
    for pairs in (get_pairs(tmp_path), get_pairs(ir=tmp_path / "ir", vis=tmp_path / "vi")):
        np.testing.assert_array_equal(pairs[0].mask, s.mask)
        assert pairs[0].boxes.boxes.tolist() == [[1, 2, 5, 6]]


@pytest.mark.parametrize(
    "box", [(5, 1, 5, 9), (1, 5, 9, 5), (9, 1, 5, 9), (1, 9, 9, 5), (-1, 1, 5, 9), (1, -1, 9, 5)]
)
def test_a_box_without_area_or_outside_is_refused(tmp_path, box):
    """On either axis."""
    (tmp_path / "a.xml").write_text(VOC.format(OBJECT.format("Car", *box)))
    with pytest.raises(InputError, match=r"a.xml: box .* of Car is empty or outside"):
        read_boxes(tmp_path / "a.xml", classes=("car",))


@pytest.mark.parametrize("spelling", ["link", "dots"])
def test_one_folder_under_two_names_is_no_pair(tmp_path, spelling):
    """A link, or a way round; nor is one file."""
    png(tmp_path / "ir/a.png", scenes()[0].ir)
    os.symlink(tmp_path / "ir", tmp_path / "vi")
    other = {"link": tmp_path / "vi", "dots": tmp_path / "ir" / ".." / "ir"}[spelling]
    for end in ("", "a.png"):
        with pytest.raises(InputError, match="given as infrared and as visible"):
            find_pairs(ir=tmp_path / "ir" / end, vis=other / end)


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.9), (0.1, 1.1), (-5, 300)])
def test_floats_beyond_black_or_white_have_no_range(tmp_path, low, high):
    """Visible ones; nothing is clipped that nobody asked to clip."""
    values = np.linspace(low, high, 400, dtype=np.float32).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="give --vis-range"):
        read_image(tmp_path / "x.tif", modality="vis")
    found = read_image(tmp_path / "x.tif", modality="vis", range=(low, high)).luminance
    np.testing.assert_allclose(found, (values - low) / (high - low), atol=1e-5)


@pytest.mark.parametrize("brightest", [0, 1, 2])
def test_the_range_of_a_series_is_that_of_its_brightest_file(tmp_path, brightest):
    """Wherever in the series it stands: 14 bits among pictures of 10 to 12."""
    tops = [900, 1800, 3600]
    tops[brightest] = 16000
    for i, top in enumerate(tops):
        values = np.linspace(0, top, 400).astype(np.uint16).reshape(20, 20)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    assert common_range(sorted(tmp_path.glob("*.png"))) == (0, 16383)


@pytest.mark.parametrize("modality", ["ir", "vis"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_given_range_counts_at_every_depth(tmp_path, modality, dtype):
    """Also where the format has a white of its own."""
    values = np.linspace(0, 255, 400).astype(dtype).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", modality=modality, range=(50, 150)).luminance
    np.testing.assert_allclose(found, np.clip((values.astype(float) - 50) / 100, 0, 1), atol=1e-6)
