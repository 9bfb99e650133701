"""The registry, what `add` and `verify` make of the layouts of all sets, and splits that share no content."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets_toys import files_below, png, real, scenes, toy  # noqa: F401  (fixtures)

from smfnet.core.checks import InputError
from smfnet.core.download import FETCHED_FROM
from smfnet.core.provenance import sha256
from smfnet.data.acquire import add, unpack, verify
from smfnet.data.classes import M3FD_CLASSES
from smfnet.data.images import write_image
from smfnet.data.pairs import get_pairs
from smfnet.data.patches import ROADSCENE_SAME_SCENE
from smfnet.data.pixels import read_pixels
from smfnet.data.registry import REGISTRY, data_roots, find_set, locate, registry

README_COUNTS = {
    ("TNO", "test"): 25,
    ("RoadScene", "test"): 50,
    ("RoadScene", "train"): 171,
    ("MSRS", "test"): 25,
    ("MRI-CT", "test"): 21,
    ("MRI-CT", "train"): 163,
    ("MRI-PET", "test"): 42,
    ("MRI-PET", "train"): 269,
    ("MRI-SPECT", "test"): 73,
    ("MRI-SPECT", "train"): 290,
}
OFFICIAL_COUNTS = {("MSRS", "full-test"): 361}  # proven by checksums, partly in the collection


# --- the registry ---------------------------------------------------------------------------------


def test_counts():
    """What is proven has the counts of the collection that it was proven on."""
    proven = {
        (d.name, s.name): s.count
        for d in registry().values()
        for s in d.splits.values()
        if s.proven and not s.of
    }
    assert proven == README_COUNTS | OFFICIAL_COUNTS


def test_one_list_of_same_scene_frames():
    """The frames that the training code leaves out are those of the registry."""
    assert set(find_set("RoadScene").split("train-disjoint").leave_out) == set(ROADSCENE_SAME_SCENE)


def test_file_is_small_and_has_only_https_homes_of_the_sets():
    assert REGISTRY.stat().st_size < 1_500_000
    for d in registry().values():
        for f in (f for s in d.splits.values() for f in s.files):
            assert f.url.startswith(FETCHED_FROM + "/") and " " not in f.url and f.bytes < 2_000_000


def test_splits_share_no_bytes():
    """By the checksums of the registry, in every set and across the sets."""
    test, official, train = (
        {f.sha256 for d in registry().values() if part in d.splits for f in d.splits[part].files}
        for part in ("test", "full-test", "train")
    )
    assert len(test) > 400 and len(train) > 1700 and len(official) == 3 * 361
    assert not (test | official) & train


def test_splits_share_no_pixels(real):  # noqa: F811
    """By the decoded images: the same picture as grey or as RGB, or encoded otherwise, is found too."""
    seen: dict[bytes, tuple] = {}
    for part in ("test", "train"):
        for d in registry().values():
            if part not in d.splits or not d.splits[part].proven:
                continue
            for f in d.splits[part].files:
                values = read_pixels(real / f.path).values
                if values.ndim == 3 and (values[..., :1] == values).all():
                    values = values[..., 0]
                key = (values.shape, hash(values.tobytes()))
                assert seen.setdefault(key, (part, f.path))[0] == part, (
                    f"{f.path} has the pixels of {seen[key]}"
                )
    assert len(seen) > 2000


def test_every_real_set_loads_with_its_count(real):  # noqa: F811
    for (name, split), count in README_COUNTS.items():
        pairs = get_pairs(name, split, root=real)
        assert len(pairs) == count and not pairs.notes
        for p in (pairs[0], pairs[-1]):
            assert (
                p.ir.shape == p.vis.shape and p.ir.dtype == np.float32 and 0 <= p.vis.min() < p.vis.max() <= 1
            )
    assert len(get_pairs("RoadScene", "train-disjoint", root=real)) == 160


def test_colour_survives(real, tmp_path):  # noqa: F811
    """Luminance and chroma of a PET image give its file back, sample by sample."""
    p = get_pairs("MRI-PET", "test", root=real)[3]
    write_image(tmp_path / "x.png", p.vis, p.chroma)
    np.testing.assert_array_equal(read_pixels(tmp_path / "x.png").values, read_pixels(p.source.vis).values)


def test_real_set_goes_through_an_archive(real, tmp_path):  # noqa: F811
    """A zip laid out as the upstream repository has it."""
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as z:
        for f in find_set("TNO").split("test").files:
            z.write(real / f.path, "repo-main/" + f.origin.split(":")[1])
    assert add("TNO", tmp_path / "up.zip", root=tmp_path / "data").installed
    assert verify("TNO", root=tmp_path / "data").ok


# --- places ---------------------------------------------------------------------------------------


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMFNET_DATA", raising=False)
    assert data_roots() == [Path("data")] and data_roots("x") == [Path("x")]
    for part in ("a", "data"):
        (tmp_path / part / "TNO/test").mkdir(parents=True)
    assert locate(find_set("TNO").split()) == Path("data")
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path / "a"))
    assert locate(find_set("TNO").split()) == tmp_path / "a"
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path / "gone"))
    assert locate(find_set("TNO").split()) == Path("data")


def test_writing_goes_to_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMFNET_DATA", str(tmp_path / "shared"))
    make_mfnet(tmp_path / "source")
    add("MFNet", "source")
    assert (tmp_path / "data/MFNet/images").is_dir() and not (tmp_path / "shared").exists()


# --- the layouts of sets that are not at hand -----------------------------------------------------

VOC = "<annotation><filename>x</filename>{}</annotation>"
OBJECT = (
    "<object><name>{}</name><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    "</bndbox></object>"
)


def make_m3fd(folder: Path, *, annotated=True) -> None:
    for i, s in enumerate(scenes()):
        png(folder / f"Ir/{i:05d}.png", s.ir)
        png(folder / f"Vis/{i:05d}.png", s.vis)
        if annotated:
            (folder / "Annotation").mkdir(exist_ok=True)
            objects = "".join(
                OBJECT.format(M3FD_CLASSES[k].capitalize(), *map(int, b)) for k, b in zip(s.labels, s.boxes)
            )
            (folder / f"Annotation/{i:05d}.xml").write_text(VOC.format(objects))


def make_mfnet(folder: Path, lists=(("train", (0, 1)), ("val", (2,)), ("test", (2,)))) -> None:
    for i, s in enumerate(scenes()):
        png(folder / f"images/{i:05d}D.png", np.dstack([s.vis, s.ir]))
        png(folder / f"labels/{i:05d}D.png", s.mask)
    for name, members in lists:
        (folder / f"{name}.txt").write_text("".join(f"{i:05d}D\n" for i in members))


def test_m3fd(tmp_path):
    make_m3fd(tmp_path / "down/M3FD_Detection")
    make_m3fd(tmp_path / "down/M3FD_Fusion", annotated=False)
    outcome = add("M3FD", tmp_path / "down", root=tmp_path / "data")
    assert len(outcome.installed) == 2 and any("the paper counts 4200" in n for n in outcome.notes)
    pairs = get_pairs("m3fd", "detection", root=tmp_path / "data")
    assert pairs.stems == ["00000", "00001", "00002"]
    for p, s in zip(pairs, scenes()):
        np.testing.assert_array_equal(np.rint(p.ir * 255), s.ir)
        np.testing.assert_array_equal(p.boxes.boxes, s.boxes.astype(int))
        assert p.boxes.labels.tolist() == s.labels.tolist() and p.mask is None and p.chroma is not None
    assert get_pairs("M3FD", "fusion", root=tmp_path / "data")[0].boxes is None
    report = verify("M3FD", root=tmp_path / "data")
    assert (
        report.ok
        and sorted(report.checked) == ["detection", "fusion"]
        and any("share the content" in n for n in report.notes)
    )


def test_m3fd_in_lower_case_inside_a_zip(tmp_path):
    make_m3fd(tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as z:
        for name in files_below(tmp_path / "x"):
            z.write(tmp_path / "x" / name, f"deep/er/{name.lower()}")
    assert add("M3FD", tmp_path / "m.zip", root=tmp_path / "data").installed
    assert len(get_pairs("M3FD", "detection", root=tmp_path / "data")) == 3


def test_m3fd_with_faults_is_not_installed(tmp_path):
    make_m3fd(tmp_path / "x")
    (tmp_path / "x/Vis/00001.png").unlink()
    (tmp_path / "x/Ir/00000.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="00001.*no visible partner|00000.*not a readable") as e:
        add("M3FD", tmp_path / "x", root=tmp_path / "data")
    assert "00001" in str(e.value) and "00000" in str(e.value) and not files_below(tmp_path / "data")


def test_m3fd_annotation_missing_or_wrong(tmp_path):
    make_m3fd(tmp_path / "data/M3FD/M3FD_Detection")
    annotations = tmp_path / "data/M3FD/M3FD_Detection/Annotation"
    (annotations / "00000.xml").unlink()
    (annotations / "00001.xml").write_text(VOC.format(OBJECT.format("Dog", 1, 1, 5, 5)))
    report = verify("M3FD", root=tmp_path / "data")
    assert (
        list(report.missing) == ["00000"]
        and list(report.mismatched) == ["00001"]
        and "Dog" in report.mismatched["00001"]
    )


def test_mfnet(tmp_path):
    make_mfnet(tmp_path / "down/ir_seg_dataset")
    with tarfile.open(tmp_path / "mf.tar.gz", "w:gz") as t:
        t.add(tmp_path / "down", "down")
    outcome = add("MFNet", tmp_path / "mf.tar.gz", root=tmp_path / "data")
    assert len(outcome.installed) == 3
    pairs = get_pairs("MFNet", "train", root=tmp_path / "data")
    assert pairs.stems == ["00000D", "00001D"]
    for p, s in zip(pairs, scenes()):
        np.testing.assert_array_equal(np.rint(p.ir * 255), s.ir)
        np.testing.assert_array_equal(p.mask, s.mask)
        write_image(tmp_path / "c.png", p.vis, p.chroma)
        np.testing.assert_array_equal(read_pixels(tmp_path / "c.png").values, s.vis)
    assert verify("MFNet", root=tmp_path / "data").ok
    with pytest.raises(InputError, match="MFNet test-day: no folder"):
        get_pairs("MFNet", "test-day", root=tmp_path / "data")


def test_mfnet_faults_are_named(tmp_path):
    make_mfnet(tmp_path / "MFNet", [("train", (0, 1, 7)), ("test", (2,))])
    (tmp_path / "MFNet/train.txt").open("a").write("00000D_flip\n")
    png(tmp_path / "MFNet/images/00001D.png", scenes()[1].vis)  # three channels
    png(tmp_path / "MFNet/labels/00002D.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match="names 00007D"):
        get_pairs("MFNet", "train", root=tmp_path)
    report = verify("MFNet", root=tmp_path)
    assert (
        list(report.missing) == ["00007D"]
        and "8×8" in report.mismatched["00002D"]
        and "stored as RGB" in report.mismatched["00001D"]
    )


def test_full_msrs(tmp_path):
    """The official layout becomes full-train; invented images are not full-test, which is proven."""
    for part, seed in (("train", 0), ("test", 1)):
        for i, s in enumerate(scenes(seed=seed)):
            for sub, image in (("ir", s.ir), ("vi", s.vis), ("Segmentation_labels", s.mask)):
                png(tmp_path / f"MSRS-main/{part}/{sub}/{i:05d}N.png", image)
    outcome = add("MSRS", tmp_path / "MSRS-main", root=tmp_path / "data")
    (line,), (problem,) = outcome.installed, outcome.problems
    assert "full-train: 3 pairs" in line and not (tmp_path / "data/MSRS/full/test").exists()
    assert f"MSRS full-test: {tmp_path / 'MSRS-main/test'} has its layout, but none of its files" in problem
    pairs = get_pairs("MSRS", "full-train", root=tmp_path / "data")
    assert len(pairs) == 3 and any("1083" in n for n in pairs.notes)
    np.testing.assert_array_equal(pairs[0].mask, scenes()[0].mask)
    with pytest.raises(InputError, match="is there already"):
        add("MSRS", tmp_path / "MSRS-main", root=tmp_path / "data")
    png(tmp_path / "data/MSRS/full/test/vi/00004N.png", scenes()[0].vis)  # a training image in the test part
    assert any(
        "full-train and full-test share the content of 1 files" in n
        for n in verify("MSRS", root=tmp_path / "data").notes
    )


def test_own_folders(tmp_path):
    s = scenes()[0]
    for stem in "ab":
        png(tmp_path / f"thermal/{stem}.png", s.ir.astype(np.uint16) * 100 + 5000)
        png(tmp_path / f"colour/{stem}.png", s.vis)
    pairs = get_pairs(ir=tmp_path / "thermal", vis=tmp_path / "colour", leave_out=["b"])
    assert (
        pairs.stems == ["a"]
        and pairs.pair("a").ir.max() == 1
        and "infrared range" in pairs[0].content.notes[0]
    )
    png(tmp_path / "colour/a.bmp", s.vis)
    with pytest.raises(InputError, match="same name twice"):
        get_pairs(ir=tmp_path / "thermal", vis=tmp_path / "colour")


# --- partial and wrong sources --------------------------------------------------------------------


def test_partial_folder_installs_what_is_complete(toy, tmp_path):  # noqa: F811
    (tmp_path / "home/toy/train/vi/1.png").unlink()
    outcome = add(toy, tmp_path / "home", root=tmp_path / "data")
    assert ["toy test" in line for line in outcome.installed] == [
        True
    ] and "missing vi/1.png" in outcome.problems[0]
    assert verify(toy, root=tmp_path / "data").ok and not (tmp_path / "data/toy/train").exists()


def test_altered_file_is_not_installed(toy, tmp_path):  # noqa: F811
    path = tmp_path / "home/toy/test/ir/0.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    outcome = add(toy, tmp_path / "home", root=tmp_path / "data")
    assert "missing ir/0.png" in outcome.problems[0] and not (tmp_path / "data/toy/test").exists()


def test_source_is_not_changed_and_doubles_are_copied(toy, tmp_path):  # noqa: F811
    before = sha256(tmp_path / "home")
    add(toy, tmp_path / "home", root=tmp_path / "data")
    assert sha256(tmp_path / "home") == before == sha256(tmp_path / "data")


def test_unwritable_root(toy, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        add(toy, tmp_path / "home", root=tmp_path / "file")


@pytest.mark.parametrize("cut", [30, 2000])
def test_truncated_archives(toy, tmp_path, cut):  # noqa: F811
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.add(tmp_path / "home", "home")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for name in files_below(tmp_path / "home"):
            z.write(tmp_path / "home" / name, name)
    for name in ("a.zip", "a.tar.gz"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) - cut])
        with pytest.raises(InputError, match="damaged or incomplete|no readable"):
            add(toy, tmp_path / name, root=tmp_path / "data")
    assert not files_below(tmp_path / "data")


def test_damaged_member(toy, tmp_path):  # noqa: F811
    """A flipped bit inside a zip is found by its checksum."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(tmp_path / "home/toy/test/ir/0.png", "0.png")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[400] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match="damaged or incomplete"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "device", "absolute", "dots"])
