"""What a GPU needs of a training run, counted and compared on the CPU.

Whoever asks a GPU for a number waits until it has computed everything before. Here such questions are
counted where PyTorch answers them, whatever the device; steps that nobody waited for are compared with those
that were read one by one; and a compiled step must be one graph.
"""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from smfnet.core.checks import InputError
from smfnet.data.patches import LoadedPair, PatchSet
from smfnet.network.model import SMFNet
from smfnet.training import trainer as training
from smfnet.training.processes import launch, train
from smfnet.training.recipes import recipe
from smfnet.training.trainer import Speed, Trainer, TrainingError

ROOT = Path(__file__).resolve().parents[2]
QUICK = dict(patch=16, stride=8, batch=4, epochs=(1, 1))  # 12 steps a stage
AHEAD = Speed(read_every=4)
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed (extra 'scale')"
)


def noise(bad: tuple[int, ...] = ()) -> PatchSet:
    """48 patches of 16 pixels; a NaN in the patches that are shown first, second … in stage I."""
    pairs = [LoadedPair(f"n{i}", *np.random.default_rng(i).random((2, 40, 56), np.float32)) for i in range(2)]
    data = PatchSet(pairs, patch=16, stride=8, seed=0)
    for place in bad:
        i, y, x = data.items[data.order(1000)[place]]
        pairs[i].vis[y + 8, x + 8] = np.nan
    return data


def trainer(folder: Path, speed=Speed(), *, double=False, data=None, every=50, **changes) -> Trainer:  # noqa: B008
    """A trainer of the tiny network, weights from seed 0."""
    torch.manual_seed(0)
    model = SMFNet("tiny").double() if double else SMFNet("tiny")
    r = recipe("demo", **{**QUICK, **changes})
    return Trainer(model, data or noise(), r, folder, speed=speed, checkpoint_every=every)


