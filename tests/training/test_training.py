"""Training that survives: kills, damage, full disks, bad numbers, bad input; several processes; live curves.

Every kill here is a SIGKILL of a real process. What counts each time is the end: weights and log of the run
that was started again must equal, to the last bit, those of a run that nothing happened to.
"""

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smfnet.core.checks import InputError
from smfnet.data.images import write_image
from smfnet.data.patches import LoadedPair, PatchSet
from smfnet.data.scenes import write_scenes
from smfnet.network.model import SMFNet
from smfnet.training import checkpoints
from smfnet.training import trainer as training
from smfnet.training.recipes import recipe
from smfnet.training.trainer import Trainer, TrainingError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 240  # seconds for one subprocess; it needs about 10
STEPS = 24  # two stages of one epoch with 12 steps each
QUICK = dict(patch=16, stride=8, batch=4, epochs=(1, 1))
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed (extra 'scale')"
)
needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")


def noise_pairs() -> list[LoadedPair]:
    """Two pairs of noise: 48 patches of 16 pixels with stride 8, none of them flat."""
    return [
        LoadedPair(f"noise{i}", *np.random.default_rng(i).random((2, 40, 56), np.float32)) for i in range(2)
    ]


def trainer(
    folder: Path, *, model: SMFNet | None = None, pairs: list[LoadedPair] | None = None, **changes
) -> Trainer:
    """A trainer of the tiny network on noise, with weights from seed 0."""
    torch.manual_seed(0)
    data = PatchSet(pairs or noise_pairs(), patch=16, stride=8, seed=0)
    return Trainer(
        model or SMFNet("tiny"), data, recipe("demo", **{**QUICK, **changes}), folder, checkpoint_every=3
    )


def records(folder: Path) -> list[dict]:
    """The log without what is measured by the clock."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def same_end(a: Path, b: Path) -> None:
    """Weights of both stages and logs are equal to the last bit."""
    for stage in (1, 2):
        one, two = (load_file(folder / f"stage{stage}.safetensors") for folder in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert records(a) == records(b) and len([r for r in records(a) if r["kind"] == "step"]) == STEPS


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    assert trainer(folder).fit(progress=False)
    return folder


# --- kill -9 -----------------------------------------------------------------------------------------------

# A training program; `where` names the moment at which it kills itself ("" never): SIGKILL runs no handler
# and flushes nothing. A number instead: after so many records it waits to be killed from outside.
PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[3])
import torch
from smfnet.training import checkpoints
from smfnet.training import trainer as training
from test_training import trainer
folder, where = sys.argv[1], sys.argv[2]
life, count = trainer(folder), {"n": 0}
torch.manual_seed(12345)  # a life begins with the global generator in any state
life.resume()
def die(at):
    count["n"] += 1
    if count["n"] == at: os.kill(os.getpid(), signal.SIGKILL)
if where == "before the checkpoint's JSON":
    write = checkpoints.write_json
    def half(*args): die(3); write(*args)
    checkpoints.write_json = half
if where == "inside a line of the log":
    record = life.record
    def torn(**values):
        with life.log.open("a") as f:
            f.write('{"kind": "st')
            f.flush()
            die(5)
            f.truncate(life.log.stat().st_size - 12)
        record(**values)
    life.record = torn
if where.isdigit():
    record = life.record
    def waiting(**values):
        record(**values)
        if life.log.read_bytes().count(b"\\n") >= int(where): time.sleep(3600)
    life.record = waiting
if where == "between gradient and step":
    step = life.optimiser.step
    def killed(*args, **kwargs): die(4); return step(*args, **kwargs)
    life.optimiser.step = killed
if where == "while weights are written":
    save = life.model.save
    def half_written(path, **notes): save(path, **notes); die(1)
    life.model.save = half_written
assert life.fit(progress=False)
"""


