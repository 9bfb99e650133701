"""Slips that a reader planted in the training room and no test had noticed; each test is for their kind."""

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_steps import WALK, loaded, log_of, pair, patches, walk

from smfnet.core.checks import InputError
from smfnet.data.patches import PatchSet
from smfnet.fast.feeding import AT_ONCE, ResidentPatches
from smfnet.training import trainer as training
from smfnet.training.processes import train
from smfnet.training.recipes import learning_rate, recipe
from smfnet.training.trainer import Display, Progress, Speed, Trainer, TrainingError


def life(folder, model=0, *, stages=(1, 2), **settings) -> Trainer:
    """A trainer of 12 patches, two in a batch, three epochs a stage: 36 steps."""
    return Trainer(loaded(model), patches(2), recipe("paper", **{**WALK, **settings}), folder, stages=stages)


@pytest.fixture
def quick(monkeypatch):
    """Steps that compute nothing."""
    monkeypatch.setattr(Trainer, "train_step", lambda self, batches: {"loss": 0.0})


@pytest.mark.parametrize(
    ("stages", "accumulate", "steps"), [((1,), 1, 12), ((2,), 1, 18), ((1, 2), 1, 30), ((2,), 4, 3)]
)
def test_the_length_that_is_shown_is_the_length_of_the_run(
    tmp_path, quick, monkeypatch, stages, accumulate, steps
):
    """Of the stages that are trained, in optimiser steps; two and three epochs."""
    totals = []
    monkeypatch.setattr(
        training, "Display", lambda total, *more: totals.append(total) or Display(total, *more)
    )
    t = life(tmp_path, stages=stages, accumulate=accumulate, epochs=(2, 3))
    assert t.fit(progress=False) and totals == [t.steps] == [steps]
    assert len(log_of(tmp_path, "step")) == t.progress.step == steps


