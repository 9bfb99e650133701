"""The official MSRS test split: proven pairs and masks, parts of it, and what is no part of it."""

import shutil
import zipfile
from pathlib import Path

import pytest
from datasets_toys import files_below, png, real, scenes  # noqa: F401  (fixtures)
from PIL import Image
from test_datasets_download import Site, fetch

from smfnet.cli import main
from smfnet.core.checks import InputError
from smfnet.data.acquire import STAGE, add, get, inventory, verify
from smfnet.data.classes import MFNET_CLASSES
from smfnet.data.matching import find_pairs
from smfnet.data.pairs import get_pairs
from smfnet.data.registry import coverage, find_set, pin_folder

OFFICIAL = find_set("MSRS").split("full-test")


@pytest.fixture
def masked(tmp_path):
    """A pinned set of four pairs with masks, published in home/."""
    for i, s in enumerate(scenes(4)):
        for side, image in (("ir", s.ir), ("vi", s.vis), ("masks", s.mask)):
            png(tmp_path / f"home/toy/test/{side}/{i}.png", image)
    return pin_folder("toy", tmp_path / "home", ["test"], url="http://127.0.0.1:1")


@pytest.fixture
def copy(masked, tmp_path):
    """A copy of that set to hurt."""
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def at_hand(real, tmp_path):  # noqa: F811
    """What the collection holds of the official split, in its layout: PNG as upstream, the rest as WebP."""
    if not (real / "MSRS/more_webp").is_dir():
        pytest.skip("SMFNET_DATA holds no further pairs of MSRS")
    stems, place = set(OFFICIAL.stems), tmp_path / "data/MSRS/full/test"
    for side in ("ir", "vi", "Segmentation_labels"):
        (place / side).mkdir(parents=True)
    for part in ("test", "more", "more_webp"):
        for path in sorted((real / "MSRS" / part).rglob("*.*")):
            if path.stem in stems:
                (place / path.parent.name / path.name).symlink_to(path)
    for path in (real / "MSRS/labels/segmentation").iterdir():
        (place / "Segmentation_labels" / path.name).symlink_to(path)
    return tmp_path / "data"


# --- the registry ---------------------------------------------------------------------------------


def test_the_split_is_proven():
    """361 pairs with masks, under the addresses of the official repository, counted by nobody else."""
    assert OFFICIAL.proven and OFFICIAL.count == len(OFFICIAL.pairs) == 361 and OFFICIAL.counted_by is None
    assert len({f.path for f in OFFICIAL.files}) == len({f.sha256 for f in OFFICIAL.files}) == 3 * 361
    upstream = {"ir": "ir", "vi": "vi", "Segmentation_labels": "Segmentation_labels"}
    for f in OFFICIAL.files:
        folder, name = f.path.removeprefix("MSRS/full/test/").split("/")
        assert f.origin == f"Linfeng-Tang/MSRS@main:test/{upstream[folder]}/{name}"
        assert f.url.endswith(f"/Linfeng-Tang/MSRS/main/test/{folder}/{name}")
    assert sum(f.bytes for f in OFFICIAL.files) == pytest.approx(158.6e6, rel=1e-3)
    assert any("branch main" in text for text in find_set("MSRS").unproven)


def test_the_other_split_is_partly_official():
    """21 of the 25 pairs are official by content, and these are test-clean."""
    content = {p.stem: p[1:3] for p in OFFICIAL.pairs}
    test = find_set("MSRS").split("test")
    same = {p.stem for p in test.pairs if p.stem in content if p.ir.sha256 == content[p.stem][0].sha256}
    assert same == set(find_set("MSRS").split("test-clean").stems) and len(same) == 21
    assert set(test.stems) - same == {"00556D", "00633D", "00881N", "01023N"}