def live_once(folder: Path, where: str = "") -> subprocess.Popen:
    """Start one life of the program."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), where, str(HERE)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def lines(folder: Path) -> int:
    """Lines of the log so far."""
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@needs_sigkill
def test_killed_at_the_worst_moments_ends_bit_identical(tmp_path, straight):
    """Four lives end by SIGKILL: in a checkpoint, the log, a step, the weights; a fifth completes."""
    for where in (
        "before the checkpoint's JSON",
        "inside a line of the log",
        "between gradient and step",
        "while weights are written",
    ):
        life = live_once(tmp_path, where)
        _, errors = life.communicate(timeout=LIMIT)
        assert life.returncode == -signal.SIGKILL, f"{where}: {errors[-2000:]}"
    assert 0 < lines(tmp_path) <= STEPS
    life = live_once(tmp_path)
    _, errors = life.communicate(timeout=LIMIT)
    assert life.returncode == 0, errors[-2000:]
    same_end(tmp_path, straight)


@needs_sigkill
def test_killed_from_outside_ends_bit_identical(tmp_path, straight):
    """kill -9 by another process, twice, whenever some more steps are in the log: in stage I and in stage II.

    The kill arrives somewhere between the target and four records later, where the program waits for it:
    however slow this test is beside other work, the program is not finished by then.
    """
    for target in (7, 17):
        life, end = live_once(tmp_path, str(target + 4)), time.monotonic() + LIMIT
        while lines(tmp_path) < target and life.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        life.kill()
        _, errors = life.communicate(timeout=LIMIT)
        assert life.returncode == -signal.SIGKILL, errors[-2000:]
        assert target <= lines(tmp_path) < STEPS
    life = live_once(tmp_path)
    _, errors = life.communicate(timeout=LIMIT)
    assert life.returncode == 0, errors[-2000:]
    same_end(tmp_path, straight)


# --- damaged files -----------------------------------------------------------------------------------------


def stopped(folder: Path, after: int) -> Trainer:
    """A run that an exception ends after so many steps."""
    t, count = trainer(folder), iter(range(after))
    step = t.train_step

    def limited(batches):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return step(batches)

    t.train_step = limited
    with pytest.raises(KeyboardInterrupt):
        t.fit(progress=False)
    return t


def flip_a_bit(path: Path) -> None:
    """Damage the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:100]), lambda p: p.write_bytes(b"")],
    ids=["bit", "gone", "short", "empty"],
)
@pytest.mark.parametrize("part", [".safetensors", ".json"])
def test_damaged_last_checkpoint_falls_back_to_the_same_end(tmp_path, straight, part, damage):
    """The one before is used, the message says so, and the end is the same."""
    stopped(tmp_path, after=14)
    last, before = checkpoints.list_checkpoints(tmp_path / "checkpoints")[:2]
    damage(last.with_suffix(part))
    again = trainer(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert again.resume()
    if last.exists():  # without its JSON a checkpoint was never complete: nothing to warn about
        assert any(last.name in str(w.message) and before.name in str(w.message) for w in caught)
    assert again.progress.step == int(before.stem[5:])
    assert again.fit(progress=False)
    same_end(tmp_path, straight)


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    """Starting over silently would lose the work."""
    stopped(tmp_path, after=10)
    for path in checkpoints.list_checkpoints(tmp_path / "checkpoints"):
        flip_a_bit(path.with_suffix(".safetensors"))
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        trainer(tmp_path).resume()


def test_full_disk_keeps_the_old_checkpoint(tmp_path, straight, monkeypatch):
    """The error names the disk; later the run continues from the checkpoint before to the same end."""
    t, write, count = trainer(tmp_path), checkpoints.save_file, iter(range(2))

    def until_full(tensors, path):
        if next(count, None) is None:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", until_full)
    with pytest.raises(InputError, match="the disk is full"):
        t.fit(progress=False)
    assert [p.stem for p in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == [
        "step-000000006",
        "step-000000003",
    ]
    assert sorted(p.suffix for p in (tmp_path / "checkpoints").iterdir()) == [
        ".json",
        ".json",
        ".safetensors",
        ".safetensors",
    ]
    monkeypatch.undo()
    again = trainer(tmp_path)
    assert again.resume() and again.progress.step == 6 and again.fit(progress=False)
    same_end(tmp_path, straight)


def test_lost_log_lines_are_reported(tmp_path):
    """A log that is shorter than its checkpoint remembers is not filled up with zeros."""
    t = stopped(tmp_path, after=7)
    t.log.write_text("")
    again = trainer(tmp_path)
    with pytest.warns(UserWarning, match="records of earlier steps are missing"):
        assert again.resume()
    assert t.log.read_bytes() == b""


# --- numbers that are not finite ---------------------------------------------------------------------------


def test_loss_that_is_not_finite_saves_the_batch(tmp_path):
    """The run stops before the weights change; the batch holds the bad pixel."""
    pairs = noise_pairs()
    t = trainer(tmp_path, pairs=pairs)
    image, y, x = t.data.items[t.data.order(1000)[4]]  # first pair of the second batch
    pairs[image].vis[y + 8, x + 8] = np.nan
    seen = []

    def remember(batches):
        seen.append({k: v.clone() for k, v in t.model.state_dict().items()})
        return type(t).train_step(t, batches)

    t.train_step = remember
    with pytest.raises(
        TrainingError,
        match=r"loss is not finite \(terms: .*ssim_vis.*not-finite-step-\d.safetensors.*lower learning rate",
    ):
        t.fit(progress=False)
    saved = load_file(next(tmp_path.glob("not-finite-step-*.safetensors")))
    assert (
        set(saved) == {"ir", "vis"}
        and saved["vis"].shape == (4, 1, 16, 16)
        and torch.isnan(saved["vis"]).any()
    )
    weights = {k: v for k, v in t.model.named_parameters()}
    assert all(torch.equal(seen[-1][k], v) for k, v in weights.items())


def test_gradient_that_is_not_finite_stops_before_the_step(tmp_path, monkeypatch):
    """A finite loss with an infinite slope would otherwise turn all weights into NaN."""
    t = trainer(tmp_path)
    real = training.batch_loss

    def infinite_slope(*args):
        total, terms = real(*args)
        return total + (t.model.encoder.embed.weight.flatten()[0] * 0).abs().sqrt(), terms

    monkeypatch.setattr(training, "batch_loss", infinite_slope)
    with pytest.raises(TrainingError, match="gradient of encoder is not finite"):
        t.fit(progress=False)
    assert list(tmp_path.glob("not-finite-step-0.safetensors")) and all(
        torch.isfinite(p).all() for p in t.model.parameters()
    )


# --- bad input ---------------------------------------------------------------------------------------------


def test_checkpoint_of_another_architecture(tmp_path):
    """It is refused by name, and by the field that differs; `restart` sets it aside."""
    stopped(tmp_path, after=4)
    torch.manual_seed(0)
    other = trainer(tmp_path, model=SMFNet("tiny", dim=32))
    with pytest.raises(InputError, match=r"another config \(dim 16 instead of 32\).*use another folder"):
        other.resume()
    assert not other.resume(other="restart") and (tmp_path / "old-1" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, r"recipe \(lr 0.002 instead of 0.5\)"),
        ({"batch": 2}, r"recipe \(batch 4 instead of 2\)"),
    ],
)
def test_checkpoint_of_another_recipe(tmp_path, changes, message):
    """The message names the setting."""
    stopped(tmp_path, after=4)
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **changes).resume()