def test_hostile_tar(tmp_path, kind):
    with tarfile.open(tmp_path / "bad.tar", "w") as t:
        m = tarfile.TarInfo({"absolute": "/etc/a.png", "dots": "x/../../a.png"}.get(kind, "a.png"))
        m.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}.get(
            kind, tarfile.REGTYPE
        )
        m.linkname = "/etc/passwd" if "link" in kind else ""
        m.size = 3 if m.type == tarfile.REGTYPE else 0
        t.addfile(m, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match="do not trust"):
        unpack(tmp_path / "bad.tar", tmp_path / "out")
    assert not files_below(tmp_path / "out") and not (tmp_path / "a.png").exists()


def test_link_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z:
        info = zipfile.ZipInfo("a.png")
        info.external_attr = 0o120777 << 16
        z.writestr(info, "/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")


def test_bomb_is_stopped_while_unpacking(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.png", bytes(3 << 20))
    with pytest.raises(InputError, match="bomb"):
        unpack(tmp_path / "bomb.zip", tmp_path / "out", largest=1 << 20)
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*")) <= 1 << 20


def test_same_member_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z, pytest.warns(UserWarning):
        z.writestr("a.png", b"1")
        z.writestr("a.png", b"2")
    with pytest.raises(InputError, match="twice"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_encrypted_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("a.png", b"1")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the central directory says "encrypted"
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match="encrypted"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