def test_facts_are_those_of_the_lists(real):  # noqa: F811
    """Every length and checksum is that of the collection's lists."""
    if not (real / "MSRS/official_test.csv").is_file():
        pytest.skip("SMFNET_DATA holds no lists of the official split")
    import csv

    images = list(csv.DictReader((real / "MSRS/official_test.csv").open()))
    masks = list(csv.DictReader((real / "MSRS/official_test_masks.csv").open()))
    listed = {(r["stem"], r.get("side", "mask")): (int(r["bytes"]), r["sha256"]) for r in images + masks}
    sides = (("ir", "ir"), ("vi", "vis"), ("mask", "mask"))
    known = {(p.stem, side): getattr(p, name)[1:3] for p in OFFICIAL.pairs for side, name in sides}
    assert known == listed


# --- masks of a proven split ----------------------------------------------------------------------


def test_masks_are_fetched_verified_and_read(masked, tmp_path):
    site = Site(lambda path: (tmp_path / "home" / path).read_bytes())
    assert fetch(masked, site, tmp_path).installed and len(site.visits) == 12
    report = verify(masked, root=tmp_path / "data")
    assert report.ok and report.pairs == {"test": (4, 4)}
    assert "4 of 4 pairs and 4 of 4 masks as in the registry" in report.checked["test"]
    pairs = get_pairs(masked, root=tmp_path / "data")
    assert pairs[1].source.mask_classes == MFNET_CLASSES
    assert all((p.mask == s.mask).all() for p, s in zip(pairs, scenes(4)))
    lost = tmp_path / "data/toy/test/masks/2.png"
    lost.unlink()
    report = verify(masked, root=tmp_path / "data")
    assert list(report.missing) == ["toy/test/masks/2.png"] and report.pairs == {"test": (4, 4)}
    with pytest.raises(InputError, match="masks/2.png: missing"):
        get_pairs(masked, root=tmp_path / "data")
    site.visits.clear()
    fetch(masked, site, tmp_path)
    assert site.visits == {"toy/test/masks/2.png": 1} and verify(masked, root=tmp_path / "data").ok
    site.server.shutdown()
    site.server.server_close()


