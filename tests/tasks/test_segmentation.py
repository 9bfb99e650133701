"""Segmentation: bad input, exact resume, an independent evaluator, MFNet's layout, and both notebooks."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets_toys import png, scenes
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data.classes import MFNET_CLASSES
from smfnet.data.scenes import write_scenes

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the extra 'downstream' is not installed", allow_module_level=True)

from smfnet.tasks.segmentation import evaluate, open_part, segmentation_recipe, train_segmenter
from smfnet.tasks.segmentation_figure import MISSED_COLOUR, WRONG_COLOUR
from smfnet.tasks.segmentation_scores import (
    confusion_matrix,
    constant,
    naive_scores,
    paired,
    read_counts,
    scores,
)
from smfnet.tasks.segmenter import IGNORE, SegmenterConfig, new_segmenter

SMALL = SegmenterConfig(
    stem=8, widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), block="basic", pyramid=8, rates=(1, 2, 3), detail=4
)
QUICK = segmentation_recipe("demo", epochs=3, crop=64, batch=2)


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Six training and four test scenes."""
    folder = tmp_path_factory.mktemp("streets")
    for i, (part, n) in enumerate((("train", 6), ("test", 4))):
        write_scenes(folder / part, n, seed=40 + i, size=(64, 80))
    return folder


@pytest.fixture
def mfnet(tmp_path):
    """A folder in MFNet's layout: four-channel images, labels, and lists that name mirrored images too.

    One corner of every label is ignored.
    """
    for part, (n, seed) in {"train": (4, 50), "test": (3, 51)}.items():
        stems = []
        for i, s in enumerate(scenes(n, seed)):
            stems.append(f"{len(part)}000{i}{'DN'[i % 2]}")
            png(tmp_path / f"MFNet/images/{stems[-1]}.png", np.dstack([s.vis, s.ir]))
            mask = s.mask.copy()
            mask[:8, :8] = IGNORE
            png(tmp_path / f"MFNet/labels/{stems[-1]}.png", mask)
        (tmp_path / f"MFNet/{part}.txt").write_text(
            "\n".join([*stems, f"{stems[0]}_flip"]) + "\n", encoding="utf-8"
        )
    return tmp_path


def weights(trainer) -> dict:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


