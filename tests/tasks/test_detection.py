"""Detection: bad input, exact resume, an independent evaluator, M3FD's layout, and both notebooks."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets_toys import png, scenes
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data.classes import M3FD_CLASSES
from smfnet.data.pairs import Boxes, get_pairs
from smfnet.data.scenes import write_scenes

if any(importlib.util.find_spec(name) is None for name in ("transformers", "monai", "faster_coco_eval")):
    pytest.skip("the extra 'downstream' is not installed", allow_module_level=True)

from smfnet.tasks.detection import detection_recipe, evaluate, open_inputs, open_parts, train_detector
from smfnet.tasks.detection_figure import MISSED
from smfnet.tasks.detection_scores import Detections, match, paired, read_found, weighted_ap, with_mean
from smfnet.tasks.detector import DetectorConfig, new_detector
from smfnet.tasks.results import draws
from smfnet.tasks.scene_split import check_leaks, split_scenes

SMALL = DetectorConfig(
    stem=8,
    widths=(8, 16),
    depths=(1, 1),
    block="basic",
    first=1,
    pyramid=8,
    heads=1,
    anchor=2.0,
    candidates=4,
)
QUICK = detection_recipe("demo", epochs=3, batch=2)


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Six training and four test scenes."""
    folder = tmp_path_factory.mktemp("streets")
    for i, (part, n) in enumerate((("train", 6), ("test", 4))):
        write_scenes(folder / part, n, seed=60 + i, size=(64, 80))
    return folder


