"""What an independent reviewer found in videos: stated depths, the last frame's length, drifting clocks."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data.pixels import read_pixels
from smfnet.fusion.baselines import BASELINES
from smfnet.fusion.video import fuse_video

av = pytest.importorskip("av")
SIZE = (32, 48)


def picture(i, top=1.0):
    "A pattern that moves, up to `top` of white, as 16-bit grey."
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    unit = (np.sin((x + i) / 5) + np.cos(y / 4) + 2) / 4
    return np.rint(unit / unit.max() * top * 65535).astype(np.uint16)


def film(path, frames, fmt="gray", *, rate=25, times=None, last=None):
    "FFV1 from 16-bit grey frames; `times` in milliseconds, `last` the length of the last frame in them."
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *SIZE, fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, x in enumerate(frames):
            if fmt.startswith("gbr"):
                frame = av.VideoFrame.from_ndarray(np.repeat(x[..., None], 3, 2), format="rgb48le")
            elif fmt == "gray":
                frame = av.VideoFrame.from_ndarray((x >> 8).astype(np.uint8), format="gray")
            else:
                frame = av.VideoFrame.from_ndarray(x, format=fmt)
            frame.pts = int(i * 1000 / rate) if times is None else int(times[i])
            frame.time_base = Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            packet.duration = last or packet.duration
            container.mux(packet)
    return path


def run(tmp_path, ir, vis, **options):
    notes, options = [], {"model": BASELINES["visible"], "progress": False} | options
    report = fuse_video(ir=ir, vis=vis, out=tmp_path / "out", log=notes.append, **options)
    names = sorted((tmp_path / "out").iterdir())
    return report, notes, [read_pixels(n).values.max() / read_pixels(n).full for n in names]


def test_dark_frames_of_a_stated_depth_stay_dark(tmp_path):
    ir = film(tmp_path / "i.mkv", [picture(i) for i in range(4)])
    vis = film(tmp_path / "v.mkv", [picture(i, top=0.2) for i in range(4)], "gbrp10le")
    _, notes, tops = run(tmp_path, ir, vis)
    assert np.allclose(tops, 0.2, atol=0.01) and not any("of 16 bits" in n for n in notes)


def test_frames_of_sixteen_bits_have_one_white(tmp_path):
    ir = film(tmp_path / "i.mkv", [picture(i) for i in range(4)])
    tops = (0.05, 0.04, 0.02, 0.06)
    vis = film(tmp_path / "v.mkv", [picture(i, top) for i, top in enumerate(tops)], "gray16le")
    _, notes, found = run(tmp_path, ir, vis)
    assert sum("12 of 16 bits" in n for n in notes) == 1
    assert np.allclose(np.array(found[:3]) / found[0], np.array(tops[:3]) / tops[0], atol=0.01)


def test_a_last_frame_that_is_shown_long_is_no_cut_file(tmp_path):
    ir = film(tmp_path / "i.mkv", [picture(i) for i in range(8)], last=10_000)
    vis = film(tmp_path / "v.mkv", [picture(i) for i in range(8)])
    assert run(tmp_path, ir, vis)[0].frames == 8


def test_clocks_that_drift_leave_a_short_tail(tmp_path):
    n = 120
    ir = film(tmp_path / "i.mkv", [picture(i) for i in range(n)], times=[i * 40 for i in range(n)])
    vis = film(tmp_path / "v.mkv", [picture(i) for i in range(n)], times=[i * 40 * 1.01 for i in range(n)])
    report, notes, _ = run(tmp_path, ir, vis)
    assert n - 3 <= report.frames < n and any("left out" in note for note in notes)
    long = film(tmp_path / "long.mkv", [picture(i) for i in range(2 * n)])
    (tmp_path / "second").mkdir()
    with pytest.raises(InputError, match="same length"):
        run(tmp_path / "second", ir, long)


def test_jitter_does_not_mispair(tmp_path):
    jitter = [0, -15, 15, -15, 15, -15, 15, -15]
    late = [40 * i + 15 + j for i, j in enumerate(jitter)]
    ir = film(tmp_path / "i.mkv", [picture(i) for i in range(8)], times=late)
    vis = film(tmp_path / "v.mkv", [picture(i) for i in range(8)], times=[40 * i + 15 for i in range(8)])
    assert run(tmp_path, ir, vis)[0].frames == 8


def test_a_folder_of_other_spelling_holds_the_same_frames(tmp_path):
    import unicodedata

    for side in ("ir", "vi", "out"):
        (tmp_path / side).mkdir()
    for i in range(2):
        for side in ("ir", "vi"):
            Image.fromarray((picture(i) >> 8).astype(np.uint8)).save(tmp_path / side / f"é{i}.png")
        name = unicodedata.normalize("NFD", f"é{i}.png")
        Image.fromarray((picture(i) >> 8).astype(np.uint8)).save(tmp_path / "out" / name)
    folders = {"ir": tmp_path / "ir", "vis": tmp_path / "vi", "out": tmp_path / "out"}
    assert fuse_video(**folders, model=BASELINES["average"], progress=False).frames == 2