# --- exact resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_segmenter_ends_bit_identical(streets, tmp_path, stop, monkeypatch):
    """Stopped after 1, 4 and 7 of 9 steps and continued in a new trainer, a run ends as without a stop.

    Weights, momenta and log are the same: on one machine the same steps give the same bits.
    """
    from smfnet.tasks.loop import TaskTrainer

    train = open_part("train", "visible", data=streets)
    straight = train_segmenter(train, tmp_path / "straight", QUICK, config=SMALL, progress=False)
    assert straight.progress.done and straight.progress.step == 9
    step = TaskTrainer.train_step

    def interrupted(self, batches):
        if self.progress.step == stop:
            raise KeyboardInterrupt
        return step(self, batches)

    original = TaskTrainer.__init__
    every_step = lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "checkpoint_every": 1})
    monkeypatch.setattr(TaskTrainer, "__init__", every_step)
    monkeypatch.setattr(TaskTrainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(train, tmp_path / "stopped", QUICK, config=SMALL, progress=False)
    monkeypatch.setattr(TaskTrainer, "train_step", step)
    torch.manual_seed(99)  # the state of the generator comes from the checkpoint, not from here
    again = train_segmenter(train, tmp_path / "stopped", QUICK, config=SMALL, progress=False)
    assert again.progress.done and again.progress.step == 9
    for name, value in weights(straight).items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    parameters = lambda t: [p for group in t.optimiser.param_groups for p in group["params"]]
    momenta = lambda t: [t.optimiser.state[p]["momentum_buffer"] for p in parameters(t)]
    assert all(torch.equal(a, b) for a, b in zip(momenta(straight), momenta(again), strict=True))
    assert len(momenta(again)) > 20
    log = lambda name: pd.read_json(tmp_path / name / "log.jsonl", lines=True)
    read = lambda name: log(name).drop(columns="images_per_second")
    pd.testing.assert_frame_equal(read("straight"), read("stopped"))


def test_a_spent_budget_stops_and_another_run_is_refused(streets, tmp_path):
    """No minutes: nothing is complete. Another seed, recipe or input must not continue this folder."""
    train = open_part("train", "visible", data=streets)
    assert not train_segmenter(train, tmp_path, QUICK, config=SMALL, minutes=0, progress=False).progress.done
    with pytest.raises(InputError, match="another"):
        train_segmenter(train, tmp_path, QUICK, config=SMALL, seed=1, progress=False)
    with pytest.raises(InputError, match="another.*channels"):
        train_segmenter(
            open_part("train", "stacked", data=streets), tmp_path, QUICK, config=SMALL, progress=False
        )
    assert train_segmenter(train, tmp_path, QUICK, config=SMALL, progress=False).progress.done


# --- learning and scores ------------------------------------------------------------------------------------


def test_a_short_training_beats_a_constant_predictor(streets, tmp_path):
    """A smoke: the training scenes, learned for some seconds, are segmented better than as background."""
    train = open_part("train", "visible", data=streets)
    config = replace(SMALL, stem=16, widths=(32, 32, 48, 64), pyramid=32, detail=32)
    run = train_segmenter(
        train, tmp_path, replace(QUICK, epochs=(100,), batch=3), config=config, progress=False
    )
    counts = evaluate(run.model, train, progress=False).sum(0)
    # A margin of 0.10-0.15 in 16 runs with eight seeds, with and without vector instructions; less than
    # half leaves room for other processors, because training amplifies differences of rounding.
    assert scores(counts)["mIoU"] > scores(constant(counts))["mIoU"] + 0.05
    background, occurring = counts[0].sum() / counts.sum(), (counts.sum(1) > 0).sum()
    assert scores(constant(counts))["mIoU"] == pytest.approx(background / occurring)


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_an_independent_evaluator(seed):
    """Random masks, some pixels ignored, a class without pixels: sets of pixels; scikit-learn where it is."""
    rng = np.random.default_rng(seed)
    labels, shares = [0, 1, 2, 3, 5, 8, IGNORE], [0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05]
    truth = [rng.choice(labels, (20, 30), p=shares).astype(np.uint8) for _ in range(4)]
    called = [rng.choice([0, 1, 2, 3, 6], (20, 30)).astype(np.uint8) for _ in truth]
    total = sum(confusion_matrix(t, p) for t, p in zip(truth, called))
    found, slow = scores(total), naive_scores(truth, called)
    for key in slow:
        np.testing.assert_allclose(found[key], slow[key], rtol=1e-12, err_msg=key)
    assert np.isnan(found["IoU"][[4, 7]]).all() and found["IoU"][6] == 0 and found["IoU"][8] == 0
    assert found["mIoU"] == pytest.approx(np.nanmean(slow["IoU"]))
    assert found["mAcc"] == pytest.approx(np.nanmean(slow["accuracy"]))
    if importlib.util.find_spec("sklearn"):
        from sklearn.metrics import confusion_matrix as reference

        t, p = np.concatenate([x.ravel() for x in truth]), np.concatenate([x.ravel() for x in called])
        np.testing.assert_array_equal(total, reference(t[t != IGNORE], p[t != IGNORE], labels=range(9)))


def test_the_paper_preset_is_a_resnet50():
    """50 layers with weights on the way to the classifier: 49 convolutions here; output stride 16."""
    model = new_segmenter(SegmenterConfig())
    layers = [m for name, m in model.backbone.named_modules() if "shortcut" not in name]
    assert len([m for m in layers if isinstance(m, torch.nn.Conv2d)]) == 49
    weights = sum(p.numel() for p in model.backbone.parameters())
    assert weights == 23_508_032  # the library's own count for ResNet-50 without its classifier
    with torch.no_grad():
        fine, coarse = model.backbone.eval()(torch.rand(1, 3, 64, 96)).feature_maps
    assert fine.shape == (1, 256, 16, 24) and coarse.shape == (1, 2048, 4, 6)


# --- bad input ----------------------------------------------------------------------------------------------


def edited(streets: Path, tmp_path: Path, change) -> Path:
    """A copy of the streets whose first training mask is changed."""
    import shutil

    shutil.copytree(streets, tmp_path / "copy")
    path = sorted((tmp_path / "copy/train/masks").iterdir())[0]
    png(path, change(np.array(Image.open(path))))
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m: np.where(m == 0, 9, m).astype(np.uint8), "class 9 is not one of the 9"),
        (lambda m: m[:32], "80×32 pixels"),
        (lambda m: np.dstack([m] * 3), "one channel"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(streets, tmp_path, change, text):
    """Unknown classes, another size and colour: the file is named before anything is trained."""
    train = open_part("train", "visible", data=edited(streets, tmp_path, change))
    with pytest.raises(InputError, match=text) as e:
        train_segmenter(train, tmp_path / "run", QUICK, config=SMALL, progress=False)
    assert "scene_0000" in str(e.value) and not (tmp_path / "run").exists()


def test_ignored_pixels_and_absent_masks(streets, tmp_path):
    """One mask may be ignored completely; if all are, or there are none, that is an error."""
    folder = edited(streets, tmp_path, lambda m: np.full_like(m, IGNORE))
    run = train_segmenter(
        open_part("train", "visible", data=folder), tmp_path / "run", QUICK, config=SMALL, progress=False
    )
    counts = evaluate(run.model, open_part("train", "visible", data=folder), progress=False)
    assert counts[0].sum() == 0 and counts[1].sum() == 64 * 80
    for path in (folder / "train/masks").iterdir():
        png(path, np.full((64, 80), IGNORE, np.uint8))
    with pytest.raises(InputError, match="every pixel of the set is ignored"):
        evaluate(run.model, open_part("train", "visible", data=folder), progress=False)
    import shutil

    shutil.rmtree(folder / "train/masks")
    with pytest.raises(InputError, match="there is no mask"):
        evaluate(run.model, open_part("train", "visible", data=folder), progress=False)


def test_inputs_that_do_not_fit(streets):
    """Channels, sets and fused folders."""
    model = new_segmenter(SMALL)
    with pytest.raises(InputError, match="'stacked' has 4 channels, the segmenter takes 3"):
        evaluate(model, open_part("test", "stacked", data=streets), progress=False)
    with pytest.raises(InputError, match="fuse this set"):
        open_part("test", "ours", data=streets)
    with pytest.raises(InputError, match="either data"):
        open_part("test", "visible", data=streets, set="MFNet")
    with pytest.raises(InputError, match="MFNet train: no folder"):
        open_part("train", "visible", set="MFNet", root=streets)


# --- MFNet's layout, and the notebooks ----------------------------------------------------------------------


def test_notebooks_on_a_set_in_mfnets_layout(mfnet, tmp_path, root, monkeypatch):
    """Training, results and figure from four-channel images; a spent budget writes nothing, and can go on."""
    from stages import NotebookFailure, run_notebook

    monkeypatch.setenv("SMFNET_DATA", str(mfnet))
    notebooks, quick = root / "nbs/experiments", {"epochs": 1, "crop": 64, "batch": 2}
    for name in ("visible", "stacked"):
        out = tmp_path / "results" / name
        params = {
            "data": "",
            "set": "MFNet",
            "input": name,
            "seeds": [0, 1],
            "settings": quick,
            "resamples": 50,
            "out": str(out),
        }
        if name == "visible":
            with pytest.raises(NotebookFailure, match="run the stage again to continue"):
                run_notebook(
                    notebooks / "segmentation.ipynb",
                    output_dir=tmp_path / "run",
                    params={**params, "budget_minutes": 1e-9},
                    progress=False,
                )
            assert not (out / "rows.csv").exists()
        run_notebook(
            notebooks / "segmentation.ipynb", output_dir=tmp_path / "run", params=params, progress=False
        )
    found, made = read_counts(out / "images.npz"), json.loads((out / "segmentation.json").read_text())
    assert found["counts"].shape == (2, 3, 9, 9) and found["stems"].tolist() == ["40000D", "40001N", "40002D"]
    assert (found["counts"].sum((2, 3)) == 64 * 80 - 64).all(), "every pixel once, but the ignored corner"
    rows = pd.read_csv(out / "rows.csv")
    assert set(rows["kind"]) == {"all", "day", "night"} and set(rows["seed"]) == {0, 1}
    assert set(rows["metric"]) == {*MFNET_CLASSES, "mIoU", "mAcc"}
    of = rows[(rows["kind"] == "all") & (rows["seed"] == 1)].set_index("metric")["value"]
    assert of["mIoU"] == pytest.approx(scores(found["counts"][1].sum(0))["mIoU"])
    assert made["initial"].startswith("random weights")
    assert made["mIoU"] - made["constant"] == pytest.approx(made["margin"])
    visible = tmp_path / "results/visible"
    assert rows["conditions"].nunique() == 1
    assert set(rows["conditions"]) == set(pd.read_csv(visible / "rows.csv")["conditions"])
    assert paired(visible / "images.npz", out / "images.npz", resamples=50)["n_seeds"].eq(2).all()
    params = {
        "data": "",
        "set": "MFNet",
        "results": [str(tmp_path / "results/*")],
        "scenes": 2,
        "figures": str(tmp_path / "figures"),
    }
    run_notebook(notebooks / "figure5.ipynb", output_dir=tmp_path / "figure5", params=params, progress=False)
    assert (tmp_path / "figures/figure5.svg").is_file()
    record = json.loads((tmp_path / "figures/figure5.json").read_text())
    assert record["inputs"] == ["stacked", "visible"]
    pixels = np.array(Image.open(tmp_path / "figures/figure5.png").convert("RGB")).reshape(-1, 3)
    assert all((pixels == colour).all(1).any() for colour in (MISSED_COLOUR, WRONG_COLOUR))