def voc(path: Path, boxes: np.ndarray, names: list[str]) -> None:
    """An annotation as M3FD has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    corners = lambda b: "".join(f"<{k}>{v:g}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), b))
    objects = "".join(
        f"<object><name>{n}</name><bndbox>{corners(b)}</bndbox></object>" for b, n in zip(boxes, names)
    )
    path.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")


@pytest.fixture
def m3fd(tmp_path):
    """Twenty scenes in M3FD's layout, each twice, as neighbouring pictures of a drive are.

    Names have capitals, and one picture has no objects.
    """
    folder = tmp_path / "M3FD/M3FD_Detection"
    for i, s in enumerate(scenes(20, 33)):
        for again in (0, 1):
            stem, noise = f"{2 * i + again:05d}", np.uint8(again)
            png(folder / f"Vis/{stem}.png", np.minimum(s.vis, 254) + noise)
            png(folder / f"Ir/{stem}.png", np.minimum(s.ir, 254) + noise)
            kept = slice(0, 0) if i == 3 else slice(None)
            voc(
                folder / f"Annotation/{stem}.xml",
                s.boxes[kept],
                [M3FD_CLASSES[k].capitalize() for k in s.labels[kept]],
            )
    return tmp_path


# --- exact resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_detector_ends_bit_identical(streets, tmp_path, stop, monkeypatch):
    """Stopped after 1, 4 and 7 of 9 steps and continued in a new trainer, a run ends as without a stop.

    Weights, moments and log are the same, random windows included: one machine gives equal bits.
    """
    from smfnet.tasks.loop import TaskTrainer

    train, _ = open_parts("visible", data=streets)
    straight = train_detector(train, tmp_path / "straight", QUICK, config=SMALL, progress=False)
    assert straight.progress.done and straight.progress.step == 9 and straight.model.config.zoom < 1
    step, original = TaskTrainer.train_step, TaskTrainer.__init__

    def interrupted(self, batches):
        if self.progress.step == stop:
            raise KeyboardInterrupt
        return step(self, batches)

    every_step = lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "checkpoint_every": 1})
    monkeypatch.setattr(TaskTrainer, "__init__", every_step)
    monkeypatch.setattr(TaskTrainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_detector(train, tmp_path / "stopped", QUICK, config=SMALL, progress=False)
    monkeypatch.setattr(TaskTrainer, "train_step", step)
    torch.manual_seed(99)  # the state of the generator comes from the checkpoint, not from here
    again = train_detector(train, tmp_path / "stopped", QUICK, config=SMALL, progress=False)
    assert again.progress.done and again.progress.step == 9
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    parameters = lambda t: [p for group in t.optimiser.param_groups for p in group["params"]]
    moments = lambda t: [t.optimiser.state[p][k] for p in parameters(t) for k in ("exp_avg", "exp_avg_sq")]
    assert all(torch.equal(a, b) for a, b in zip(moments(straight), moments(again), strict=True))
    assert len(moments(again)) > 40
    log = lambda name: pd.read_json(tmp_path / name / "log.jsonl", lines=True)
    read = lambda name: log(name).drop(columns="images_per_second")
    pd.testing.assert_frame_equal(read("straight"), read("stopped"))


def test_a_spent_budget_stops_and_another_run_is_refused(streets, tmp_path):
    """No minutes: nothing is complete. Another seed or input must not continue this folder."""
    train, _ = open_parts("visible", data=streets)
    assert not train_detector(train, tmp_path, QUICK, config=SMALL, minutes=0, progress=False).progress.done
    with pytest.raises(InputError, match="another"):
        train_detector(train, tmp_path, QUICK, config=SMALL, seed=1, progress=False)
    with pytest.raises(InputError, match="another.*channels"):
        train_detector(open_parts("stacked", data=streets)[0], tmp_path, QUICK, config=SMALL, progress=False)
    assert train_detector(train, tmp_path, QUICK, config=SMALL, progress=False).progress.done


# --- learning and scores ------------------------------------------------------------------------------------


def test_a_short_training_finds_what_it_was_shown(streets, tmp_path):
    """A smoke: the training scenes, learned for some seconds, are detected far better than before."""
    train, _ = open_parts("visible", data=streets)
    config = replace(SMALL, stem=16, widths=(16, 32), pyramid=32)
    truths = [train.boxes(i) for i in range(len(train))]
    before = match(truths, evaluate(new_detector(config), train, progress=False))
    run = train_detector(
        train,
        tmp_path,
        replace(QUICK, epochs=(60,), batch=3, lr=5e-3, zoom=1.0, warmup=5),
        config=config,
        progress=False,
    )
    after = match(truths, evaluate(run.model, train, progress=False))
    # From 0 to 0.76-0.96 in 16 runs with eight seeds, with and without vector instructions; less than
    # half leaves room for other processors, because training amplifies differences of rounding.
    assert with_mean(after.ap)[-1] > with_mean(before.ap)[-1] + 0.3


def overlap(a, b) -> float:
    """Intersection over union of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(w, 0) * max(h, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def slow_ap(truths, found, k) -> float:
    """AP@.5 of a class from its definition, with loops; NaN without objects."""
    objects = {
        (i, j): t.boxes[j] for i, t in enumerate(truths) for j in range(len(t.labels)) if t.labels[j] == k
    }
    if not objects:
        return float("nan")
    mine = [(i, f, j) for i, f in enumerate(found) for j in np.flatnonzero(f.labels == k)]
    guesses = sorted(((float(f.scores[j]), i, f.boxes[j]) for i, f, j in mine), key=lambda g: -g[0])
    taken, right, points = set(), 0, []
    for n, (_, i, box) in enumerate(guesses, 1):
        free = [(overlap(b, box), key) for key, b in objects.items() if key[0] == i and key not in taken]
        best = max(free, default=(0.0, None))
        if best[0] >= 0.5:
            taken.add(best[1])
            right += 1
        points.append((right / len(objects), right / n))
    levels = np.linspace(0, 1, 101)  # as COCO has them: 0.6 is 0.6000000000000001 there
    return sum(max((p for r, p in points if r >= level), default=0.0) for level in levels) / 101


def random_case(seed, n=10):
    """Random objects of six classes, detections on and off them; no two scores are equal: one order only."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(n):
        corner = rng.uniform(0, 90, (rng.integers(0, 7), 2))
        boxes = np.concatenate([corner, corner + rng.uniform(6, 40, corner.shape)], 1).astype(np.float32)
        labels = rng.choice([0, 1, 2, 4, 5], len(boxes))  # class 3 has no object
        near = boxes.repeat(2, 0) + rng.normal(0, 3, (2 * len(boxes), 4))
        anywhere = rng.uniform(0, 60, (3, 4)) + [0, 0, 60, 60]
        guess = np.concatenate([near, anywhere]).astype(np.float32)
        guess[:, 2:] = np.maximum(guess[:, 2:], guess[:, :2] + 1)
        mistaken = rng.random(2 * len(boxes)) < 0.2
        called = np.where(mistaken, rng.integers(0, 6, 2 * len(boxes)), labels.repeat(2))
        truths.append(Boxes(boxes, labels, M3FD_CLASSES))
        found.append((guess, np.concatenate([called, rng.integers(0, 6, 3)])))
    total = sum(len(called) for _, called in found)
    scores = np.split(rng.permutation(total) / total, np.cumsum([len(called) for _, called in found])[:-1])
    detections = [Detections(b, s.astype(np.float32), k) for (b, k), s in zip(found, scores, strict=True)]
    return truths, detections


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_an_independent_evaluator(seed):
    """Random detections: evaluator and the bootstrap's weighted sums against loops from the definition."""
    truths, found = random_case(seed)
    expected = np.array([slow_ap(truths, found, k) for k in range(6)])
    m = match(truths, found)
    assert np.isnan(m.ap[3]) and 0.05 < np.nanmean(expected) < 0.95
    np.testing.assert_allclose(m.ap, expected, atol=1e-9)
    np.testing.assert_allclose(weighted_ap(m, np.ones((1, len(truths)), int))[0], expected, atol=1e-9)
    times = draws(len(truths), resamples=3, seed=seed)
    for w, ours in zip(times, weighted_ap(m, times), strict=True):
        drawn = lambda items, w=w: [x for x, k in zip(items, w, strict=True) for _ in range(k)]
        expected = [slow_ap(drawn(truths), drawn(found), k) for k in range(6)]
        np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_the_paper_preset_is_a_resnet50():
    """The library's ResNet-50 without its classifier; three levels."""
    model = new_detector(DetectorConfig())
    assert sum(p.numel() for p in model.net.network.feature_extractor.body.parameters()) == 23_508_032
    with torch.no_grad():
        levels = model.eval().net.network.feature_extractor(torch.rand(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in levels.values()] == [(256, 8, 12), (256, 4, 6), (256, 2, 3)]


# --- bad input ----------------------------------------------------------------------------------------------


def edited(streets: Path, tmp_path: Path, change, every: bool = False) -> Path:
    """A copy of the streets whose first (or every) training annotation is changed."""
    shutil.copytree(streets, tmp_path / "copy")
    for path in sorted((tmp_path / "copy/train/boxes").iterdir())[: None if every else 1]:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "change, text",
    [
        ({"boxes": [[0, 0, 200, 30]], "labels": ["car"]}, "reaches 120 pixels over the 80×64 image"),
        ({"boxes": [[-4, 0, 20, 30]], "labels": ["car"]}, "empty or outside"),
        ({"boxes": [[9, 9, 9, 30]], "labels": ["car"]}, "empty or outside"),
        ({"boxes": [[0, 0, 20, 30]], "labels": ["tram"]}, "class 'tram' is not one of people, car"),
        ({"boxes": [[0, 0, 20, 30]], "labels": []}, "not a readable annotation"),
    ],
)
def test_an_annotation_that_does_not_fit_is_named(streets, tmp_path, change, text):
    """Boxes outside, empty boxes, unknown classes: the file is named before anything is trained."""
    data = edited(streets, tmp_path, lambda d: d | change)
    with pytest.raises(InputError, match=text) as e:
        train = open_parts("visible", data=data)[0]
        train_detector(train, tmp_path / "run", QUICK, config=SMALL, progress=False)
    assert "scene_0000" in str(e.value) and not (tmp_path / "run").exists()


def test_pictures_and_sets_without_objects(streets, tmp_path):
    """One picture without objects is legal; a set without any is not, nor a set without annotations."""
    nothing = lambda d: {**d, "boxes": [], "labels": []}
    train, _ = open_parts("visible", data=edited(streets, tmp_path / "one", nothing))
    run = train_detector(train, tmp_path / "run", QUICK, config=SMALL, progress=False)
    assert run.progress.done and len(train.boxes(0).labels) == 0
    folder = edited(streets, tmp_path / "all", nothing, every=True)
    with pytest.raises(InputError, match="no picture of the set holds an object"):
        evaluate(run.model, open_parts("visible", data=folder)[0], progress=False)
    shutil.rmtree(folder / "train/boxes")
    with pytest.raises(InputError, match="there is no annotation"):
        evaluate(run.model, open_parts("visible", data=folder)[0], progress=False)


def test_a_split_that_leaks_is_refused(streets, tmp_path):
    """A training scene among the test scenes, under another name and a little brighter, is found."""
    shutil.copytree(streets, tmp_path / "copy", ignore=shutil.ignore_patterns("masks"))
    stem = "scene_0001_night"
    for part in ("ir", "vi"):
        image = np.array(Image.open(tmp_path / f"copy/train/{part}/{stem}.png"))
        png(tmp_path / f"copy/test/{part}/other.png", (image * 0.97 + 5).astype(np.uint8))
    shutil.copy(tmp_path / f"copy/train/boxes/{stem}.json", tmp_path / "copy/test/boxes/other.json")
    with pytest.raises(InputError, match=f"share 1 scene.*{stem} and other"):
        open_parts("visible", data=tmp_path / "copy")


def test_inputs_that_do_not_fit(streets):
    """Channels, sets and fused folders."""
    with pytest.raises(InputError, match="'stacked' has 4 channels, the detector takes 3"):
        evaluate(new_detector(SMALL), open_parts("stacked", data=streets)[1], progress=False)
    with pytest.raises(InputError, match="fuse this set"):
        open_parts("ours", data=streets)
    with pytest.raises(InputError, match="either data"):
        open_parts("visible", data=streets, set="M3FD")
    with pytest.raises(InputError, match="M3FD detection: no folder"):
        open_parts("visible", set="M3FD", root=streets)


# --- M3FD's layout, and the notebooks -----------------------------------------------------------------------


def test_m3fd_is_divided_by_scene(m3fd):
    """8:1:1 of forty pictures; both pictures of a scene stay together, and fused images are found by name."""
    pairs = get_pairs("M3FD", "detection", root=m3fd)
    parts = split_scenes(pairs, seed=5)
    assert [len(p) for p in parts.values()] == [32, 4, 4]
    assert sorted(s for p in parts.values() for s in p.stems) == pairs.stems
    for part in parts.values():
        assert all(f"{int(s) ^ 1:05d}" in part.stems for s in part.stems)
    check_leaks(parts)
    assert split_scenes(pairs, seed=6)["test"].stems != parts["test"].stems
    for stem in pairs.stems:
        png(m3fd / f"fused/ours/{stem}.png", np.full((64, 80), 7, np.uint8))
    train, test = open_inputs(["ours"], set="M3FD", root=m3fd, fused=m3fd / "fused", split_seed=5)["ours"]
    assert test.stems == parts["test"].stems and train.classes == M3FD_CLASSES
    assert (np.rint(train.image(0) * 255) == 7).all()


def test_notebooks_on_a_set_in_m3fds_layout(m3fd, tmp_path, root, monkeypatch):
    """Training, results and figure; a spent budget writes nothing and can be continued."""
    from stages import NotebookFailure, run_notebook

    monkeypatch.setenv("SMFNET_DATA", str(m3fd))
    notebooks, quick = root / "nbs/experiments", {"epochs": 1, "batch": 8}
    for name in ("visible", "stacked"):
        out = tmp_path / "results" / name
        params = {
            "data": "",
            "set": "M3FD",
            "input": name,
            "seeds": [0, 1],
            "settings": quick,
            "resamples": 20,
            "out": str(out),
        }
        if name == "visible":
            with pytest.raises(NotebookFailure, match="run the stage again to continue"):
                run_notebook(
                    notebooks / "detection.ipynb",
                    output_dir=tmp_path / "run",
                    params={**params, "budget_minutes": 1e-9},
                    progress=False,
                )
            assert not (out / "rows.csv").exists()
        run_notebook(
            notebooks / "detection.ipynb", output_dir=tmp_path / "run", params=params, progress=False
        )
    found, made = read_found(out / "images.npz"), json.loads((out / "detection.json").read_text())
    assert list(found.found) == [0, 1] and len(found.stems) == 4
    assert {p.stem for p in (out / "predictions").iterdir()} == set(found.stems)
    rows = pd.read_csv(out / "rows.csv")
    assert set(rows["kind"]) == {"all"} and set(rows["seed"]) == {0, 1}
    assert set(rows["metric"]) == {*M3FD_CLASSES, "mAP"}
    of = rows[rows["seed"] == 1].set_index("metric")["value"]
    np.testing.assert_allclose(of["mAP"], with_mean(match(found.truths, found.found[1]).ap)[-1])
    assert made["initial"].startswith("random weights") and made["detector"].startswith("RetinaNet")
    assert sum(made["objects"].values()) == sum(len(t.labels) for t in found.truths)
    visible = tmp_path / "results/visible"
    assert rows["conditions"].nunique() == 1
    assert set(rows["conditions"]) == set(pd.read_csv(visible / "rows.csv")["conditions"])
    assert paired(visible / "images.npz", out / "images.npz", resamples=20)["n_seeds"].eq(2).all()
    params = {
        "data": "",
        "set": "M3FD",
        "results": [str(tmp_path / "results/*")],
        "scenes": 2,
        "least": 0.9,
        "figures": str(tmp_path / "figures"),
    }
    run_notebook(notebooks / "figure4.ipynb", output_dir=tmp_path / "figure4", params=params, progress=False)
    assert (tmp_path / "figures/figure4.svg").is_file()
    record = json.loads((tmp_path / "figures/figure4.json").read_text())
    assert record["inputs"] == ["stacked", "visible"]
    pixels = np.array(Image.open(tmp_path / "figures/figure4.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert (abs(pixels - MISSED).max(1) < 12).any()  # an untrained detector misses objects