def test_masks_are_imported(masked, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for i, f in enumerate(masked.split().files):
            z.write(tmp_path / "home" / f.path, f"other/{i}.png")
    assert add(masked, tmp_path / "a.zip", root=tmp_path / "data").installed
    assert verify(masked, root=tmp_path / "data").ok
    (tmp_path / "home/toy/test/masks/3.png").unlink()
    with pytest.raises(InputError, match="only 11 of 12 files are there; missing masks/3.png"):
        add(masked, tmp_path / "home", root=tmp_path / "new")
    assert not files_below(tmp_path / "new")


def test_pairs_without_the_folder_of_masks_can_be_read(masked, copy):
    """For fusion no mask is needed; the check still names them."""
    shutil.rmtree(copy / "toy/test/masks")
    pairs = get_pairs(masked, root=copy)
    assert len(pairs) == 4 and pairs[0].mask is None and not pairs.notes
    assert list(verify(masked, root=copy).missing) == [f"toy/test/masks/{i}.png" for i in range(4)]


def test_a_folder_of_masks_that_lacks_one_cannot_be_pinned(masked, copy):
    (copy / "toy/test/masks/0.png").unlink()
    with pytest.raises(InputError, match="masks/0.png: no such mask"):
        pin_folder("toy", copy, ["test"])


# --- wrong content --------------------------------------------------------------------------------


def test_a_tampered_file(masked, copy):
    """One changed sample: readable, and not what the registry knows."""
    path = copy / "toy/test/ir/0.png"
    with Image.open(path) as im:
        changed = im.copy()
    changed.putpixel((3, 3), (changed.getpixel((3, 3)) + 1) % 256)
    changed.save(path)
    report = verify(masked, root=copy)
    assert "another image than the registry knows" in report.mismatched.pop("toy/test/ir/0.png")
    assert report.ok and report.pairs == {"test": (3, 4)}
    assert coverage(copy / "toy/test", masked, "test").unproven == ("0",)


def test_a_file_under_the_name_of_another_pair(masked, copy):
    shutil.copy(copy / "toy/test/vi/1.png", copy / "toy/test/vi/2.png")
    report = verify(masked, root=copy)
    assert report.mismatched == {"toy/test/vi/2.png": "has the content of toy/test/vi/1.png"}
    assert report.pairs == {"test": (3, 4)}
    assert coverage(copy / "toy/test", masked, "test").proven == ("0", "1", "3")


def test_the_mask_of_another_pair(masked, copy):
    shutil.copy(copy / "toy/test/masks/1.png", copy / "toy/test/masks/2.png")
    report = verify(masked, root=copy)
    assert report.mismatched == {"toy/test/masks/2.png": "has the content of toy/test/masks/1.png"}
    assert report.pairs == {"test": (4, 4)} and "3 of 4 masks" in report.checked["test"]


def test_another_container(masked, copy):
    """A lossless WebP stands in for its PNG, a broken one is unreadable, any other is extra."""
    for i in (0, 1):
        path = copy / f"toy/test/ir/{i}.png"
        with Image.open(path) as im:
            im.save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    (copy / "toy/test/ir/1.webp").write_bytes(b"RIFF")
    (copy / "toy/test/ir/2.txt").write_text("mine")
    shutil.copy(copy / "toy/test/ir/0.webp", copy / "toy/test/ir/3.webp")
    report = verify(masked, root=copy)
    assert "stands in for 0.png; even lossless" in report.mismatched["toy/test/ir/0.webp"]
    assert list(report.corrupt) == ["toy/test/ir/1.webp"] and not report.missing
    assert list(report.extra) == ["toy/test/ir/2.txt", "toy/test/ir/3.webp"]
    assert report.pairs == {"test": (2, 4)} and not report.ok


# --- parts ----------------------------------------------------------------------------------------


def test_a_part_is_counted(masked, copy, monkeypatch):
    """By verify, by the inventory, by reading and by coverage."""
    (copy / "toy/test/vi/1.png").unlink()
    assert verify(masked, root=copy).pairs == {"test": (3, 4)}
    pairs = get_pairs(masked, root=copy, strict=False)
    assert len(pairs) == 3 and f"3 of 4 pairs are in {copy / 'toy/test'}" in pairs.notes[0]
    assert str(coverage(pairs, masked, "test")) == "3 of 4"
    monkeypatch.setattr("smfnet.data.acquire.registry", lambda: {"toy": masked})
    assert [e["state"] for e in inventory(copy)] == ["3 of 4 here"]


def test_coverage_is_by_content(masked, copy):
    """Names do not matter, a pair counts once, and both of its files must be those of one pair."""
    place = copy / "toy/test"
    for side in ("ir", "vi"):
        shutil.copy(place / side / "0.png", place / side / "again.png")
        (place / side / "1.png").rename(place / side / "renamed.png")
    shutil.copy(place / "ir/0.png", place / "ir/mixed.png")
    shutil.copy(place / "vi/2.png", place / "vi/mixed.png")
    part = coverage(find_pairs(ir=place / "ir", vis=place / "vi"), masked, "test")
    assert part.proven == ("0", "1", "2", "3") and part.total == part.count == 4
    assert part.outside == ("mixed",) and not part.unproven
    assert coverage(get_pairs("scenes", "test"), "MSRS", "full-test").count == 0
    with pytest.raises(InputError, match="full-train: its checksums are not known"):
        coverage(place, "MSRS", "full-train")


def test_a_part_that_another_split_accounts_for(tmp_path):
    """One folder of a set of two overlapping splits: the whole one is installed, the other is no problem."""
    for part, numbers in (("small", (0, 1)), ("large", (1, 2, 3))):
        for i in numbers:
            for side, image in (("ir", scenes(4)[i].ir), ("vi", scenes(4)[i].vis)):
                png(tmp_path / f"home/toy/{part}/{side}/{i}.png", image)
    both = pin_folder("toy", tmp_path / "home", ["small", "large"])
    for part in ("small", "large"):
        outcome = add(both, tmp_path / "home/toy" / part, root=tmp_path / part)
        assert len(outcome.installed) == 1 and not outcome.problems
    shutil.rmtree(tmp_path / "home/toy/small")
    (tmp_path / "home/toy/large/ir/2.png").unlink()
    with pytest.raises(InputError, match="small: only 2 of 4 .*; toy large: only 5 of 6 .*missing ir/2.png"):
        add(both, tmp_path / "home", root=tmp_path / "new")


# --- what is at hand of the real split ------------------------------------------------------------


def test_what_is_at_hand(at_hand, real, capsys):  # noqa: F811
    """134 pairs are proven, 94 lie in another container, 133 are missing and named; 228 masks are proven."""
    report = verify("MSRS", root=at_hand)
    assert report.pairs == {"full-test": (134, 361)} and not report.ok
    assert "134 of 361 pairs and 228 of 361 masks as in the registry" in report.checked["full-test"]
    assert len(report.mismatched) == 2 * 94 and len(report.missing) == 3 * 133
    assert not report.extra and not report.corrupt
    assert all("stands in for" in why and path.endswith(".webp") for path, why in report.mismatched.items())
    absent = {Path(path).stem for path in report.missing}
    stood_in = {Path(path).stem for path in report.mismatched}
    assert len(absent) == 133 and len(stood_in) == 94 and not absent & stood_in
    lines = list(report.lines())
    assert f"  missing: and {3 * 133 - 20} more" in lines and sum("missing: MSRS" in x for x in lines) == 20
    pairs = get_pairs("MSRS", "full-test", root=at_hand, strict=False)
    assert len(pairs) == 134 and str(coverage(pairs, "MSRS", "full-test")) == "134 of 361"
    assert pairs[0].mask.shape == pairs[0].ir.shape == (480, 640)
    assert set(pairs.problems) == absent | stood_in
    part = coverage(at_hand / "MSRS/full/test", "MSRS", "full-test")
    assert part.proven == tuple(pairs.stems) and set(part.unproven) == stood_in and not part.outside
    assert main(["data", "verify", "MSRS", "--root", str(at_hand)]) == 1
    assert "134 of 361 pairs" in capsys.readouterr().out
    assert main(["data", "list", "--root", str(at_hand)]) == 0
    assert "134 of 361 here" in capsys.readouterr().out
    with pytest.raises(InputError, match="full-test: only 496 of 1083 files are there; missing"):
        add("MSRS", at_hand / "MSRS", root=at_hand / "new")


def test_the_25_pairs(real):  # noqa: F811
    """21 of them are official; the folder is as the registry says all the same."""
    part = coverage(real / "MSRS/test", "MSRS", "full-test")
    assert str(part) == "21 of 361" and part.proven == find_set("MSRS").split("test-clean").stems
    assert part.outside == ("00556D", "00633D", "00881N", "01023N")
    assert verify("MSRS", "test", root=real).ok


def test_a_server_that_has_a_part(at_hand, tmp_path):
    """The first absent file is named, nothing is installed, and what was checked is kept."""
    here = {f.url.split("/", 3)[3]: at_hand / f.path for f in OFFICIAL.files if (at_hand / f.path).is_file()}
    site = Site(lambda path: here[path].read_bytes())
    site.mood = lambda path, visit: None if path in here else 404
    first = next(f for f in OFFICIAL.files if f.url.split("/", 3)[3] not in here)
    with pytest.raises(InputError, match=f"{first.path}: the server answers 404"):
        get("MSRS", ["full-test"], root=tmp_path / "got", mirror=site.url, timeout=5, progress=False)
    kept = files_below(tmp_path / "got")
    assert len(kept) == OFFICIAL.files.index(first) and all(name.startswith(STAGE) for name in kept)
    site.server.shutdown()
    site.server.server_close()
