"""Disks that fill up while a run saves, runs that go on in a new process, and numbers that no run can have.

Disks are truly full here: a small file system in memory where mounting is allowed, a limit on the size of
files everywhere, and /dev/full for the log. What counts each time: one line, nothing
torn, and later the same end.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smfnet.core.checks import InputError
from smfnet.data.images import write_image
from smfnet.data.patches import LoadedPair, PatchSet
from smfnet.network.model import SMFNet
from smfnet.network.weights import load_weights
from smfnet.training import checkpoints
from smfnet.training import trainer as training
from smfnet.training.processes import main, train
from smfnet.training.recipes import recipe
from smfnet.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds for one subprocess
QUICK = dict(patch=16, stride=8, batch=4, epochs=(1, 1))
SETTINGS = [x for k, v in QUICK.items() for x in ("--set", f"{k}={json.dumps(v)}")]


def noise() -> list[LoadedPair]:
    """Two pairs of noise: 48 patches, 24 steps in two stages."""
    return [LoadedPair(f"n{i}", *np.random.default_rng(i).random((2, 40, 56), np.float32)) for i in range(2)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """The same as files."""
    folder = tmp_path_factory.mktemp("pairs")
    for p in noise():
        for name, image in (("ir", p.ir), ("vi", p.vis)):
            (folder / name).mkdir(exist_ok=True)
            write_image(folder / name / f"{p.stem}.png", image)
    return folder


def command(pairs, out, *options) -> list[str]:
    """A training from the command line, with a checkpoint every three steps."""
    program = [sys.executable, "-m", "smfnet.training.processes", "--data", str(pairs), "--out", str(out)]
    return [*program, "--checkpoint-every", "3", *SETTINGS, *options]


def run(arguments, **options) -> subprocess.CompletedProcess:
    """Start a process and wait for it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT, **options
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory, pairs) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(command(pairs, folder))
    assert done.returncode == 0 and "24 steps, complete" in done.stdout, done.stderr[-2000:]
    return folder


