"""Videos and image sequences: the same numbers as frame by frame, every depth, what a failure leaves."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smfnet.cli import main
from smfnet.core import progress
from smfnet.core.checks import InputError
from smfnet.data.images import _save_png, write_image
from smfnet.data.pixels import read_pixels
from smfnet.fusion import video as module
from smfnet.fusion.files import fuse_pair
from smfnet.fusion.video import fuse_video, open_clip, read_ahead

av = importlib.import_module("av") if importlib.util.find_spec("av") else None
needs_av = pytest.mark.skipif(av is None, reason="PyAV is not installed: pip install 'smfnet[video]'")

LAYOUT = {
    (8, False): ("gray", "gray"),
    (8, True): ("rgb24", "bgr0"),
    (16, False): ("gray16le", "gray16le"),
    (16, True): ("rgb48le", "gbrp16le"),
}


class Mean:
    "A fusion method that is quick and depends on every pixel."

    def fuse(self, *, vis, ir):
        return 0.5 * vis + 0.5 * ir * ir.mean()


def clip(n=6, size=(33, 47), *, bits=8, colour=False, seed=0, low=0):
    "Smooth moving frames, N×H×W or N×H×W×3."
    rng, (h, w) = np.random.default_rng(seed), size
    y, x = np.mgrid[:h, :w]
    base = [
        0.5 + 0.4 * np.sin((x + 5 * t) / 7 + c) * np.cos(y / (5 + c))
        for t in range(n)
        for c in ((0, 1, 2) if colour else (0,))
    ]
    frames = np.stack(base).reshape(n, -1, h, w).transpose(0, 2, 3, 1) + rng.uniform(
        0, 0.1, (n, h, w, 3 if colour else 1)
    )
    levels = low + np.clip(frames, 0, 1) * (2**bits - 1 - low)
    return levels.astype(np.uint8 if bits == 8 else np.uint16)[..., slice(None) if colour else 0]


def write_video(path, frames, *, rate=25, codec="ffv1"):
    "A video straight from PyAV, not by the writer under test."
    bits, colour = 8 * frames.itemsize, frames.ndim == 4
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width = frames[0].shape[:2]
        layout, stream.pix_fmt = LAYOUT[bits, colour]
        if codec == "ffv1":
            stream.options = {"level": "3", "slicecrc": "1", "slices": "4"}
        for x in frames:
            for p in stream.encode(av.VideoFrame.from_ndarray(x, format=layout)):
                container.mux(p)
        for p in stream.encode():
            container.mux(p)
    return path


def write_frames(folder, frames, start=1, name="f{}.png"):
    for t, x in enumerate(frames, start):
        top = np.float32(np.iinfo(x.dtype).max)
        if x.ndim == 2:
            write_image(folder / name.format(t), x / top, bits=8 * x.itemsize)
        else:
            folder.mkdir(exist_ok=True)
            if x.itemsize == 1:
                Image.fromarray(x).save(folder / name.format(t))
            else:
                _save_png(folder / name.format(t), x)
    return folder


def read_video(path):
    return np.stack([px.values for _, px in open_clip(path).frames()])


def run(ir, vis, out, **options):
    return fuse_video(
        **{"ir": ir, "vis": vis, "out": out, "model": Mean(), "progress": False, "log": lambda text: None}
        | options
    )


def one_by_one(tmp_path, ir, vis, range=None):
    "Each pair through files and `fuse_pair`."
    a, b = write_frames(tmp_path / "one_ir", ir), write_frames(tmp_path / "one_vis", vis)
    pairs = ((a / f"f{t}.png", b / f"f{t}.png") for t in np.arange(len(ir)) + 1)
    return np.stack(
        [fuse_pair(ir=p, vis=q, model=Mean(), range=range, log=lambda text: None) for p, q in pairs]
    )


@needs_av
@pytest.mark.parametrize("size", [(33, 47), (16, 64)])
@pytest.mark.parametrize(
    ("ir_bits", "bits", "colour"),
    [(8, 8, False), (8, 8, True), (16, 16, False), (16, 16, True), (16, 8, True)],
)
def test_a_video_holds_the_numbers_of_single_files(tmp_path, ir_bits, bits, colour, size):
    ir, vis = (
        clip(4, size, bits=ir_bits, low=7 if ir_bits == 8 else 7000),
        clip(4, size, bits=bits, colour=colour, seed=1),
    )
    report = run(
        write_video(tmp_path / "i.mkv", ir),
        write_video(tmp_path / "v.mkv", vis),
        tmp_path / "o.mkv",
        range=(1000, 64000) if ir_bits > 8 else None,
    )
    found, expected = (
        read_video(tmp_path / "o.mkv"),
        one_by_one(tmp_path, ir, vis, (1000, 64000) if ir_bits > 8 else None),
    )
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == (np.uint8 if bits == 8 else np.uint16) and (found.ndim == 4) == colour
    assert report.frames == 4 and report.seconds > 0 and "4 frames" in report.summary()


@needs_av
def test_sequences_and_videos_agree(tmp_path):
    ir, vis = clip(12), clip(12, colour=True, seed=1)
    a, b = write_frames(tmp_path / "ir", ir), write_frames(tmp_path / "vi", vis)
    run(a, b, tmp_path / "png")
    run(tmp_path, tmp_path, tmp_path / "o.mkv")  # a root that holds both folders
    run(write_video(tmp_path / "i.mkv", ir), b, tmp_path / "mixed")
    run(a, write_video(tmp_path / "v.mkv", vis), tmp_path / "numbered")
    films = [read_video(tmp_path / "o.mkv")] + [
        np.stack([read_pixels(f).values for f in open_clip(tmp_path / d).files])
        for d in ("png", "mixed", "numbered")
    ]
    for film in films[1:]:
        np.testing.assert_array_equal(film, films[0])
    np.testing.assert_array_equal(films[0], one_by_one(tmp_path, ir, vis))
    assert [f.name for f in open_clip(tmp_path / "mixed").files][8:10] == [
        "f9.png",
        "f10.png",
    ]  # natural order, names of the visible frames
    assert [f.name for f in open_clip(tmp_path / "numbered").files][8:10] == ["000009.png", "000010.png"]


@needs_av
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_mp4_is_close_and_keeps_size_and_rate(tmp_path, size):
    ir, vis = clip(5, size), clip(5, size, colour=True, seed=1) // 2 + 60
    run(
        write_video(tmp_path / "i.mkv", ir, rate=10),
        write_video(tmp_path / "v.mkv", vis, rate=10),
        tmp_path / "o.mp4",
    )
    run(tmp_path / "i.mkv", tmp_path / "v.mkv", tmp_path / "o.mkv")
    lossy, exact = read_video(tmp_path / "o.mp4").astype(int), read_video(tmp_path / "o.mkv").astype(int)
    assert (
        lossy.shape == exact.shape and 0 < np.abs(lossy - exact).mean() < 8
    )  # noise costs bits; colours are in place
    assert open_clip(tmp_path / "o.mp4").rate == open_clip(tmp_path / "o.mkv").rate == 10


@needs_av
def test_the_thermal_range_stays(tmp_path):
    "A hot object in the third frame changes nothing elsewhere, unless each frame takes its own range."
    ir, vis = clip(4, bits=16, low=7000) // 8, clip(4, seed=1)
    ir[2, :12, :12] = 60000
    a, b, notes = write_video(tmp_path / "i.mkv", ir), write_video(tmp_path / "v.mkv", vis), []
    lo, hi = np.percentile(ir[0], (0.1, 99.9))
    run(a, b, tmp_path / "o.mkv", log=notes.append)
    np.testing.assert_array_equal(read_video(tmp_path / "o.mkv"), one_by_one(tmp_path, ir, vis, (lo, hi)))
    assert len(notes) == 1 and f"{lo:g}" in notes[0] and "kept for all" in notes[0]
    run(a, b, tmp_path / "each.mkv", range="frame")
    np.testing.assert_array_equal(read_video(tmp_path / "each.mkv"), one_by_one(tmp_path, ir, vis))
    assert (read_video(tmp_path / "each.mkv")[2] != read_video(tmp_path / "o.mkv")[2]).any()


@needs_av
def test_units_of_a_thermal_camera(tmp_path):
    "14-bit grey keeps its numbers; infrared in colour has no channel that is a measurement."
    levels = clip(2, bits=16) >> 2
    with av.open(str(tmp_path / "i.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *levels[0].shape, "gray14le"
        for x in levels:
            for p in stream.encode(av.VideoFrame.from_ndarray(x, format="gray14le")):
                container.mux(p)
        for p in stream.encode():
            container.mux(p)
    np.testing.assert_array_equal(read_video(tmp_path / "i.mkv"), levels)
    false_colour = write_video(tmp_path / "false.mkv", clip(2, colour=True))
    with pytest.raises(InputError, match=r"false.mkv \(frame 1\): .*colour map"):
        run(false_colour, write_video(tmp_path / "v.mkv", clip(2, seed=1)), tmp_path / "o.mkv")


@needs_av
def test_frames_without_content_or_colour_do_not_stop_a_film(tmp_path):
    ir, vis, notes = clip(4), clip(4, colour=True, seed=1), []
    ir[1], vis[0] = 90, 0  # shutter of the camera, film that begins in black
    run(
        write_video(tmp_path / "i.mkv", ir),
        write_video(tmp_path / "v.mkv", vis),
        tmp_path / "o.mkv",
        log=notes.append,
    )
    found = read_video(tmp_path / "o.mkv")
    assert (
        found.shape == vis.shape
        and (found[0, ..., 0] == found[0, ..., 2]).all()
        and (found[2, ..., 0] != found[2, ..., 2]).any()
    )
    assert [n for n in notes if "same value" in n] == [
        f"{c} (frame {n}): every pixel has the same value" for c, n in (("v.mkv", 1), ("i.mkv", 2))
    ]


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    "Clips of six frames, and broken relatives of them."
    if av is None:
        pytest.skip("PyAV is not installed: pip install 'smfnet[video]'")
    root, ir, vis = tmp_path_factory.mktemp("stock"), clip(), clip(colour=True, seed=1)
    for name, frames, rate in (
        ("i", ir, 25),
        ("v", vis, 25),
        ("short", ir[:4], 25),
        ("wide", clip(6, (33, 48)), 25),
        ("fast", vis, 30),
        ("deep", clip(bits=16), 25),
    ):
        write_video(root / f"{name}.mkv", frames, rate=rate)
    for name, frames in (("ir", ir), ("vis", vis), ("five", ir[:5]), ("double", ir), ("tiny", ir[:, :15])):
        write_frames(root / name, frames)
    write_frames(root / "gap", ir, start=2)
    write_frames(root / "mixed", clip(bits=16))
    write_frames(root / "mixed", ir[:1], start=3)
    for name, n in (("six", 6), ("four", 4)):
        write_video(root / f"{name}.mp4", ir[:n, :32, :46], codec="libx264")
    Image.fromarray(ir[0]).save(root / "double/f3.bmp")
    (root / "text.mkv").write_text("not a video")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def place(stock, tmp_path, monkeypatch):
    "A copy of the clips as the working folder."
    shutil.copytree(stock, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ir": "short.mkv"}, ("short.mkv: ends after frame 4", "v.mkv goes on")),
        ({"vis": "short.mkv"}, ("short.mkv: ends after frame 4", "i.mkv goes on")),
        ({"ir": "five", "vis": "vis"}, ("five has 5 frames", "vis has 6")),
        ({"ir": "six.mp4", "vis": "four.mp4"}, ("six.mp4 has 6 frames", "four.mp4 has 4")),
        ({"ir": "gap", "vis": "vis"}, ("vis/f1.png: has no partner",)),
        ({"ir": "wide.mkv"}, ("wide.mkv (frame 1) (48×33)", "v.mkv (frame 1) (47×33)", "differ in size")),
        ({"vis": "fast.mkv"}, ("i.mkv has 25 frames per second", "fast.mkv has 30", "fps")),
        ({"vis": "text.mkv"}, ("text.mkv: not a readable video",)),
        ({"vis": "none.mkv"}, ("none.mkv: no such file or folder",)),
        ({"vis": "empty"}, ("empty: holds no image",)),
        ({"vis": "vis/f1.png"}, ("vis/f1.png: is a single image",)),
        ({"vis": "i.mkv"}, ("i.mkv: given as infrared and as visible",)),
        ({"vis": "double"}, ("double/f3.bmp", "double/f3.png", "same frame twice")),
        ({"ir": "tiny", "vis": "tiny2"}, ("tiny2: no such",)),
        ({"ir": "tiny", "vis": "vis"}, ("tiny/f1.png: 47×15 pixels is too small",)),
        ({"out": "o.avi"}, ("o.avi", ".mkv or .mp4")),
        ({"out": "v.mkv"}, ("v.mkv: is a source",)),
        ({"ir": "ir", "vis": "vis", "out": "ir"}, ("ir: is a source",)),
        ({"out": "text.mkv/o.mkv"}, ("text.mkv: cannot write",)),
        ({"vis": "deep.mkv", "out": "o.mp4"}, ("o.mp4", "holds 8 bits")),
        ({"range": (5, 5)}, ("range: 5 5",)),
        ({"fps": 0.0}, ("fps: 0",)),
        ({"fps": 0.0001}, ("fps: 0.0001", "between 0.001")),
        ({"fps": float("nan")}, ("fps: nan",)),
        (
            {"ir": "mixed", "vis": "vis"},
            ("mixed/f3.png: has levels from 0 to 255", "0 to 65535", "--range-per-frame"),
        ),
        ({"ir": "mixed", "vis": "vis", "range": (0, 9000)}, ("mixed/f3.png",)),
        ({"ir": "ir", "vis": "vis", "out": "gap"}, ("gap: holds f7.png, which", "empty the folder")),
        ({"ir": "ir", "vis": "vis", "out": "double"}, ("double: holds f3.bmp, which",)),
        ({"out": "ir"}, ("ir: holds f1.png, …, which",)),
    ],
)
def test_bad_input_names_the_file(place, change, words):
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and "partial" not in p.name}
    with pytest.raises(InputError) as e:
        run(**{"ir": "i.mkv", "vis": "v.mkv", "out": "o.mkv"} | change)
    assert all(w in str(e.value) for w in words), e.value
    assert {
        p: p.read_bytes() for p in place.rglob("*") if p.is_file() and "partial" not in p.name
    } == before  # no file appeared or changed
    assert not any(t.name.startswith("smfnet") for t in threading.enumerate())


def test_a_given_rate_settles_different_rates(place):
    run("i.mkv", "fast.mkv", "o.mkv", fps=12.5)
    assert open_clip("o.mkv").rate == Fraction(25, 2) and len(read_video("o.mkv")) == 6


def damage(path, k):
    "Spoil the bytes of the k-th packet."
    with av.open(path) as container:
        packet = bytes([p for p in container.demux(video=0) if p.size][k])
    data = bytearray(Path(path).read_bytes())
    at = data.find(packet) + len(packet) // 3
    for i in range(at, at + 40):
        data[i] ^= 0x5A
    Path(path).write_bytes(data)


@pytest.mark.parametrize("side", ["i.mkv", "v.mkv"])
def test_a_broken_frame_keeps_what_was_finished(place, side):
    whole = run("i.mkv", "v.mkv", "whole.mkv") and read_video("whole.mkv")
    Path("o.mkv").write_bytes(b"an earlier result")
    damage(side, 3)
    notes = []
    with pytest.raises(InputError, match=f"{side}: frame 4 cannot be decoded"):
        run("i.mkv", "v.mkv", "o.mkv", log=notes.append)
    assert Path("o.mkv").read_bytes() == b"an earlier result" and notes == [
        "the first 3 frames are in o.partial.mkv"
    ]
    np.testing.assert_array_equal(read_video("o.partial.mkv"), whole[:3])
    with pytest.raises(InputError):
        run("i.mkv", "v.mkv", "png", log=notes.append)
    assert sorted(p.name for p in Path("png").iterdir()) == [
        "000001.png",
        "000002.png",
        "000003.png",
    ] and notes[1:] == ["3 frames are in png"]


def test_both_cut_off_at_the_same_place_is_noticed(place):
    for name in ("i.mkv", "v.mkv"):
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"[iv]\.mkv: (ends after frame|frame \d cannot)"):
        run("i.mkv", "v.mkv", "o.mkv")
    assert not Path("o.mkv").exists()


def test_a_frame_of_another_kind(place):
    "In the middle of a folder: another size is named; grey among colour fits a folder of PNG, not a video."
    Image.fromarray(clip(1, (33, 40))[0]).save("ir/f4.png")
    with pytest.raises(InputError, match=r"ir/f4\.png \(40×33\)"):
        run("ir", "vis", "o.mkv")
    assert len(read_video("o.partial.mkv")) == 3
    write_frames(Path("ir"), clip())
    Image.fromarray(clip(1)[0]).save("vis/f4.png")
    with pytest.raises(InputError, match="vis/f4.png: frame 4 has another"):
        run("ir", "vis", "o.mkv")
    assert run("ir", "vis", "png").frames == 6 and [
        read_pixels(Path("png") / f"f{t}.png").values.ndim for t in (3, 4, 5)
    ] == [3, 2, 3]


def test_a_run_into_a_folder_may_be_repeated(place):
    "By the names of the frames or their number, if the header states it; else the folder has to be empty."
    for name in ("six", "four"):
        shutil.copy(f"{name}.mp4", f"vis_{name}.mp4")
    for _ in range(2):
        assert run("ir", "vis", "named").frames == run("six.mp4", "vis_six.mp4", "numbered").frames == 6
    with pytest.raises(InputError, match="numbered: holds 000005.png, …, which"):
        run("four.mp4", "vis_four.mp4", "numbered")
    assert run("i.mkv", "v.mkv", "unknown").frames == 6
    with pytest.raises(InputError, match="unknown: holds 000001.png, …, which"):
        run("i.mkv", "v.mkv", "unknown")
    for f in Path("unknown").iterdir():
        f.unlink()
    Path("unknown/notes.txt").touch()
    assert run("i.mkv", "v.mkv", "unknown").frames == 6


def test_a_full_disk_leaves_nothing(place, monkeypatch):
    def full(self, levels):
        raise InputError(f"{self.name}: frame 2 cannot be written (no space left)")

    monkeypatch.setattr(module.VideoFile, "_encode", full)
    with pytest.raises(InputError, match="o.mkv: frame 2 cannot be written"):
        run("i.mkv", "v.mkv", "o.mkv")
    assert not list(place.glob("o.*")) and not list(place.glob(".tmp*"))


SLOW = """
import signal, sys, time
from smfnet.fusion.video import fuse_video
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Slow:
    "Waits in the third frame until the signal comes."
    calls = 0
    def fuse(self, *, vis, ir):
        self.calls += 1
        print("frame", flush=True)
        if self.calls == 3: time.sleep(300)
        return vis
