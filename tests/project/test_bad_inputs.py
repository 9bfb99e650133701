"""Bad inputs over all commands, the quick part; and that the script would see each kind of fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("copies of a process need fork", allow_module_level=True)

import bad_inputs
from bad_inputs import Case, follow, half_written, judge, look

SCRIPT = Path(bad_inputs.__file__)


def test_no_bad_input_ends_in_a_traceback_a_hang_or_damage():
    """The quick part in a process of its own; the whole is run by hand, see the script."""
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    print(done.stdout)


def test_there_are_enough_of_them(tmp_path, monkeypatch):
    """Hundreds of cases, over all commands, with different names."""
    monkeypatch.chdir(tmp_path)
    cases = bad_inputs.all_cases(tmp_path, bad_inputs.build(tmp_path))
    assert len(cases) >= 1000 and len({c.name for c in cases}) == len(cases)
    commands = {c.words[0] for c in cases if c.program == "smfnet" and c.words}
    assert commands >= {"fuse", "video", "evaluate", "data", "weights", "export-onnx"}
    tasks = {c.words[1] for c in cases if c.words[:1] == ("data",) and len(c.words) > 1}
    assert tasks >= {"list", "get", "add", "verify", "check"} and any(c.program == "train" for c in cases)
    assert len(bad_inputs.quick(cases)) >= 80


@pytest.fixture
def place(tmp_path):
    """A place with two files, and what it looks like."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    return tmp_path, look(tmp_path)


CASE = Case("fuse something", ("fuse",))


def test_a_clean_refusal_is_no_fault(place):
    assert judge(CASE, 2, "smfnet: error: a: is no image; replace it\n", *place) == []


@pytest.mark.parametrize(
    ("status", "said", "fault"),
    [
        (70, "", "traceback"),
        (2, "Traceback (most recent call last):", "traceback"),
        (120, "Exception ignored in: <_io.TextIOWrapper>", "traceback"),
        (None, "", "hang"),
        (-11, "", "crash"),
        (0, "", "accepted"),
        (2, "line\n" * 100, "wordy"),
    ],
)
def test_faults_of_ends_are_seen(place, status, said, fault):
    assert fault in judge(CASE, status, said, *place)


def test_faults_of_files_are_seen(place):
    """Other content, a file that is gone or became another kind, and new files that are not whole."""
    folder, before = place
    (folder / "a").write_text("A")
    assert judge(CASE, 2, "", folder, before) == ["replaced"]
    (folder / "a").unlink()
    assert judge(CASE, 2, "", folder, before) == ["replaced"]
    (folder / "a").mkdir()
    assert judge(CASE, 2, "", folder, before) == ["replaced"]
    before = look(folder)
    for name, content in (("x.csv", b""), ("x.png", b"\x89PNG\r\n\x1a\n123"), (".tmp-1", b"1")):
        (folder / name).write_bytes(content)
        assert half_written(folder / name) and "half written" in judge(CASE, 2, "", folder, before)
        (folder / name).unlink()
    bad_inputs.clean(folder, before)
    assert look(folder) == before


def test_a_hang_is_ended():
    """With everything that it has started."""
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    process = subprocess.Popen(["sleep", "60"], stdout=out_end, stderr=err_end, start_new_session=True)
    os.close(out_end)
    os.close(err_end)
    assert follow(process.pid, (out, err), 0.3) == (None, "")
    process.returncode = -9  # it is waited for already
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