def records(folder: Path) -> list[dict]:
    """The log without what is measured by the clock; every line must be whole."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "images_per_second"} for x in lines]


def same_end(a: Path, b: Path) -> None:
    """Weights and logs are equal to the last bit."""
    one, two = (load_file(folder / "weights.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert records(a) == records(b)


def one_line(done: subprocess.CompletedProcess) -> str:
    """The single line about a failure; progress lines do not count."""
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [x for x in done.stderr.splitlines() if x and not x.startswith("train: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def nothing_torn(folder: Path) -> None:
    """Checkpoints have both parts and right checksums, lines of the log end, no temporary file stays."""
    parts = sorted(p.name for p in (folder / "checkpoints").glob("*") if not p.name.startswith(".tmp"))
    assert [n for n in parts if n.endswith(".json")] == [
        f"{n[:14]}.json" for n in parts if n.endswith(".safetensors")
    ]
    for path in checkpoints.list_checkpoints(folder / "checkpoints"):
        checkpoints._read_one(path)
    assert not list(folder.rglob(".tmp*"))
    if (folder / "log.jsonl").exists():
        text = (folder / "log.jsonl").read_text()
        assert not text or text.endswith("\n")
        records(folder)


# --- a file system that is full -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory whose size can be changed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size, *options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(place)],
            capture_output=True,
        ).returncode

    try:
        if mount("64k"):
            pytest.skip("no file system can be mounted here (not root, or not allowed)")
    except FileNotFoundError:
        pytest.skip("this system has no mount command")
    yield place, lambda size: mount(size, "remount")
    subprocess.run(["umount", str(place)], capture_output=True)


@pytest.mark.parametrize("size", ["0", "100k", "2m", "4m"])
def test_a_full_disk_ends_with_one_line_and_goes_on_later(small_disk, pairs, straight, size):
    """Room for a few bytes, for half a checkpoint, for one, and for two; later there is enough."""
    place, resize = small_disk
    if size == "0":
        (place / "filler").write_bytes(bytes(60 * 1024))
    else:
        assert resize(size) == 0
    line = one_line(run(command(pairs, place / "run")))
    assert "the disk is full" in line or "cannot write there (No space left" in line, line
    if (place / "run" / "checkpoints").exists():
        nothing_torn(place / "run")
    kept = len(checkpoints.list_checkpoints(place / "run" / "checkpoints"))
    assert kept > 0 if size in ("2m", "4m") else kept == 0
    assert resize("64m") == 0
    done = run(command(pairs, place / "run"))
    assert done.returncode == 0 and "24 steps, complete" in done.stdout, done.stderr[-2000:]
    same_end(place / "run", straight)
    assert not (place / "run" / "old-1" / "checkpoints").exists()  # continued, not started over


# --- a limit on the size of files ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 300_000])
def test_a_limit_on_files_is_one_line(tmp_path, pairs, straight, size):
    """The log reaches it in the middle of a line, or a checkpoint does; without it the run goes on."""
    resource = pytest.importorskip("resource", reason="this platform has no limits of resources")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    line = one_line(run(command(pairs, tmp_path), preexec_fn=limit))
    assert "cannot be written (File too large)" in line and ("log.jsonl" in line) == (size == 1000), line
    nothing_torn(tmp_path)
    assert run(command(pairs, tmp_path)).returncode == 0
    same_end(tmp_path, straight)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_log_on_a_full_device(tmp_path, pairs):
    """The device is only written to; it is still there afterwards."""
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    t = Trainer(SMFNet("tiny"), PatchSet(noise(), patch=16, stride=8), recipe("demo", **QUICK), tmp_path)
    with pytest.raises(InputError, match=r"log.jsonl: the disk is full"):
        t.fit(progress=False)
    assert Path("/dev/full").is_char_device()


# --- errors that are made up --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("after", [0, 1, 25])
def test_a_line_of_the_log_is_whole_or_absent(tmp_path, monkeypatch, number, after):
    """The system takes some bytes of a line and then refuses."""

    class Torn:
        "A file that writes `after` bytes of the second line and fails."

        def __init__(self, f):
            self.f, self.left = f, after

        def write(self, data):
            if not self.left:
                raise OSError(number, os.strerror(number))
            part, self.left = data[: self.left], 0
            return self.f.write(part)

        def __getattr__(self, name):
            return getattr(self.f, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.f.close()

    log = tmp_path / "log.jsonl"
    training._append(log, '{"step": 1}\n')
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Torn(real(self, *a, **k)))
    with pytest.raises(OSError):
        training._append(log, '{"step": 2, "loss": 0.123456789}\n')
    monkeypatch.undo()
    assert log.read_text() == '{"step": 1}\n'
    training._append(log, '{"step": 2}\n')
    assert log.read_text().count("\n") == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("part", ["tensors", "json"])
def test_half_a_checkpoint_is_none(tmp_path, monkeypatch, number, part):
    """Whichever part finds no room, the one before stays the newest and no half takes room."""
    tensors = {"a": torch.arange(5.0)}
    checkpoints.save_checkpoint(tmp_path, 1, tensors, {"epoch": 1})

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    if part == "tensors":
        monkeypatch.setattr(checkpoints, "save_file", fail)
    else:
        monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(InputError, match="step-000000002"):
        checkpoints.save_checkpoint(tmp_path, 2, tensors, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoints.load_checkpoint(tmp_path)[1] == {"epoch": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001.json", "step-000000001.safetensors"]


def test_a_batch_that_cannot_be_saved_does_not_hide_why_training_stops(tmp_path, monkeypatch):
    """The loss is the reason; the disk comes second."""
    data = noise()
    data[0].vis[:] = np.nan
    t = Trainer(
        SMFNet("tiny"), PatchSet(data, patch=16, stride=8, min_contrast=-1), recipe("demo", **QUICK), tmp_path
    )

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "save_file", fail)
    with pytest.raises(training.TrainingError, match="loss is not finite.*could not be saved.*disk is full"):
        t.fit(progress=False)


# --- a new process ------------------------------------------------------------------------------------------

UNSEEDED = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from test_full_disk import QUICK, noise
from smfnet.data.patches import PatchSet
from smfnet.network.model import SMFNet
from smfnet.training.processes import train
from smfnet.training.recipes import recipe
if sys.argv[4] != "none": torch.manual_seed(int(sys.argv[4]))
data = PatchSet(noise(), patch=16, stride=8, seed=0)
train(SMFNet("tiny"), data, recipe("demo", **QUICK), sys.argv[1], steps=int(sys.argv[3]), progress=False)
"""


def life(folder, steps, seed="none"):
    """A process that trains to a number of steps."""
    done = run([sys.executable, "-c", UNSEEDED, str(folder), str(Path(__file__).parent), str(steps), seed])
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_goes_on_without_seeding_as_before(tmp_path):
    """Three lives: seed 5, none, another one. The end is that of one life with seed 5."""
    life(tmp_path / "straight", 24, "5")
    for steps, seed in ((7, "5"), (16, "none"), (24, "77")):
        life(tmp_path / "lives", steps, seed)
    assert not list((tmp_path / "lives").glob("old-*"))
    same_end(tmp_path / "lives", tmp_path / "straight")


def started(folder, model, steps=4, **options):
    """Some steps of a run."""
    data = PatchSet(noise(), patch=16, stride=8, seed=0)
    return train(model, data, recipe("demo", **QUICK), folder, steps=steps, progress=False, **options)