def test_checkpoint_of_other_data(tmp_path):
    """One changed pixel makes another data set, in either modality."""
    stopped(tmp_path, after=4)
    for modality in ("ir", "vis"):
        pairs = noise_pairs()
        getattr(pairs[0], modality)[0, 0] += 0.25
        with pytest.raises(InputError, match="another data;"):
            trainer(tmp_path, pairs=pairs).resume()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: no such setting"),
        ({"lr": "1e-3"}, "lr: '1e-3'; give a number above 0"),
        ({"lr": -1.0}, "lr: -1.0"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"batch": 0}, "batch: 0; give a whole number of 1 or more"),
        ({"batch": 2.5}, "batch: 2.5"),
        ({"batch": True}, "batch: True"),
        ({"epochs": [1]}, "epochs"),
        ({"epochs": [1, 0]}, "epochs"),
        ({"epochs": 3}, "epochs: 3"),
        ({"patch": 8}, "patch: 8; give a whole number of 16"),
        ({"clip": -1}, "clip: -1"),
        ({"amp": "fp16"}, "amp: 'fp16' is unknown"),
        ({"loss": "papers"}, "loss: 'papers' is unknown; choose one of paper, released"),
        ({"reading": "edges"}, "reading: 'edges'"),
        ({"compile": "yes"}, "compile: 'yes'; give true or false"),
        ({"weights": {"alpha9": 1}}, "alpha9"),
        ({"weights": [1]}, r"weights: \[1\]"),
        ({"weights": {"alpha1": -1}}, "alpha1: -1"),
        ({"accumulate": 0}, "accumulate: 0"),
    ],
)
def test_unknown_or_bad_setting(changes, message):
    """Each names the setting, what was found and what would do."""
    with pytest.raises(InputError, match=message):
        recipe("demo", **changes)


