"""Segmenters and detectors go through the same trainer: reduced precision, steps ahead, several processes."""

import importlib.util
import json

import pytest
import torch
from test_segmentation import QUICK, SMALL, streets, weights  # noqa: F401 (a fixture)

from smfnet.core.checks import InputError
from smfnet.tasks.loop import change, train_task
from smfnet.tasks.samples import TaskBatches
from smfnet.tasks.segmentation import open_part, train_segmenter
from smfnet.tasks.segmenter import new_segmenter
from smfnet.training.trainer import Speed

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed (extra 'scale')"
)


@pytest.fixture(scope="module")
def data(streets):  # noqa: F811
    """Six scenes in batches of two."""
    return TaskBatches(open_part("train", "visible", data=str(streets)), crop=64, seed=0)


def run(data, folder, r=QUICK, **options):
    """A training of a small segmenter."""
    config = change(SMALL, classes=len(data.samples.classes), channels=data.samples.channels)
    return train_task(new_segmenter(config, seed=0), data, r, folder, progress=False, **options)


def losses(folder) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_reduced_precision_learns_alike_and_is_recorded(data, tmp_path):
    """bfloat16 changes the loss, by little; the run may go on without it."""
    run(data, tmp_path / "off")
    amp = run(data, tmp_path / "amp", amp="bf16")
    off, on = losses(tmp_path / "off"), losses(tmp_path / "amp")
    assert off[0] != on[0] and off[0] == pytest.approx(on[0], rel=0.02)
    assert on[-1] == pytest.approx(off[-1], rel=0.2) and len(on) == 9
    assert amp.identity["speed"]["amp"] == "bf16"
    assert run(data, tmp_path / "amp").progress.done  # goes on
    with pytest.raises(InputError, match="amp: 'fp8' is unknown; choose one of off, bf16"):
        run(data, tmp_path / "x", amp="fp8")


def test_steps_ahead_are_the_same(data, tmp_path):
    """SGD with momentum skips and steps on the device, too."""
    one, two = (run(data, tmp_path / str(n), speed=Speed(read_every=n)) for n in (1, 4))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-3)
    a, b = (torch.cat([v.flatten().double() for v in weights(t).values()]) for t in (one, two))
    assert ((a - b).norm() / a.norm()).item() < 1e-3


@needs_accelerate
def test_two_processes_train_a_segmenter(streets, tmp_path):  # noqa: F811
    """With BatchNorm frozen and no class without a pixel the losses are those of one."""
    train, r = open_part("train", "visible", data=str(streets)), change(QUICK, freeze_bn=True)
    for n in (1, 2):
        options = dict(config=SMALL, progress=False, processes=n)
        found = train_segmenter(train, tmp_path / str(n), r, **options)
        assert found.progress.done and found.progress.step == 9
    one, two = (losses(tmp_path / str(n)) for n in (1, 2))
    assert len(two) == 9 and two == pytest.approx(one, rel=0.05)  # a share averages over its own pixels