def test_loaded_weights_are_a_decision(tmp_path):
    """A run from other loaded weights, or from loaded instead of drawn ones, is another run."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        SMFNet("tiny").save(tmp_path / f"{seed}.safetensors")
    one, two = (lambda n=n: load_weights(tmp_path / f"{n}.safetensors") for n in (1, 2))
    run_ = tmp_path / "run"
    for number, (model, restarts) in enumerate(
        ((one, 0), (one, 0), (two, 1), (lambda: SMFNet("tiny"), 2), (lambda: SMFNet("tiny"), 2), (one, 3))
    ):
        if restarts > len(list(run_.glob("old-*"))):
            with pytest.raises(InputError, match="holds a run with another initial weights"):
                started(run_, model(), steps=4 + number)
        started(run_, model(), steps=4 + number, restart=True)
        assert len(list(run_.glob("old-*"))) == restarts, number


def test_trained_weights_are_a_decision(tmp_path):
    """A second phase that begins where another first phase ended starts over, if that is asked for."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = SMFNet("tiny")
        started(tmp_path / f"first-{seed}", model)
        assert not model.drawn
        if seed == 2:
            with pytest.raises(InputError, match="holds a run with another initial weights"):
                started(tmp_path / "second", model)
            model = load_weights(tmp_path / "first-2" / "weights.safetensors")
        started(tmp_path / "second", model, restart=seed == 2)
    assert (tmp_path / "second" / "old-1" / "checkpoints").is_dir()


# --- numbers that no run can have ---------------------------------------------------------------------------

BAD = [
    ("--seed", "-1", "seed: -1"),
    ("--seed", str(2**70), "seed"),
    ("--minutes", "nan", "minutes: nan"),
    ("--minutes", "-1", "minutes: -1"),
    ("--steps", "-1", "steps: -1"),
    ("--checkpoint-every", "0", "checkpoint_every: 0"),
    ("--checkpoint-every", "-3", "checkpoint_every: -3"),
    ("--stages", "3", "stages"),
    ("--init", "", "no name"),
    ("--init", "gone.pth", "gone.pth: no such weights file"),
    ("--init", "lfs.pth", "lfs.pth: is a Git-LFS pointer"),
    ("--out", "", "no name"),
    ("--out", "lfs.pth", "lfs.pth: cannot be written (File exists)"),
    ("--data", "", "no name"),
    ("--set", "batch=" + "[" * 10**5, "cannot be a setting (RecursionError)"),
    ("--set", "batch=" + "9" * 5000, "cannot be a setting (ValueError)"),
    ("--set", "batch=" + "9" * 400, "batch: 999"),
    ("--set", "lr=1e999", "lr: inf"),
    ("--set", "lr=NaN", "lr: nan"),
    ("--set", "lr=" + "9" * 400, "lr: 999"),
    ("--set", 'weights={"alpha1": NaN}', "alpha1: nan"),
    ("--set", 'weights={"alpha1": ' + "9" * 400 + "}", "weights: "),
    ("--set", 'weights={"alpha1": {"a": [[[1]]]}}', "alpha1"),
    ("--set", 'weights={"name": "x", "cls": 1}', "weights"),
    ("--set", "weights=[1]", "weights"),
    ("--set", "epochs=[1e400, 1]", "epochs"),
    ("--set", "epochs=" + "[" * 50 + "]" * 50, "epochs"),
    ("--set", "patch=true", "patch: True"),
    ("--set", "=3", "no such setting"),
    ("--set", "batch", "is not NAME=VALUE"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=lambda v: str(v)[:24])
def test_bad_numbers_are_one_line(tmp_path, monkeypatch, capsys, pairs, name, value, words):
    """Status 2, the reason in the last line of the error stream, nothing written."""
    monkeypatch.chdir(tmp_path)
    Path("lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    base = ["--data", str(pairs), "--out", "out", *SETTINGS]
    try:
        status = main([*base, name, value])
    except SystemExit as e:  # argparse itself
        status = e.code
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and words in errors[-1] and len(errors[-1]) < 1000, errors[-1][:500]
    assert len([x for x in errors if "error: " in x]) == 1 and not any("Traceback" in x for x in errors)
    assert [p.name for p in tmp_path.iterdir()] == ["lfs.pth"]


@pytest.mark.parametrize(
    "options",
    [{"seed": -1}, {"seed": 1.5}, {"seed": True}, {"checkpoint_every": 0}, {"checkpoint_every": None},
     {"validate_every": 0}, {"minutes": float("nan")}, {"minutes": "5"}, {"minutes": True}, {"steps": 2.0}],
    ids=str,
)  # fmt: skip
def test_bad_numbers_in_python(tmp_path, options):
    """Refused by name before the folder is made."""
    with pytest.raises(InputError, match=next(iter(options))):
        started(tmp_path / "out", SMFNet("tiny"), **{"steps": 4, **options})
    assert not (tmp_path / "out").exists()


def test_the_data_need_a_seed_that_can_be(tmp_path):
    """NumPy refuses negative seeds only when the first batch is drawn."""
    data = PatchSet(noise(), patch=16, stride=8, seed=-1)
    with pytest.raises(InputError, match="seed: -1"):
        Trainer(SMFNet("tiny"), data, recipe("demo", **QUICK), tmp_path)
