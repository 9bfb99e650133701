"""Divisions of frames into blocks, and the labelled frames of MSRS as parts for segmenters and detectors."""

import json

import numpy as np
import pytest
from datasets_toys import png, real  # noqa: F401  (fixtures)
from labelled_frames import TEST, TRAIN, write_frames

from smfnet.core.checks import InputError
from smfnet.data.pairs import get_pairs
from smfnet.data.registry import REGISTRY, check_frames, find_set, frame_parts, locate
from smfnet.tasks import detection, segmentation
from smfnet.tasks.results import scene_kind
from smfnet.tasks.scene_split import check_leaks, draw_frames, is_fair, only, split_frames

DRIVES = [f"{5 * i:05d}{'D' if i < 60 or i >= 150 else 'N'}" for i in range(200)]


@pytest.fixture
def toy_frames(tmp_path):
    return write_frames(tmp_path)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("block", "apart"), [(6, 10), (14, 20), (20, 41)])
def test_blocks_are_whole_and_apart(seed, block, apart):
    """Nothing is lost, parts keep their distance, each light has its share, and frames between are near."""
    parts = split_frames(DRIVES, block=block, apart=apart, seed=seed)
    assert sorted(s for p in parts.values() for s in p) == DRIVES
    check_frames({k: parts[k] for k in ("train", "test")}, apart=apart)
    numbers = {k: np.array([int(s[:5]) for s in p]) for k, p in parts.items()}
    assert all(abs(numbers["test"] - n).min() < apart for n in numbers["between"])
    for light, total in (("D", 110), ("N", 90)):
        assert abs(sum(s[-1] == light for s in parts["test"]) - total / 3) <= block
    inside = [s in parts["test"] for s in DRIVES]
    runs = np.diff(np.flatnonzero(np.diff([0, *inside, 0])))[::2]
    assert runs.min() >= block * 0.7  # whole blocks
    assert split_frames(DRIVES, block=block, apart=apart, seed=seed) == parts


def test_the_first_fair_division():
    """A class that is there in number is on both sides by both lights; without such a draw, an error."""
    shows = {s: [k % 3 == 0, k % 50 == 0] for k, s in enumerate(DRIVES)}
    seed, parts = draw_frames(shows)
    earlier = [split_frames(DRIVES, seed=k) for k in range(seed)]
    assert is_fair(parts, shows) and not any(is_fair(p, shows) for p in earlier)
    clustered = {s: [k < 15] for k, s in enumerate(DRIVES)}
    assert not is_fair(split_frames(DRIVES, seed=0), clustered)
    with pytest.raises(InputError, match="frames: no seed gives a fair division"):
        draw_frames(clustered, block=30, seeds=range(30))
    with pytest.raises(InputError, match="begins with its number"):
        split_frames(["night"])


def test_a_set_with_parts_needs_no_division(toy_frames, tmp_path):
    """Segmentation and detection see the same frames, masks and boxes; fused images lie in both parts."""
    for task in (segmentation, detection):
        if task is segmentation:
            parts = [task.open_part(k, "visible", set=toy_frames, root=tmp_path) for k in ("train", "test")]
        else:
            parts = task.open_parts("visible", set=toy_frames, root=tmp_path, size=(32, 40))
        assert [p.stems for p in parts] == [[*TRAIN], [*TEST]]
    np.testing.assert_allclose(parts[0].boxes(0).boxes, [[8, 8, 12, 24], [15, 8, 25, 24]], atol=1e-3)
    assert detection.check_boxes(parts[1]).tolist() == [2, 0, 2]
    for part, stems in (("train", TRAIN), ("test", TEST)):
        for stem in stems:
            png(tmp_path / f"fused/{part}/ours/{stem}.png", np.full((64, 80), 9, np.uint8))
    place = {"set": toy_frames, "root": tmp_path, "fused": tmp_path / "fused"}
    fused = [*detection.open_parts("ours", **place), segmentation.open_part("test", "ours", **place)]
    assert [len(p) for p in fused] == [2, 2, 2] and {int(p.image(0).max() * 255 + 0.5) for p in fused} == {9}
    (tmp_path / f"fused/test/ours/{TEST[0]}.png").unlink()
    with pytest.raises(InputError, match=f"0 images named {TEST[0]}"):
        detection.open_parts("ours", **place)
    with pytest.raises(InputError, match="'ours' is none of infrared, visible, stacked"):
        detection.open_parts("ours", set=toy_frames, root=tmp_path)


def test_a_division_that_leaks_stops_both_tasks(toy_frames, tmp_path):
    """A neighbour on the other side is an error before anything is trained."""
    stored = json.loads((tmp_path / "parts.json").read_text())
    stored["train"].append("00030D")
    (tmp_path / "parts.json").write_text(json.dumps(stored))
    frame_parts.cache_clear()
    for open_one in (
        lambda: segmentation.open_part("train", "visible", set=toy_frames, root=tmp_path),
        lambda: detection.open_parts("visible", set=toy_frames, root=tmp_path),
    ):
        with pytest.raises(InputError, match="00030D and 00040D, 10 frames apart"):
            open_one()


def test_the_stored_division_is_what_is_drawn(real):  # noqa: F811
    """Drawn again from the real labels; every kind of scene is by day or night; no scene in both parts."""
    labelled = find_set("MSRS-labelled")
    if not locate(labelled.split("all"), root=real):
        pytest.skip("SMFNET_DATA holds no labelled frames of MSRS")
    pairs, shows = get_pairs(labelled, "all", root=real), {}
    for p in pairs:
        seen = np.bincount(p.source.read_mask().ravel(), minlength=9)[1:] > 0
        shows[p.stem] = [*seen, *(np.bincount(p.boxes.labels, minlength=3) > 0)]
    seed, parts = draw_frames(shows)
    stored = json.loads((REGISTRY.parent / "msrs_labelled.json").read_text())
    assert seed == stored["seed"] and {k: list(p) for k, p in parts.items()} == {k: stored[k] for k in parts}
    assert {scene_kind(s) for s in shows} == {"day", "night"}
    two = {k: only(pairs, parts[k]) for k in ("train", "test")}
    check_leaks(two, similar=0.7)
    with pytest.raises(InputError, match="00204D and 00209D"):
        check_leaks({"a": only(pairs, ["00204D"]), "b": only(pairs, ["00209D"])}, similar=0.7)
