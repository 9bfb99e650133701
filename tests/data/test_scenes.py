"""Rendered scenes: the promises that data sets, training and reports rely on."""

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from smfnet.core.checks import InputError
from smfnet.data.classes import M3FD_CLASSES, MFNET_CLASSES, MFNET_PALETTE, PERSON
from smfnet.data.scenes import KINDS, overlay, render_scene, render_set, write_scenes

SMALL = (96, 128)
DIGEST = """
import hashlib
from smfnet.data.scenes import render_scene
scenes = [render_scene(k, size=(97, 131)) for k in range(4)]
parts = [a.tobytes() for s in scenes for a in (s.ir, s.vis, s.mask, s.boxes, s.labels)]
print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def arrays(scene):
    return scene.ir, scene.vis, scene.mask, scene.boxes, scene.labels


def grey(scene):
    return scene.vis @ np.array([0.299, 0.587, 0.114])


def other_process(**variables):
    env = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=env
    ).stdout.strip()


@pytest.fixture(scope="module")
def scenes():
    return list(render_set(40))


def test_same_in_other_processes_and_without_vector_instructions():
    here = [a.tobytes() for k in range(4) for a in arrays(render_scene(k, size=(97, 131)))]
    vector = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    expected = hashlib.sha256(b"".join(here)).hexdigest()
    assert other_process(PYTHONHASHSEED="1") == expected
    assert other_process(PYTHONHASHSEED="2", NPY_DISABLE_CPU_FEATURES=" ".join(vector)) == expected


def test_independent_of_global_state_and_order():
    first = arrays(render_scene(9, size=SMALL))
    np.random.seed(1)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    render_scene(10, size=SMALL)
    for a, b in zip(first, arrays(render_scene(9, size=SMALL))):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_seeds_differ_and_sets_share_no_scene():
    assert not np.array_equal(
        render_scene(1, size=SMALL, kind="day").vis, render_scene(2, size=SMALL, kind="day").vis
    )
    one, two = ({scene.seed for scene in render_set(6, seed=seed, size=(64, 64))} for seed in (0, 1))
    assert len(one) == len(two) == 6 and not one & two


def test_kind_changes_the_light_only():
    day, *others = (render_scene(3, size=SMALL, kind=kind) for kind in KINDS)
    for other in others:
        for a, b in zip(arrays(day)[2:], arrays(other)[2:]):
            np.testing.assert_array_equal(a, b)
        assert not np.array_equal(day.vis, other.vis) and not np.array_equal(day.ir, other.ir)
    assert [render_scene(k, size=(64, 64)).kind for k in range(4)] == list(KINDS)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (99, 64), (130, 401), (240, 320)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size(size, kind):
    for seed in (0, 21):
        scene = render_scene(seed, size=size, kind=kind)
        assert scene.ir.shape == scene.mask.shape == size and scene.vis.shape == (*size, 3)
        assert scene.ir.dtype == scene.vis.dtype == scene.mask.dtype == np.uint8
        assert (
            scene.boxes.shape == (len(scene.labels), 4)
            and scene.boxes.dtype == np.float32
            and scene.labels.dtype == np.int64
        )
        assert scene.ir.std() > 5 and scene.vis.std() > 2  # never a blank image


def test_every_class_appears(scenes):
    assert len(MFNET_CLASSES) == len(MFNET_PALETTE) == 9 and len(M3FD_CLASSES) == 6
    for k in range(9):  # often enough to be learnt: in a tenth of the scenes, with 30 pixels or more
        assert sum((scene.mask == k).sum() >= 30 for scene in scenes) >= 4, MFNET_CLASSES[k]
    for k in range(6):
        assert sum((scene.labels == k).any() for scene in scenes) >= 4, M3FD_CLASSES[k]
    assert [sum(scene.kind == kind for scene in scenes) for kind in KINDS] == [10] * 4


def test_boxes_fit_the_mask(scenes):
    inside = {"people": 2, "car": 1, "bus": 1, "truck": 1, "motorcycle": 3}
    for scene in scenes:
        h, w = scene.mask.shape
        for box, label in zip(scene.boxes.astype(int), scene.labels):
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h and min(x1 - x0, y1 - y0) >= 6
            if value := inside.get(M3FD_CLASSES[label]):
                own = scene.mask[y0:y1, x0:x1] == value
                assert own[0].any() and own[-1].any() and own[:, 0].any() and own[:, -1].any()


def test_people_are_warm_in_every_kind(scenes):
    seen = 0
    for scene in scenes:
        person = scene.mask == PERSON
        if person.sum() < 100:
            continue
        ring = ndimage.binary_dilation(person, iterations=8) & ~ndimage.binary_dilation(person, iterations=2)
        assert scene.ir[person].mean() > scene.ir[ring].mean() + 40, (scene.seed, scene.kind)
        seen += 1
    assert seen > 20


def test_light_of_the_kinds():
    def contrast(image):
        mean = ndimage.uniform_filter(image, 9)
        return np.sqrt(np.maximum(ndimage.uniform_filter(image * image, 9) - mean * mean, 0)).mean()

    for seed in range(60, 70):
        day, night, glare, smoke = (render_scene(seed, kind=kind) for kind in KINDS)
        assert grey(night).mean() < 0.8 * grey(day).mean()
        assert contrast(grey(smoke)) < 0.75 * contrast(grey(day))
        assert 0.85 < contrast(smoke.ir.astype(float)) / contrast(day.ir.astype(float)) < 1.15
        assert (glare.vis.min(-1) >= 250).mean() > 0.005


def test_textures_differ_by_modality():
    def fine(image):
        return np.abs(
            np.diff(ndimage.gaussian_filter(image.astype(float), 1), axis=1)
        ).mean()  # blurred: not the noise

    for seed in range(5):
        scene = render_scene(seed, kind="day")
        assert fine(grey(scene)) > 1.5 * fine(scene.ir)


def test_speed():
    render_scene(0)
    begin = time.process_time()
    for _ in render_set(8, seed=2):
        pass
    assert (time.process_time() - begin) / 8 < 0.4  # five times what a current processor needs


def test_written_files(tmp_path):
    names = write_scenes(tmp_path / "a", 5, seed=4, size=SMALL)
    assert names == [f"scene_{i:04d}_{KINDS[i % 4]}" for i in range(5)]
    scene = next(iter(render_set(5, seed=4, size=SMALL)))
    for part, image in (("ir", scene.ir), ("vi", scene.vis), ("masks", scene.mask)):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "a" / part / f"{names[0]}.png")), image
        )
    truth = json.loads((tmp_path / "a" / "boxes" / f"{names[0]}.json").read_text())
    np.testing.assert_array_equal(np.array(truth["boxes"]).reshape(-1, 4), scene.boxes)
    assert truth["labels"] == [M3FD_CLASSES[k] for k in scene.labels]
    assert (truth["kind"], truth["seed"], truth["size"]) == (scene.kind, scene.seed, list(SMALL))
    write_scenes(tmp_path / "b", 5, seed=4, size=SMALL)
    a, b = (
        {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b and len(a) == 20  # the same bytes, and no temporary file left


def test_overlay():
    scene = render_scene(2, size=SMALL)
    np.testing.assert_array_equal(
        overlay(scene, strength=1.0)[scene.mask > 0], MFNET_PALETTE[scene.mask][scene.mask > 0]
    )


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(kind="dusk"), "kind"),
        (dict(kind=""), "kind"),
        (dict(size=(63, 64)), "at least 64"),
        (dict(size=(64, 10)), "at least 64"),
        (dict(size=240), "height, width"),
        (dict(size=(64.0, 64.0)), "height, width"),
        (dict(seed=-1), "seed"),
        (dict(seed="0"), "seed"),
        (dict(seed=True), "seed"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(InputError, match=word):
        render_scene(**{"seed": 0, **arguments})


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3"])
def test_bad_number(n):
    with pytest.raises(InputError, match="n: "):
        render_set(n)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        write_scenes(tmp_path / "file", 1, size=(64, 64))
    with pytest.raises(InputError, match="kind|size"):
        write_scenes(tmp_path / "never", 1, size=(1, 1))
    assert not (tmp_path / "never").exists()