def records(folder: Path) -> list[dict]:
    """The log without what is measured by the clock."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def way(run: Trainer) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().double().flatten() for p in run.model.parameters()])


# --- waiting -----------------------------------------------------------------------------------------------

QUESTIONS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


@pytest.fixture
def questions(monkeypatch) -> list[str]:
    """Every question that makes a processor wait for a device, as it is asked."""
    asked = []

    def noted(name, real):
        def ask(self, *args, **kwargs):
            if not sys._getframe(1).f_globals["__name__"].startswith("torch.optim"):
                asked.append(name)  # Adam's counters lie beside the processor, unless it runs ahead
            return real(self, *args, **kwargs)

        return ask

    for name in QUESTIONS:
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    return asked


@pytest.mark.parametrize(
    ("stage", "speed", "changes"),
    [
        (1, AHEAD, {}),
        (2, AHEAD, {"amp": "bf16"}),
        (2, AHEAD, {"accumulate": 2, "batch": 2}),
        (1, Speed(), {}),
        (2, Speed(), {"clip": 0}),
    ],
)
def test_a_number_is_asked_for_once_in_so_many_steps(tmp_path, questions, stage, speed, changes):
    """Of 8 steps two questions when four are read together, eight when each is; none in between."""
    r = {**QUICK, **changes}
    run = Trainer(SMFNet("tiny"), noise(), recipe("demo", **r), tmp_path, stages=(stage,), speed=speed)
    counts, flush = [], run.flush

    def counted():
        before = len(questions)
        flush()
        counts.append((len(questions) - before, len(run.pending)))

    run.flush = counted
    real = run.save

    def saved():  # a checkpoint reads everything; what it asks does not count
        before = list(questions)
        real()
        questions[:] = before

    run.save = saved
    questions.clear()
    run.fit(steps=8, progress=False)
    every = run.speed.read_every
    assert len(questions) <= 8 // every, questions
    assert len(records(tmp_path)) == 8


def test_constants_are_made_once(tmp_path):
    """After the first step no number is brought from the processor's memory into a tensor."""

    class Brought(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "lift_fresh":
                found.append(func)
            return func(*args, **(kwargs or {}))

    for stage in (1, 2):
        run = trainer(tmp_path / str(stage))
        run.progress.stage = stage
        batch, found = next(run.data.batches(0, 4)), []
        run.loss(batch)
        with Brought():
            run.loss(batch)[0].backward()
        assert not found


# --- ahead of the device -----------------------------------------------------------------------------------


def test_steps_that_nobody_waits_for_are_the_same_steps(tmp_path):
    """In float64 weights and log agree to rounding; every step has its line, in order."""
    one, two = trainer(tmp_path / "1", double=True), trainer(tmp_path / "2", AHEAD, double=True)
    start = way(one)
    assert one.fit(progress=False) and two.fit(progress=False)
    assert (way(one) - way(two)).norm() < 1e-9 * (way(one) - start).norm()
    for a, b in itertools.zip_longest(records(tmp_path / "1"), records(tmp_path / "2")):
        assert a.pop("kind") == b.pop("kind") and list(a) == list(b) and a == pytest.approx(b, rel=1e-7)


def test_ahead_stopped_and_continued_is_bit_identical(tmp_path):
    """Steps that were not read when the program ended are taken again; neither weights nor log show it."""
    straight = trainer(tmp_path / "straight", AHEAD)
    assert straight.fit(progress=False)
    for stop in (7, 10, 17, 99):
        life = trainer(tmp_path / "lives", AHEAD, every=3)
        life.resume()
        step = life.step_ahead

        def limited(batches, life=life, step=step, stop=stop):
            if life.progress.step == stop:
                raise KeyboardInterrupt
            return step(batches)

        life.step_ahead = limited
        if stop < 24:
            with pytest.raises(KeyboardInterrupt):
                life.fit(progress=False)
        else:
            assert life.fit(progress=False)
    assert torch.equal(way(life), way(straight))
    assert records(tmp_path / "lives") == records(tmp_path / "straight")


@pytest.mark.parametrize("bad", [0, 21])
def test_a_bad_step_is_skipped_by_the_device_and_named_when_it_is_read(tmp_path, bad):
    """A pixel that is no number: no parameter and no moment is touched, the batch is saved, the run stops."""
    run = trainer(tmp_path, Speed(read_every=8), data=noise(bad=(bad,)), freeze_bn=True)
    seen, step = [], run.step_ahead

    def watched(batches):
        before = way(run)
        taken = step(batches)
        seen.append((taken.bad.item(), torch.equal(before, way(run))))
        return taken

    run.step_ahead = watched
    with pytest.raises(TrainingError, match=rf"loss is not finite.*step {bad // 4};.*a lower learning rate"):
        run.fit(progress=False)
    assert seen == [(float(i == bad // 4), i == bad // 4) for i in range(8)]
    saved = load_file(tmp_path / f"not-finite-step-{bad // 4}.safetensors")
    assert saved["vis"].isnan().sum() >= 1 and saved["vis"].shape == (4, 1, 16, 16)
    assert len(records(tmp_path) if bad >= 4 else []) == bad // 4
    assert way(run).isfinite().all()
    assert all(v.isfinite().all() for s in run.optimiser.state.values() for v in s.values())


def test_a_bad_gradient_ahead_is_named(tmp_path, monkeypatch):
    """A finite loss with an infinite slope."""
    run, real = trainer(tmp_path, AHEAD), training.batch_loss

    def steep(*args):
        total, terms = real(*args)
        return total + (run.model.encoder.embed.weight.flatten()[0] * 0).abs().sqrt(), terms

    monkeypatch.setattr(training, "batch_loss", steep)
    with pytest.raises(TrainingError, match="gradient of encoder is not finite"):
        run.fit(progress=False)
    assert way(run).isfinite().all()


def test_checkpoints_are_written_behind_and_by_time(tmp_path, monkeypatch):
    """In a thread, from copies; not before their time, but always at the end of a stage and of a run."""
    written, real = [], training.save_checkpoint

    def noted(folder, step, *rest):
        written.append((step, threading.current_thread() is threading.main_thread()))
        return real(folder, step, *rest)

    monkeypatch.setattr(training, "save_checkpoint", noted)
    trainer(tmp_path / "steps", AHEAD, every=5).fit(progress=False, steps=14)
    assert written == [(5, False), (10, False), (12, True), (14, True)]
    written.clear()
    seldom = Speed(read_every=4, checkpoint_seconds=1e6)
    trainer(tmp_path / "time", seldom, every=5).fit(progress=False, steps=14)
    assert written == [(12, True), (14, True)]


def test_an_error_behind_is_raised(tmp_path, monkeypatch):
    """A disk that was full when the thread wrote ends the run, though nobody waited for it."""

    def full(*args):
        raise InputError("checkpoints: the disk is full")

    monkeypatch.setattr(training, "save_checkpoint", full)
    with pytest.raises(InputError, match="the disk is full"):
        trainer(tmp_path, AHEAD, every=3).fit(progress=False)


def test_the_log_is_opened_once(tmp_path, monkeypatch):
    """And closed at the end of the run."""
    opened, real = [], Path.open

    def noted(self, mode="r", *args, **kwargs):
        f = real(self, mode, *args, **kwargs)
        opened.extend([f] if self.name == "log.jsonl" and mode == "ab" else [])
        return f

    monkeypatch.setattr(Path, "open", noted)
    trainer(tmp_path).fit(progress=False, steps=5)
    assert len(opened) == 1 and opened[0].closed and len(records(tmp_path)) == 5


# --- one graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "changes"), [(1, {"amp": "bf16"}), (2, {"amp": "bf16"}), (1, {"loss": "released"})]
)
def test_network_and_loss_are_one_graph(tmp_path, monkeypatch, stage, changes):
    """Dynamo takes the whole step without a break, and the second step without a second graph."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    run = trainer(tmp_path, **changes, compile=True)
    run.progress.stage = stage
    values = [run.train_step([batch]) for batch in itertools.islice(run.data.batches(0, 4), 2)]
    assert counter.frame_count == 1 and counter.op_count > 200
    torch._dynamo.reset()
    plain = trainer(tmp_path / "plain", **changes)
    plain.progress.stage = stage
    for batch, found in zip(plain.data.batches(0, 4), values):
        assert plain.train_step([batch]) == pytest.approx(found, rel=1e-4)


# --- what only changes speed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "speed", "words"),
    [
        ({"amp": "bf16"}, Speed(), "amp 'bf16' instead of 'off'"),
        ({"channels_last": True}, Speed(), "channels_last True instead of False"),
        ({"compile": True}, Speed(), "compile True instead of False"),
        ({}, AHEAD, "read_every 4 instead of 1"),
        ({}, Speed(deterministic=True), "deterministic True instead of False"),
    ],
)
def test_a_run_goes_on_with_other_speed(tmp_path, capsys, monkeypatch, change, speed, words):
    """It is recorded and remarked on, and part of no identity; there and back."""
    monkeypatch.setattr(torch, "compile", lambda f: f)
    trainer(tmp_path).fit(steps=3, progress=False)
    changed = trainer(tmp_path, speed, **change)
    assert changed.resume() and changed.progress.step == 3
    assert f"goes on with {words}" in capsys.readouterr().out
    changed.fit(steps=5, progress=False)
    back = trainer(tmp_path)
    assert back.resume() and back.fit(steps=7, progress=False)
    assert "goes on with" in capsys.readouterr().out
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 8))
    assert not list(tmp_path.glob("old-*")) and way(back).isfinite().all()


def test_a_run_without_a_change_says_nothing(tmp_path, capsys):
    """Also if it was saved by an earlier version, which recorded less."""
    run = trainer(tmp_path)
    run.fit(steps=3, progress=False)
    for key in ("processes", "sync_batchnorm", "speed", "device"):
        del run.identity[key]
    run.save()
    assert trainer(tmp_path).resume() and not capsys.readouterr().out


def test_starting_over_is_asked_for_and_said(tmp_path, capsys):
    """Another run is refused and stays in place; asked for, all of it is set aside, weights too."""
    data, r = noise(), recipe("demo", **QUICK)
    torch.manual_seed(0)
    train(SMFNet("tiny"), data, r, tmp_path, progress=False)
    results = ("checkpoints", "log.jsonl", "stage1.safetensors", "stage2.safetensors", "weights.safetensors")
    before = {n: (tmp_path / n).stat().st_mtime_ns for n in results}
    other = recipe("demo", **{**QUICK, "lr": 1e-3})
    with pytest.raises(InputError, match="another recipe.*say restart to set it aside"):
        train(SMFNet("tiny"), data, other, tmp_path, progress=False, steps=1)
    assert before == {n: (tmp_path / n).stat().st_mtime_ns for n in results}
    capsys.readouterr()
    where = train(SMFNet("tiny"), data, other, tmp_path, progress=False, steps=1, restart=True)
    assert where.step == 1 and {p.name for p in (tmp_path / "old-1").iterdir()} == set(results)
    said = capsys.readouterr().out
    assert "set aside in old-1" in said and all(name in said for name in results)


@pytest.mark.parametrize(
    ("name", "value"), [("read_every", 0), ("read_every", 2.5), ("checkpoint_seconds", -1)]
)
def test_bad_speeds(tmp_path, name, value):
    """One line."""
    with pytest.raises(InputError, match=f"{name}: {value}"):
        trainer(tmp_path, Speed(**{name: value}))


# --- several processes -------------------------------------------------------------------------------------


@needs_accelerate
def test_two_processes_go_on_as_one_and_back(tmp_path, capsys):
    """In float64 with frozen BatchNorm the end is that of one process all along."""
    data, r = noise(), recipe("demo", **{**QUICK, "freeze_bn": True})

    def life(folder, steps, processes):
        torch.manual_seed(0)
        model = SMFNet("tiny").double()
        train(model, data, r, folder, processes=processes, steps=steps, progress=False)
        found = load_file(folder / "weights.safetensors")
        return torch.cat([found[k].double().flatten() for k in sorted(found)])

    straight = life(tmp_path / "straight", 15, 1)
    for steps, processes in ((4, 2), (9, 1), (15, 2)):
        end = life(tmp_path / "changing", steps, processes)
    assert ((end - straight).norm() / straight.norm()).item() < 1e-9
    assert [x["step"] for x in records(tmp_path / "changing")] == list(range(1, 16))
    said = capsys.readouterr().out
    assert "processes 1 instead of 2" in said and "processes 2 instead of 1" in said
    for a, b in zip(records(tmp_path / "changing"), records(tmp_path / "straight")):
        assert a.pop("kind") == b.pop("kind") and a == pytest.approx(b, rel=1e-7)


def fail(words: str) -> None:
    """What a process runs that fails in a way of its own."""
    raise ZeroDivisionError(words)


@needs_accelerate
def test_launching_touches_no_gpu_and_tells_unknown_errors():
    """The parent asks CUDA nothing; an error that is none of ours is told with its words."""
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
def touched(*args, **kwargs): sys.exit("CUDA was asked")
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, touched)
import test_speed
try: test_speed.launch(test_speed.fail, "the words of it", processes=2)
except RuntimeError as e: print("ZeroDivisionError" in str(e) and "the words of it" in str(e))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.split() == ["True"], done.stderr[-2000:]


def test_a_function_that_others_cannot_import_is_refused():
    """Before anything is started."""
    with pytest.raises(InputError, match="cannot be handed to other processes"):
        launch(fail, lambda: math.pi, processes=2)