@pytest.mark.parametrize("accumulate", [1, 3])
def test_speed_counts_every_image_of_a_step(tmp_path, quick, monkeypatch, accumulate):
    """By a clock on which each step takes half a second, and reading its numbers as long."""
    clock = iter(range(10**6))
    fake = SimpleNamespace(monotonic=training.time.monotonic, perf_counter=lambda: next(clock) / 2)
    monkeypatch.setattr(training, "time", fake)
    t = life(tmp_path, accumulate=accumulate, epochs=(1, 1))
    assert t.fit(progress=False)
    speeds = [r["images_per_second"] for r in log_of(tmp_path, "step")]
    assert speeds == [2 * accumulate] * (12 // accumulate)
    assert t.progress.seconds == len(speeds)


@pytest.mark.parametrize("steps", [4, 6, 18, 36, 0])
def test_asking_again_for_what_is_done_changes_nothing(tmp_path, quick, steps):
    """Within an epoch, at the end of an epoch, of a stage and of the run."""
    run = lambda: train(loaded(0), patches(2), recipe("paper", **WALK), tmp_path, steps=steps, progress=False)
    first, log = run(), (tmp_path / "log.jsonl").read_bytes()
    assert first.step == (steps or 36) and run() == first
    assert (tmp_path / "log.jsonl").read_bytes() == log and not list(tmp_path.glob("old-*"))


def test_a_shorter_run_is_not_the_longer_one_cut_off(tmp_path, quick):
    """Asked for fewer steps than are done, the run is refused, or starts over; asked for more, it goes on."""

    def run(steps, restart=True):
        r = recipe("paper", **WALK)
        return train(loaded(0), patches(2), r, tmp_path, steps=steps, progress=False, restart=restart).step

    aside = lambda: len(list(tmp_path.glob("old-*")))
    assert [(run(steps), aside()) for steps in (4, 9)] == [(4, 0), (9, 0)]
    with pytest.raises(InputError, match=r"another length \(9 steps, more than 8\).*say restart"):
        run(8, restart=False)
    assert aside() == 0 and run(9, restart=False) == 9
    assert [(run(steps), aside()) for steps in (8, 10, 2)] == [(8, 1), (10, 1), (2, 2)]
    assert [r["step"] for r in log_of(tmp_path, "step")] == [1, 2]


def test_fit_says_whether_it_came_as_far_as_asked(tmp_path, quick):
    """True at a given length and at the end, also when there is nothing to do; False when time was short."""
    t, short = life(tmp_path), {"minutes": 0}
    said = [t.fit(progress=False, **asked) for asked in ({"steps": 4}, {"steps": 4}, short)]
    assert said == [True, True, False]
    assert t.progress.step == 4 and t.fit(progress=False) and t.progress.step == 36


def test_the_log_of_a_run_without_checkpoints_is_no_part_of_the_next(tmp_path, quick):
    """A run that ended before its first checkpoint is set aside, and so is a second one."""
    for number in (1, 2, 3):
        t = life(tmp_path)
        assert not t.resume()
        t.record(kind="step", life=number)
    kept = [tmp_path / "old-1/log.jsonl", tmp_path / "old-2/log.jsonl", tmp_path / "log.jsonl"]
    assert [[json.loads(x)["life"] for x in p.read_text().splitlines()] for p in kept] == [[1], [2], [3]]


def test_a_resumed_log_has_no_step_twice(tmp_path, quick):
    """Killed three steps behind its checkpoint, a run goes on as if nothing had happened."""
    t = life(tmp_path)
    t.fit(steps=5, progress=False)
    for step in (6, 7, 8):
        t.record(kind="step", step=step)
    walk(tmp_path, fit={"steps": 10})
    assert [r["step"] for r in log_of(tmp_path, "step")] == list(range(1, 11))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_step_is_taken_with_a_gradient_that_is_not_finite(tmp_path, value, accumulate):
    """In one weight; what is saved are all images of the step, and no weight has moved."""
    t = life(tmp_path, accumulate=accumulate)
    before = {k: v.clone() for k, v in t.model.named_parameters()}
    first = next(t.model.decoder.parameters())
    first.register_hook(lambda g: torch.full_like(g, value))
    batches = list(t.data.batches(1000, 2))[:accumulate]
    with pytest.raises(TrainingError, match="gradient of decoder is not finite at stage 1, step 0"):
        t.train_step(batches)
    assert all(torch.equal(v, before[k]) for k, v in t.model.named_parameters())
    saved = load_file(next(tmp_path.glob("not-finite-*")))
    assert sorted(saved) == ["ir", "vis"]
    assert all(torch.equal(saved[k], torch.cat([b[k] for b in batches])) for k in saved)


def test_lines_come_once_a_minute(capsys, monkeypatch):
    """Steps of twenty seconds, where no bar is drawn: every third says how far the run is."""
    clock, where = [0.0], Progress()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Display(9, where, True) as display:
        for where.step in range(1, 10):
            clock[0] += 20
            display.step(0.5)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train:")]
    assert said == [f"train: stage 1, step {step} of 9, loss 0.500" for step in (3, 6, 9)]


@pytest.mark.parametrize(("lr", "floor"), [(1e-7, 1e-6), (1e-6, 1e-6), (2e-3, 0.5)])
def test_a_rate_below_the_floor_is_not_raised_to_it(lr, floor):
    """The floor ends a decay; it is no rate that nobody asked for."""
    r = recipe("paper", lr=lr, lr_floor=floor)
    assert {learning_rate(r, age) for age in (0, 19, 20, 119)} == {lr}


# --- the second list ---------------------------------------------------------------------------------------


def test_a_checkpoint_written_late_is_of_the_step_it_names(tmp_path, monkeypatch):
    """By a thread that does nothing before somebody waits for it, while training goes on."""
    asked = {}

    class Late(contextlib.nullcontext):
        def __enter__(self):
            return self

        def submit(self, function, folder, step, tensors, state):
            asked[step] = {k: v.clone() for k, v in tensors.items()}
            return SimpleNamespace(result=lambda: function(folder, step, tensors, state))

    monkeypatch.setattr(training, "ThreadPoolExecutor", Late)
    r, speed = recipe("paper", **WALK), Speed(read_every=2, checkpoint_seconds=0)
    t = Trainer(loaded(0), patches(2), r, tmp_path, checkpoint_every=2, speed=speed)
    assert t.fit(progress=False, steps=5) and list(asked) == [2, 4]
    for step, then in asked.items():
        kept = load_file(tmp_path / f"checkpoints/step-{step:09d}.safetensors")
        assert kept.keys() == then.keys() and all(torch.equal(v, then[k]) for k, v in kept.items())
    assert not torch.equal(asked[2]["model.encoder.embed.weight"], asked[4]["model.encoder.embed.weight"])


def test_what_train_hands_back_is_ready_for_use(tmp_path, quick):
    """Every module in evaluation mode, also after a run that was stopped, and as it is in the file."""
    for steps in (3, 0):
        model = loaded(0)
        train(model, patches(2), recipe("paper", **WALK), tmp_path, steps=steps, progress=False)
        assert not [name for name, m in model.named_modules() if m.training]
        saved = load_file(tmp_path / "weights.safetensors")
        assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("start", [0, 1, AT_ONCE, AT_ONCE + 1])
@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_from_memory_may_be_long(start, size):
    """Longer than what travels together, by a whole and by a part, from any batch on."""
    data = PatchSet([pair(shape=(40, 29))], patch=16, stride=2, gain=0.2, seed=3)
    assert len(data) // size > AT_ONCE and len(data) // size % AT_ONCE
    same = zip(
        data.batches(5, size, start=start),
        ResidentPatches(data, "cpu").batches(5, size, start=start),
        strict=True,
    )
    assert all(torch.equal(a[k], b[k]) for a, b in same for k in a)
