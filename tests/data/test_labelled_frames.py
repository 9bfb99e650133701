"""The labelled frames of MSRS: the stored division, the loader, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from datasets_toys import png, real, scenes  # noqa: F401  (fixtures)
from labelled_frames import TEST, TRAIN, write_frames
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data.acquire import inventory, verify
from smfnet.data.classes import MFNET_CLASSES, MSRS_BOX_CLASSES
from smfnet.data.pairs import _framed, get_pairs, read_boxes
from smfnet.data.registry import REGISTRY, check_frames, find_set, frame_parts, locate, registry

STORED = json.loads((REGISTRY.parent / "msrs_labelled.json").read_text())
OFFICIAL = {p.stem: p for p in find_set("MSRS").split("full-test").pairs}


@pytest.fixture
def toy_frames(tmp_path):
    return write_frames(tmp_path)


@pytest.fixture
def labelled(real):  # noqa: F811
    if not locate(find_set("MSRS-labelled").split("all"), root=real):
        pytest.skip("SMFNET_DATA holds no labelled frames of MSRS")
    return real


# --- the stored division --------------------------------------------------------------------------


def test_the_division_by_itself():
    """Read without any code of the package: names only, no frame twice, 20 numbers between the parts."""
    parts = [STORED[k] for k in ("train", "test", "between")]
    assert [len(p) for p in parts] == [128, 85, 15] and all(p == sorted(p) for p in parts)
    assert len({s for p in parts for s in p}) == 228
    train, test = (np.array([int(s[:5]) for s in p]) for p in parts[:2])
    assert abs(train[:, None] - test[None]).min() >= STORED["apart"] == 20
    lights = [{light: sum(s[5] == light for s in p) for light in "DN"} for p in parts[:2]]
    assert lights == [{"D": 65, "N": 63}, {"D": 41, "N": 44}]


def test_the_division_has_few_borders():
    """Whole blocks: sorted by number, the frames change from one part to another a few times only."""
    owner = {s: k for k in ("train", "test") for s in STORED[k]}
    in_turn = [owner[s] for s in sorted(owner)]
    assert sum(a != b for a, b in zip(in_turn, in_turn[1:])) <= 10


def test_no_fusion_network_saw_them():
    """All are of the official test part, by name; their content is in no training part of any set."""
    every = frame_parts("msrs_labelled.json")["all"]
    assert set(every) <= set(OFFICIAL) and len(every) == 228
    content = {f.sha256 for s in every for f in OFFICIAL[s].files[:2]}
    trained = [s for d in registry().values() for s in d.splits.values() if s.name.startswith("train")]
    assert len(trained) > 4 and not content & {f.sha256 for s in trained for f in s.files}
    weights = json.loads((REGISTRY.parent / "weights.json").read_text())["weights"]
    ours = {k: " ".join(w["training_data"]) for k, w in weights.items() if w["origin"] == "this project"}
    assert {"tiny", "paper"} <= set(ours)
    assert all(("MRI" in text) or text.startswith("RoadScene train") for text in ours.values())
    assert not any("MSRS" in text for text in ours.values())


def test_the_25_pairs_of_msrs():
    """Of the 25 pairs that go round, exactly the 21 official ones are labelled frames."""
    every, handed = set(frame_parts("msrs_labelled.json")["all"]), set(find_set("MSRS").split("test").stems)
    assert every & handed == set(find_set("MSRS").split("test-clean").stems)
    assert handed - every == {"00556D", "00633D", "00881N", "01023N"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"test": ["00023D"]}, "train and test share 1 place.*00004D and 00023D, 19 frames apart"),
        ({"test": ["00004D"]}, "0 frames apart"),
        ({"train": ["night"]}, "'night': the name of a frame begins with its number"),
        ({"between": ["00004D"]}, "parts.json: names a frame twice"),
        ({"apart": None}, "no readable division"),
        ({"test": None}, "no readable division"),
    ],
)
def test_a_division_that_leaks(tmp_path, change, reason):
    stored = {"apart": 20, "train": ["00004D"], "test": ["00040D"], "between": []}
    file = tmp_path / "parts.json"
    file.write_text(json.dumps(stored))
    assert frame_parts(str(file))["test"] == ("00040D",)
    frame_parts.cache_clear()
    file.write_text(json.dumps(stored | change))
    with pytest.raises(InputError, match=reason):
        frame_parts(str(file))
    file.unlink()
    with pytest.raises(InputError, match="no readable division"):
        frame_parts(str(file))


def test_the_nearest_frames_are_found_in_any_order():
    """A leak is found wherever it stands in the lists, and 20 numbers are enough."""
    far = {"train": ["00100D", "00000N"], "test": ["00080D", "00020N", "00060D"]}
    check_frames(far)
    with pytest.raises(InputError, match="00080D and 00099N"):
        check_frames(far | {"train": [*far["train"], "00099N"]})


# --- the loader -----------------------------------------------------------------------------------


def test_frames_of_several_folders(toy_frames, tmp_path):
    """Each frame is read from the folder that has it; parts hold what the division says."""
    both = get_pairs(toy_frames, "all", root=tmp_path)
    assert both.stems == sorted((*TRAIN, *TEST)) and not both.notes
    assert [get_pairs(toy_frames, k, root=tmp_path).stems for k in ("train", "test")] == [[*TRAIN], [*TEST]]
    for p, s in zip((both.pair(stem) for stem in (*TRAIN, *TEST)), scenes(4)):
        np.testing.assert_array_equal(np.rint(p.ir * 255), s.ir)
        assert p.mask.shape == (64, 80) and p.source.mask_classes == MFNET_CLASSES
        np.testing.assert_allclose(p.boxes.boxes, [[16, 16, 24, 48], [30, 16, 50, 48]], atol=1e-3)
        assert p.boxes.classes == MSRS_BOX_CLASSES and p.boxes.labels.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a/ir/00004D.png", "a/ir: no partner of .*a/vi/00004D.png; add it"),
        ("a/vi/00004D.png", "a/vi: no partner of .*a/ir/00004D.png; add it"),
        ("labels/segmentation/00004D.png", "labels/segmentation: no mask 00004D.png; smfnet data get toy"),
        ("labels/detection/fusion/00004D.txt", "fusion: no annotation for 00004D; smfnet data get toy"),
    ],
)
def test_missing_partners(toy_frames, tmp_path, path, reason):
    (tmp_path / "toy" / path).unlink()
    with pytest.raises(InputError, match=reason):
        get_pairs(toy_frames, "train", root=tmp_path)
    loose = get_pairs(toy_frames, "train", root=tmp_path, strict=False)
    assert loose.stems == ["00008N"] and list(loose.problems) == ["00004D"]
    assert get_pairs(toy_frames, "test", root=tmp_path).stems == [*TEST]


def test_missing_frames_and_folders(toy_frames, tmp_path):
    """A frame that is nowhere, and a root without any boxes, say how to get them."""
    for side in ("ir", "vi"):
        (tmp_path / f"toy/a/{side}/00004D.png").unlink()
    with pytest.raises(InputError, match="no image 00004D in a, b; smfnet data get toy says how"):
        get_pairs(toy_frames, "train", root=tmp_path)
    shutil.rmtree(tmp_path / "toy/labels")
    with pytest.raises(InputError, match="no folder toy/labels/detection/fusion in .*Lele-3"):
        get_pairs(toy_frames, "train", root=tmp_path)


@pytest.mark.parametrize(
    ("shape", "value", "reason"),
    [((64, 60), 0, "60×64 pixels, but its images have 80×64"), ((64, 80), 9, "class 9 is not one of the 9")],
)
def test_masks_that_do_not_fit(toy_frames, tmp_path, shape, value, reason):
    png(tmp_path / "toy/labels/segmentation/00004D.png", np.full(shape, value, np.uint8))
    with pytest.raises(InputError, match=f"segmentation/00004D.png: .*{reason}"):
        get_pairs(toy_frames, "train", root=tmp_path).pair("00004D").mask  # noqa: B018


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3 0.5 0.5 0.1 0.1", "class '3' is not one of person, bicycle, car"),
        ("-1 0.5 0.5 0.1 0.1", "class '-1' is not one of"),
        ("0 0.98 0.5 0.1 0.1", "box 74.4 28.8 82.4 35.2 of person is empty or outside the image"),
        ("0 0.5 0.02 0.1 0.1", "outside the image"),
        ("0 0.5 0.5 0 0.1", "is empty"),
        ("0 0.5 0.5 nan 0.1", "is empty or outside"),
        ("0 0.5 0.5 0.1", "not a readable annotation"),
        ("0 0.5 0.5 0.1 0.1 0.9", "not a readable annotation"),
        ("car 0.5 0.5 0.1 0.1", "not a readable annotation"),
        ("\x00\xff", "not a readable annotation"),
    ],
)
def test_boxes_that_do_not_fit(toy_frames, tmp_path, text, reason):
    (tmp_path / "toy/labels/detection/fusion/00004D.txt").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"fusion/00004D.txt: .*{reason}"):
        get_pairs(toy_frames, "train", root=tmp_path).pair("00004D").boxes  # noqa: B018


def test_boxes_at_the_border_and_none(tmp_path):
    """A border that is off by rounding is a border; an empty file holds no object; a size is needed."""
    file = tmp_path / "a.txt"
    file.write_text("2 0.08216594827586218 0.5 0.16433189655172436 1.0000000000000002\n")
    (box,) = read_boxes(file, classes=MSRS_BOX_CLASSES, size=(480, 640)).boxes
    np.testing.assert_allclose(box, [0, 0, 105.172, 480], atol=1e-3)
    with pytest.raises(InputError, match="need its size"):
        read_boxes(file, classes=MSRS_BOX_CLASSES)
    file.write_text("")
    assert read_boxes(file, classes=MSRS_BOX_CLASSES, size=(480, 640)).boxes.shape == (0, 4)


# --- the real frames ------------------------------------------------------------------------------


def test_all_frames_load(labelled):
    """228 pairs, of which every third is decoded; masks are the official ones, by their bytes."""
    pairs = get_pairs("MSRS-labelled", "all", root=labelled)
    assert len(pairs) == 228 and not pairs.problems
    counts = np.zeros(3, int)
    for p in pairs:
        boxes = p.boxes
        counts += np.bincount(boxes.labels, minlength=3)
        assert p.source.mask.stat().st_size == OFFICIAL[p.stem].mask.bytes
    assert counts.tolist() == [577, 74, 297]
    for p in pairs[::3]:
        assert p.mask.shape == p.ir.shape == p.vis.shape == (480, 640) and p.mask.max() <= 8


def test_another_image_under_the_name_of_a_frame(labelled, tmp_path):
    """Found by its length, as in every proven split; a folder with the official layout is enough."""
    place, stem = tmp_path / "MSRS", "00115D"
    source = labelled / "MSRS"
    for part, where in (("more/ir", "full/test/ir"), ("more/vi", "full/test/vi")):
        (place / where).mkdir(parents=True)
        shutil.copy(source / part / f"{stem}.png", place / where)
    for part, where in (
        (f"segmentation/{stem}.png", "full/test/Segmentation_labels"),
        (f"detection/fusion/{stem}.txt", "labels/detection/fusion"),
    ):
        (place / where).mkdir(parents=True)
        shutil.copy(source / "labels" / part, place / where)
    loose = get_pairs("MSRS-labelled", "test", root=tmp_path, strict=False)
    assert loose.stems == [stem] and len(loose.problems) == 84 and loose[0].mask.shape == (480, 640)
    Image.fromarray(np.eye(480, 640, dtype=np.uint8)).save(place / f"full/test/ir/{stem}.png")
    with pytest.raises(InputError, match="no pair is left"):
        get_pairs("MSRS-labelled", "test", root=tmp_path, strict=False)
    labelled_set = find_set("MSRS-labelled")
    problem = _framed(labelled_set, labelled_set.split("test"), place).problems[stem]
    assert f"full/test/ir/{stem}.png: of another length than the registry says; copy" in problem


def test_listed_and_verified(toy_frames, tmp_path, labelled):
    """The inventory finds the frames, and a folder in this layout is verified by its structure."""
    states = {e["split"]: e["state"] for e in inventory(labelled) if e["set"] == "MSRS-labelled"}
    assert states == {"all": "here", "train": "here", "test": "here"}
    report = verify(toy_frames, "all", root=tmp_path)
    assert report.ok and report.checked["all"].startswith("4 pairs")
    png(tmp_path / "toy/labels/segmentation/00004D.png", np.full((64, 60), 0, np.uint8))
    report = verify(toy_frames, "all", root=tmp_path)
    assert list(report.mismatched) == ["00004D"]