def test_unknown_recipe_and_preset():
    """Both list what there is."""
    with pytest.raises(InputError, match="'papper' is unknown; choose one of paper, released, demo"):
        recipe("papper")
    with pytest.raises(InputError, match="huge.*(paper|tiny)"):
        SMFNet("huge")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 49}, "batch: 49 pairs, but the data has only 48 patches; choose a smaller batch"),
        ({"batch": 20, "accumulate": 3}, "accumulate: 3 batches, but the data has only 48"),
    ],
)
def test_batch_larger_than_data(tmp_path, changes, message):
    """Also when only the accumulated batches are more than there is: the epoch would silently be empty."""
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **changes)


def test_patch_larger_than_an_image():
    """The image is named."""
    with pytest.raises(
        InputError, match="noise0: 56×40 is smaller than a 48×48 patch; choose a smaller patch"
    ):
        PatchSet(noise_pairs(), patch=48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device: 'tpu' is unknown"),
        ({"stages": (3,)}, r"stages: \(3,\)"),
        ({"sync_batchnorm": True}, "sync_batchnorm: works on GPUs only"),
    ],
)
def test_bad_arguments_of_a_trainer(tmp_path, arguments, message):
    """Refused before anything is written."""
    with pytest.raises(InputError, match=message):
        Trainer(
            SMFNet("tiny"),
            PatchSet(noise_pairs(), patch=16, stride=8),
            recipe("demo", **QUICK),
            tmp_path / "run",
            **arguments,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(tmp_path):
    """The message says what to use."""
    with pytest.raises(InputError, match="finds no CUDA device; use 'cpu'"):
        Trainer(
            SMFNet("tiny"),
            PatchSet(noise_pairs(), patch=16, stride=8),
            recipe("demo", **QUICK),
            tmp_path,
            device="cuda",
        )


# --- options -----------------------------------------------------------------------------------------------


def test_time_budget_and_accumulation_resume_exactly(tmp_path, monkeypatch):
    """A run that its budget stops every two steps equals the straight one, with accumulation."""
    changes = dict(accumulate=2, batch=8)  # three steps a stage
    assert trainer(tmp_path / "straight", **changes).fit(progress=False)
    clock = iter(range(10**6))  # a second passes whenever somebody looks
    monkeypatch.setattr(
        training, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    )
    steps, done = [0], False
    while not done:
        t = trainer(tmp_path / "stopped", **changes)
        assert t.resume() == (len(steps) > 1)
        done = t.fit(minutes=2.5 / 60, progress=False)
        assert t.progress.step > steps[-1], "a budget of 2.5 seconds ended before the first step"
        steps.append(t.progress.step)
    assert steps == [0, 2, 4, 6] and records(tmp_path / "stopped") == records(tmp_path / "straight")
    one, two = (load_file(tmp_path / name / "stage2.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_callback_changes_nothing(tmp_path, straight):
    """A listener gets every record as it is in the log, and draws random numbers without effect."""
    heard = []
    t = trainer(tmp_path)
    assert t.fit(progress=False, on_record=lambda record: (heard.append(record), torch.rand(3)))
    assert [{k: v for k, v in r.items() if k != "images_per_second"} for r in heard] == records(tmp_path)
    same_end(tmp_path, straight)


# --- more than one process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory) -> Path:
    """The two pairs of noise as files."""
    folder = tmp_path_factory.mktemp("pairs")
    for p in noise_pairs():
        for name in ("ir", "vi"):
            (folder / name).mkdir(exist_ok=True)
            write_image(folder / name / f"{p.stem}.png", getattr(p, {"ir": "ir", "vi": "vis"}[name]))
    return folder


def torchrun(data: Path, out: Path, *options: str) -> subprocess.Popen:
    """Start the training program with torchrun, two processes, in a process group of its own."""
    settings = [x for k, v in QUICK.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "smfnet.training.processes", "--data", str(data), "--out", str(out), *options]
    command = [*launcher, *program, "--checkpoint-every", "3", *settings]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finished(job: subprocess.Popen) -> str:
    """Wait for a job that must succeed."""
    try:
        out, errors = job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    assert job.returncode == 0, errors[-3000:]
    return out


@needs_accelerate
@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="finding torchrun's processes needs /proc"
)
def test_torchrun_killed_and_started_again_ends_bit_identical(tmp_path, pair_folder):
    """Two processes under torchrun: all killed, started again, the run ends as the straight one does."""
    out = finished(torchrun(pair_folder, tmp_path / "straight"))
    assert f"{STEPS} steps, complete" in out and out.count("complete") == 1
    job, end = torchrun(pair_folder, tmp_path / "killed"), time.monotonic() + LIMIT
    while lines(tmp_path / "killed") < 4 and job.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    family = [job.pid, *workers_of(tmp_path / "killed")]
    for process in dict.fromkeys(family):
        os.kill(process, signal.SIGKILL)
    job.communicate(timeout=LIMIT)
    assert len(set(family)) == 3  # torchrun and its two workers
    assert 4 <= lines(tmp_path / "killed") < STEPS, "20 steps were left when the kill was sent"
    assert "complete" in finished(torchrun(pair_folder, tmp_path / "killed"))
    same_end(tmp_path / "straight", tmp_path / "killed")


@needs_accelerate
def test_torchrun_stops_after_steps_and_by_time(tmp_path, pair_folder):
    """Both processes stop together: after the steps that were asked for, or when the time of either is up."""
    out = finished(torchrun(pair_folder, tmp_path, "--steps", "4"))
    assert "4 steps, stopped as asked" in out and lines(tmp_path) == 4
    out = finished(torchrun(pair_folder, tmp_path, "--minutes", "0"))
    assert "4 steps, stopped by the time budget" in out and lines(tmp_path) == 4


def workers_of(out: Path) -> list[int]:
    """Processes with this test's own folder on their command line (workers have sessions of their own)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in command and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


@needs_accelerate
def test_launched_processes_give_the_gradients_of_one(tmp_path):
    """Gradients of both stages agree to rounding; frozen BatchNorm, correlation per pair.

    In float32 sums over four pairs are formed in another order: 6e-7 of the gradient's norm where it was
    measured. 1e-5 leaves room for other processors; a share counted twice or left out would change a tenth.
    """
    program = """
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from smfnet.training.processes import join_team, launch
from smfnet.training.recipes import freeze_batchnorm, recipe
from smfnet.training.trainer import Trainer
from smfnet.data.patches import PatchSet
from smfnet.network.model import SMFNet
from test_training import QUICK, noise_pairs
folder, data = Path(sys.argv[1]), PatchSet(noise_pairs(), patch=16, stride=8, seed=0)
r = recipe("demo", **QUICK, clip=0, freeze_bn=True)
def step(stage):
    torch.manual_seed(0)
    model = SMFNet("tiny").train()
    freeze_batchnorm(model)
    t = Trainer(model, data, r, folder / "run", stages=(stage,), accelerator=join_team())
    values = t.train_step([next(data.batches(0, 4, share=(t.team.rank, t.team.size)))])
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    found["loss"] = torch.tensor([values["loss"]])
    if t.team.main: save_file(found, folder / f"{stage}-{t.team.size}")
def steps():
    for stage in (1, 2): step(stage)
if __name__ == "__main__":
    import member  # this file by its name: what other processes run must be importable
    member.steps()
    launch(member.steps, processes=2)
    for stage in (1, 2):
        one, two = load_file(folder / f"{stage}-1"), load_file(folder / f"{stage}-2")
        assert one.keys() == two.keys()
        assert abs(one.pop("loss") / two.pop("loss") - 1) < 1e-5
        a, b = (torch.cat([g[k].flatten().double() for k in sorted(g)]) for g in (one, two))
        print(((a - b).norm() / a.norm()).item())
"""
    for number, path in ((1, tmp_path), (2, HERE)):
        program = program.replace(f"sys.argv[{number}]", repr(str(path)))
    (tmp_path / "member.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "member.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = [float(x) for x in done.stdout.split()]
    assert len(differences) == 2 and max(differences) < 1e-5, differences


def test_bad_input_of_the_program(tmp_path, pair_folder, capsys):
    """The message goes to stderr, the status is 2, nothing is written."""
    from smfnet.training.processes import main

    base = ["--data", str(pair_folder), "--out", str(tmp_path / "out"), "--set", "patch=16"]
    for arguments, word in (
        (["--preset", "huge"], "huge"),
        (["--recipe", "papper"], "papper"),
        (["--set", "bach=3"], "bach"),
        (["--set", "batch=999"], "smaller batch"),
        (["--data", str(tmp_path)], str(tmp_path)),
        (["--init", str(tmp_path / "none.safetensors")], "none.safetensors"),
    ):
        assert main([*base, *arguments]) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- live curves -------------------------------------------------------------------------------------------

WATCHED = """
import json, time
from smfnet.training.live import LivePlot
def write(first, last):
    for i in range(first, last):
        record = {"kind": "step", "stage": 1, "epoch": 0, "step": i, "loss": 1 / i, "lr": 0.1}
        with open(LOG, "a") as f: f.write(json.dumps(record) + "\\n")
"""
FAILING = """
with LivePlot(LOG, every=0.1, share=1) as live:
    write(1, 9)
    live()
    raise ValueError("stopped here")
"""
FOLLOWING = """
with LivePlot(LOG, every=0.1, share=1) as live, live.following():
    end = time.monotonic() + LIMIT
    while live.drawn < 4 and time.monotonic() < end:
        write(live.drawn, live.drawn + 1)
        time.sleep(0.1)
print(live.drawn)
"""


def run_cells(*sources: str):
    """Execute cells in a kernel; the notebook with outputs, and how many times an output was replaced."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    replaced = []

    class Client(nbclient.NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] == "update_display_data":
                replaced.append(msg)
            return super().process_message(msg, cell, cell_index)

    Client(notebook, timeout=LIMIT, kernel_name="python3", allow_errors=True).execute()
    return notebook, len(replaced)


def test_live_picture_is_replaced_and_stays(tmp_path):
    """One picture, replaced in place from the loop and from a thread, left there when the cell fails.

    Drawn are: one at the beginning, three by the thread, for which the cell waits however slow the machine,
    and one at the end; all but the first replace it. The failing cell replaces its picture once at least.
    """
    log = repr(str(tmp_path / "a.jsonl"))
    sources = (s.replace("LOG", log).replace("LIMIT", str(LIMIT / 2)) for s in (WATCHED, FAILING, FOLLOWING))
    notebook, replaced = run_cells(*sources)
    failed, followed = notebook.cells[1].outputs, notebook.cells[2].outputs
    assert [o["output_type"] for o in failed] == ["display_data", "error"]
    assert "image/png" in failed[0]["data"]
    pictures = [o for o in followed if "image/png" in o.get("data", {})]
    drawn = int("".join(o["text"] for o in followed if o["output_type"] == "stream"))
    assert len(pictures) == 1 and drawn >= 5 and replaced >= drawn
    assert pictures[0]["data"]["image/png"] != failed[0]["data"]["image/png"]


def run_train(folder: Path, **params) -> list[dict]:
    """Execute the experiment notebook; the outputs of its cells. The executed copy is written in any case."""
    papermill = pytest.importorskip("papermill")
    folder.mkdir(parents=True, exist_ok=True)
    done = papermill.execute_notebook(
        ROOT / "nbs/experiments/train.ipynb",
        folder / "executed.ipynb",
        {"out": str(folder), **params},
        kernel_name="python3",
        progress_bar=False,
    )
    return [o for c in done["cells"] for o in c.get("outputs", [])]


@pytest.fixture(scope="module")
def train_scenes(tmp_path_factory) -> Path:
    """Four scenes to train on and one to validate."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "train", 4, seed=0, size=(64, 96))
    write_scenes(folder / "val", 1, seed=9, size=(64, 96))
    return folder


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=needs_accelerate)])
def test_train_notebook_fails_continues_and_shows(tmp_path, train_scenes, processes):
    """A failed run leaves its executed copy; started again it continues, and its picture stays."""
    papermill = pytest.importorskip("papermill")
    settings = {**QUICK, "patch": 32, "stride": 16, "epochs": [2, 1]}
    params = {"stage": 1, "data": str(train_scenes), "processes": processes, "settings": settings}
    blocked = tmp_path / "pictures/stage1-001.png"
    blocked.mkdir(parents=True)  # the second validation cannot write its picture
    with pytest.raises(papermill.PapermillExecutionError, match="stage1-001.png: is a folder"):
        run_train(tmp_path, **params)
    failed = json.loads((tmp_path / "executed.ipynb").read_text())
    outputs = [o for c in failed["cells"] for o in c.get("outputs", [])]
    wanted = [o for o in outputs if "image/png" in o.get("data", {}) or o["output_type"] == "error"]
    shown = [o["output_type"] for o in wanted]
    assert shown[:2] == ["display_data", "error"]
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    first_epoch = [line for line in log if '"epoch": 0' in line]
    blocked.rmdir()
    outputs = run_train(tmp_path, **params)
    assert any("complete" in "".join(o.get("text", "")) for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2  # live curves, validation pairs
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(first_epoch) > 5
    assert log[: len(first_epoch)] == first_epoch  # measured speeds included: continued, not repeated
    steps = [json.loads(line)["step"] for line in log if '"kind": "step"' in line]
    assert steps == list(range(1, len(steps) + 1)) and (tmp_path / "weights.safetensors").exists()


def test_train_notebook_is_determined_by_its_parameters(tmp_path, train_scenes):
    """The same parameters give the same weights, byte for byte, also after a stop on the way.

    One machine, one thread: every sum is formed in the same order. Each run is a process of its own. Progress
    is one line, as there is no terminal.
    """
    settings = {**QUICK, "patch": 32, "stride": 16, "epochs": [2, 1]}
    params = {"stage": 1, "data": str(train_scenes), "steps": 7, "settings": settings}
    outputs = run_train(tmp_path / "straight", **params)
    text = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    assert re.search(r"\b7 steps, .* stopped as asked", text)
    assert text.count("train: stage 1, step 7 of 7, loss") == 1
    run_train(tmp_path / "stopped", **{**params, "steps": 3})
    run_train(tmp_path / "stopped", **params)
    one, two = (tmp_path / name / "weights.safetensors" for name in ("straight", "stopped"))
    assert one.read_bytes() == two.read_bytes()
    assert [r["step"] for r in records(tmp_path / "stopped")] == list(range(1, 8))