try: fuse_video(ir="i.mkv", vis="v.mkv", out="o.mkv", model=Slow(), progress=False)
except KeyboardInterrupt: sys.exit(130)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_leaves_a_playable_part_or_none(place, kind):
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "frame\n"
    process.send_signal(kind)
    process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -kind) and not Path("o.mkv").exists()
    if kind == signal.SIGINT:
        assert len(read_video("o.partial.mkv")) == 2
    else:
        assert not Path("o.partial.mkv").exists()


def test_reading_runs_ahead_but_not_far():
    made = []
    items = read_ahead((made.append(i) or i for i in range(100)), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 60  # the thread has to be given the processor; a busy machine may be late
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4  # never more: one taken, two in the queue, one in the reader's hand
    assert list(items) == list(range(1, 100))


def test_folders_need_no_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    a, b = write_frames(tmp_path / "ir", clip(3)), write_frames(tmp_path / "vis", clip(3, seed=1))
    assert run(a, b, tmp_path / "png").frames == 3
    (tmp_path / "v.mkv").write_bytes(b"x")
    for change in ({"vis": tmp_path / "v.mkv"}, {"out": tmp_path / "o.mkv"}):
        with pytest.raises(InputError, match=r"pip install 'smfnet\[video\]'"):
            run(**{"ir": a, "vis": b, "out": tmp_path / "png"} | change)


def test_the_command(place, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", float("inf"))  # as if the machine were fast: no line is due
    line = "video --ir i.mkv --vis v.mkv --out o.mkv --device cpu --threads 1"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert "6 frames fused into o.mkv" in out and "frames/s" in out and err == ""
    from smfnet.fusion.files import load_model

    torch.testing.assert_close(
        torch.tensor(read_video("o.mkv")[0].astype(int)),
        torch.tensor(
            fuse_pair(ir="ir/f1.png", vis="vis/f1.png", model=load_model("tiny", device="cpu")).astype(int)
        ),
        atol=1,
        rtol=0,
    )
    assert main(line.replace("i.mkv", "short.mkv").replace("o.mkv", "p.mkv").split()) == 2
    out, err = capsys.readouterr()
    assert "smfnet: error: short.mkv: ends after frame 4" in err and "p.partial.mkv" in out
    with pytest.raises(SystemExit):
        main(f"{line} --range 1 2 --range-per-frame".split())
