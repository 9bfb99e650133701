"""Videos of other people: orientation, range, times, several streams, odd names, full disks, bad decoders."""

import importlib.util
import io
import itertools
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smfnet.cli import main
from smfnet.core.checks import InputError
from smfnet.data.images import write_image
from smfnet.fusion import video as module
from smfnet.fusion.video import frame_pixels, fuse_video, open_clip, pair_frames

av = importlib.import_module("av") if importlib.util.find_spec("av") else None
pytestmark = pytest.mark.skipif(av is None, reason="PyAV is not installed: pip install 'smfnet[video]'")

CASE = Path(__file__).parents[1] / "cases/video_rotation"
MS = Fraction(1, 1000)
UNITY = (1, 0, 0, 1)
MATRICES = [m for m in itertools.product((-1, 0, 1), repeat=4) if abs(m[0] * m[3] - m[1] * m[2]) == 1]
MATRICES = [m for m in MATRICES if m.count(0) == 2]  # turned by quarters, mirrored or not: eight


class Visible:
    "A fusion method that returns the visible frame."

    def fuse(self, *, vis, ir):
        return vis


def run(ir, vis, out, **options):
    quiet = {"model": Visible(), "progress": False, "log": lambda text: None}
    return fuse_video(**{"ir": ir, "vis": vis, "out": out} | quiet | options)


def film(path, frames, *, codec="ffv1", fmt="gray", rate=25, times=None, options=None, **marks):
    "A video straight from PyAV; `times` in milliseconds; `marks` are set on the encoder."
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], fmt
        for name, value in marks.items():
            setattr(stream.codec_context, name, value)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = MS
        for i, x in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(x, format="gray" if x.ndim == 2 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), MS
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def noise(n=6, size=(32, 48), *, colour=True, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *size, 3)[: 4 if colour else 3]).astype(np.uint8)


def counted(n, size=(32, 48)):
    "Frames whose level is their number, four times it where limited range has room for few."
    return np.stack([np.full(size, t * (4 if n <= 60 else 1), np.uint8) for t in range(n)])


def read(path, modality="vis"):
    return [px.values for _, px in open_clip(path, modality).frames()]


def box_matrix(path):
    "a, b, c, d of the track header of an MP4 or MOV file, read from its bytes."
    data = Path(path).read_bytes()
    at = data.rindex(b"tkhd") + 4
    at += 4 + (20 if data[at] == 0 else 32) + 8 + 8
    a, b, _, c, d, *_ = struct.unpack(">9i", data[at : at + 36])
    return tuple(v / 65536 for v in (a, b, c, d))


def set_matrix(path, new):
    "Replace the matrix in the track header of a finished file."
    pack = lambda a, b, c, d: struct.pack(
        ">9i", *(round(v * 65536) for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30
    )
    head, tail = path.read_bytes().rsplit(pack(*UNITY), 1)
    path.write_bytes(head + pack(*new) + tail)


def shown(x, matrix):
    "Each sample moved to (ax + cy, bx + dy), as ISO 14496-12 has it, pixel by pixel."
    a, b, c, d = matrix
    y, x_ = np.mgrid[: x.shape[0], : x.shape[1]]
    u, v = (np.rint(p).astype(int) for p in (a * x_ + c * y, b * x_ + d * y))
    u, v = u - u.min(), v - v.min()
    out = np.empty((v.max() + 1, u.max() + 1, *x.shape[2:]), x.dtype)
    out[v, u] = x
    return out


# orientation


@pytest.mark.parametrize("name", ["vis90.mp4", "vis180.mp4"])
def test_the_case_is_turned_as_its_file_says(tmp_path, name):
    with av.open(str(CASE / name)) as container:
        stored = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    expected = [shown(x, box_matrix(CASE / name)) for x in stored]
    np.testing.assert_array_equal(read(CASE / name), expected)
    assert run(CASE / "ir.mkv", CASE / name, tmp_path / "o.mkv").frames == 5
    found = np.array(read(tmp_path / "o.mkv")).astype(int)
    assert abs(found - np.array(expected)).max() <= 2  # colours go through YCbCr and are rounded
    assert abs(found[:, ::-1, ::-1] - np.array(expected)).mean() > 20


@pytest.mark.parametrize("matrix", MATRICES)
def test_eight_orientations(tmp_path, matrix):
    frames, path = noise(2, (20, 32)), tmp_path / "v.mov"
    film(path, frames, codec="png", fmt="rgb24")
    set_matrix(path, matrix)
    np.testing.assert_array_equal(read(path), [shown(x, matrix) for x in frames])
    assert len(MATRICES) == 8


def test_infrared_is_turned_too_and_sizes_are_compared_upright(tmp_path):
    ir, vis = noise(2, (20, 32), colour=False), noise(2, (32, 20))
    film(tmp_path / "i.mov", ir, codec="png", fmt="gray")
    film(tmp_path / "v.mkv", vis, fmt="bgr0")
    with pytest.raises(InputError, match="differ in size"):
        run(tmp_path / "i.mov", tmp_path / "v.mkv", tmp_path / "o.mkv")
    set_matrix(tmp_path / "i.mov", (0, 1, -1, 0))
    np.testing.assert_array_equal(read(tmp_path / "i.mov", "ir"), [np.rot90(x, -1) for x in ir])
    assert run(tmp_path / "i.mov", tmp_path / "v.mkv", tmp_path / "o.mkv").frames == 2


@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_slanted_matrix_is_refused_and_a_scaled_one_is_not(tmp_path, scale):
    path = film(tmp_path / "v.mov", noise(1, (20, 32)), codec="png", fmt="rgb24")
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    set_matrix(path, (c, s, -s, c) if scale == 1 else (-scale, 0, 0, scale))
    if scale == 1:
        with pytest.raises(InputError, match=r"v\.mov \(frame 1\): is to be shown turned by 30 degrees"):
            read(path)
    else:
        np.testing.assert_array_equal(read(path)[0], noise(1, (20, 32))[0][:, ::-1])


@pytest.mark.parametrize(("tag", "turn"), [(None, 0), (1, 0), (3, 2), (6, -1), (8, 1)])
def test_photographs_in_a_row_are_turned_by_their_exif(tmp_path, tag, turn):
    "Motion JPEG of a camera that marks each picture; PyAV lacks a name for this kind of side data."
    smooth = np.kron(noise(3, (4, 6)), np.ones((1, 8, 8, 1), np.uint8))
    exif, parts = Image.Exif(), []
    if tag:
        exif[0x0112] = tag
    for x in smooth:
        Image.fromarray(np.ascontiguousarray(np.rot90(x, -turn))).save(
            out := io.BytesIO(), "JPEG", exif=exif, quality=98, subsampling=0
        )
        parts.append(out.getvalue())
    (tmp_path / "v.mjpeg").write_bytes(b"".join(parts))
    found = np.array(read(tmp_path / "v.mjpeg")).astype(int)
    assert found.shape == smooth.shape and abs(found - smooth).mean() < 3


# range and colour matrix


def planes(fmt, bits, values):
    "A frame whose planes are filled from Python."
    h, w = values[0].shape
    frame = av.VideoFrame(w, h, fmt)
    for plane, x in zip(frame.planes, values):
        kind = np.uint8 if bits == 8 else np.uint16
        rows = np.zeros((plane.height, plane.line_size // np.dtype(kind).itemsize), kind)
        rows[:, : plane.width] = x[: plane.height, : plane.width]
        plane.update(rows)
    return frame


def formula(y, u, v, bits, full, kr, kb):
    "RGB in [0, 1] by ITU-R BT.601, BT.709 or BT.2020."
    unit, top = 2 ** (bits - 8), 2**bits - 1
    offset, luma, chroma = (0, top, top) if full else (16 * unit, 219 * unit, 224 * unit)
    y, u, v = (y - offset) / luma, (u - 128 * unit) / chroma, (v - 128 * unit) / chroma
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.clip(np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b], -1), 0, 1)


@pytest.mark.parametrize("mark", [0, 1, 2])
@pytest.mark.parametrize("fmt", ["yuv444p", "yuv420p", "yuvj444p", "yuv444p10le", "yuv420p10le"])
def test_yuv_of_every_range_and_matrix(fmt, mark):
    bits, rng = 10 if "10" in fmt else 8, np.random.default_rng(mark)
    y = rng.integers(2**bits // 8, 2**bits * 7 // 8, (32, 48))
    for matrix, (kr, kb) in {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}.items():
        u, v = (np.full_like(y, c * 2 ** (bits - 8)) for c in rng.integers(110, 146, 2))
        frame = planes(fmt, bits, (y, u, v))
        frame.color_range, frame.colorspace = mark, matrix
        px = frame_pixels(frame)
        expected = formula(y, u, v, bits, mark == 2 or "j" in fmt, kr, kb)
        error = abs(px.values / px.full - expected).max() * 255  # FFmpeg's tables have 8 bits, and
        assert error <= (3 if fmt == "yuv420p" else 1.1)  # its fast way for 4:2:0 rounds twice


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 16])
@pytest.mark.parametrize("mark", [0, 1, 2])
def test_grey_of_every_range(tmp_path, bits, mark):
    "Read back from a file; only limited range is stretched, and deep infrared keeps its numbers."
    top, unit = 2**bits - 1, 2.0 ** (bits - 8)
    levels = np.linspace(0, top, 32 * 48).reshape(32, 48).astype(np.uint8 if bits == 8 else np.uint16)
    fmt = "gray" if bits == 8 else f"gray{bits}le"
    with av.open(str(tmp_path / "g.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25, options={"level": "3"})
        stream.height, stream.width, stream.pix_fmt = *levels.shape, fmt
        stream.codec_context.color_range = mark
        container.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format=fmt)))
        container.mux(stream.encode(None))
    stretched = np.clip((levels - 16 * unit) / (219 * unit), 0, 1)
    vis, ir = (next(open_clip(tmp_path / "g.mkv", m).frames())[1] for m in ("vis", "ir"))
    assert vis.full == ir.full == top and vis.values.dtype == ir.values.dtype == levels.dtype
    expected = stretched if mark == 1 else levels / top
    np.testing.assert_allclose(vis.values / top, expected, atol=0.51 / top)
    np.testing.assert_allclose(ir.values / top, expected if bits == 8 else levels / top, atol=0.51 / top)


@pytest.mark.parametrize(
    "fmt", ["yuv420p", "yuvj422p", "nv12", "yuyv422", "yuv420p10le", "p010le", "yuva420p"]
)
@pytest.mark.parametrize("mark", [1, 2])
def test_infrared_without_colour_is_its_luma(fmt, mark):
    "Chroma that only compression made is no colour; the first channel of RGB would carry its noise."
    bits, rng = 10 if "10" in fmt else 8, np.random.default_rng(5)
    y = rng.integers(2**bits // 8, 2**bits * 7 // 8, (32, 48))
    u, v = (128 * 2 ** (bits - 8) + rng.integers(-6, 7, y.shape) for _ in "uv")
    deep = "yuv444p10le" if bits == 10 else "yuv444p"
    frame = planes(deep, bits, (y, u, v))
    frame.color_range = mark
    if fmt.startswith("yuvj") and mark == 1:
        mark = 2
        frame.color_range = 2
    frame = frame.reformat(format=fmt, src_color_range=mark, dst_color_range=mark)
    px = frame_pixels(frame, "ir")
    expected = y if mark == 2 or bits == 10 else np.clip((y - 16) * 255 / 219, 0, 255)
    assert px.values.ndim == 2 and px.full == 2**bits - 1
    assert abs(px.values - expected).max() <= 1.2
    assert frame_pixels(frame).values.shape == (32, 48, 3)


def test_infrared_with_an_overlay_and_in_false_colours(tmp_path):
    grey = np.repeat(noise(1, (64, 80), colour=False)[..., None], 3, -1)
    grey[0, :4, :4] = (255, 0, 0)  # a red mark, less than half a percent of the picture
    rainbow = np.stack([grey[..., 0], 255 - grey[..., 0], grey[..., 0] // 2], -1)
    for name, frames in (("mark.mkv", grey), ("rainbow.mkv", rainbow)):
        film(tmp_path / name, frames, fmt="yuv444p")
    px = next(open_clip(tmp_path / "mark.mkv", "ir").frames())[1]
    assert px.values.ndim == 2 and any("overlay" in n for n in px.notes)
    assert read(tmp_path / "rainbow.mkv", "ir")[0].ndim == 3


def test_what_is_written_reads_the_same_elsewhere(tmp_path):
    "Grey is marked as full range, H.264 as limited range by BT.601, and the values fit the marks."
    grey, smooth = np.indices((32, 48)).sum(0)[None].astype(np.uint8) * 3, noise(1, (4, 6))
    colour = np.kron(smooth, np.ones((1, 8, 8, 1), np.uint8))
    film(tmp_path / "i.mkv", grey)
    film(tmp_path / "g.mkv", grey)
    film(tmp_path / "c.mkv", colour, fmt="bgr0")
    frames = {}
    for vis, out in (("g", "g.mkv"), ("g", "g.mp4"), ("c", "c.mp4")):
        run(tmp_path / "i.mkv", tmp_path / f"{vis}.mkv", target := tmp_path / f"out_{out}")
        with av.open(str(target)) as container:
            frames[out] = next(container.decode(video=0))
    assert frames["g.mkv"].color_range == 2
    np.testing.assert_array_equal(frames["g.mkv"].to_ndarray(), grey[0])
    for name, expected in (("g.mp4", np.repeat(grey[0][..., None], 3, -1)), ("c.mp4", colour[0])):
        frame = frames[name]
        assert (frame.color_range, frame.colorspace) in ((1, 5), (1, 6))
        y = np.frombuffer(frame.planes[0], np.uint8).reshape(32, -1)[:, :48].astype(float)
        luma = expected @ (0.299, 0.587, 0.114)
        assert abs((y - 16) * 255 / 219 - luma).mean() < 3


# what the decoder does not say


FORMS = [
    ("mjpeg", "i.avi", "yuvj420p", 255),
    ("mpeg4", "i.avi", "yuv420p", 255),
    ("rawvideo", "i.nut", "gray16le", 65535),
    ("rawvideo", "i.nut", "gray16be", 65535),
    ("rawvideo", "i.nut", "gray12be", 4095),
    ("rawvideo", "i.nut", "ya8", 255),
    ("rawvideo", "i.avi", "uyvy422", 255),
    ("ffv1", "i.mkv", "gray14le", 16383),
    ("ffvhuff", "i.avi", "gray16le", 65535),
    ("png", "i.mov", "gray16be", 65535),
    ("libx264", "i.ts", "yuv420p", 255),
    ("libx264", "i.flv", "yuv420p", 255),
    ("libx264", "i.mp4", "yuv420p", 255),
]
SIZES = [(32, 48), (33, 47)]
EVEN = ("uyvy422", "yuv420p")  # such encoders want even sizes


@pytest.mark.parametrize(
    ("codec", "name", "fmt", "full", "size"),
    [(*form, size) for form in FORMS for size in SIZES if size[0] % 2 == 0 or form[2] not in EVEN],
)
def test_forms_of_thermal_cameras(tmp_path, codec, name, fmt, full, size):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    y, x = np.indices(size)
    ramp = [np.clip(x * 3 + y * 2 + t, 0, 255).astype(np.uint8) for t in range(5)]
    film(tmp_path / name, ramp, codec=codec, fmt=fmt)
    film(tmp_path / "v.mkv", noise(5, size), fmt="bgr0")
    px = [px for _, px in open_clip(tmp_path / name, "ir").frames()]
    assert len(px) == 5 and all(p.full == full and p.values.ndim == 2 for p in px)
    error = [abs(p.values / full - r / 255.0).mean() for p, r in zip(px, ramp)]
    assert max(error) < (0.03 if codec in ("mjpeg", "mpeg4", "libx264") else 0.005)
    assert run(tmp_path / name, tmp_path / "v.mkv", tmp_path / "o.mkv").frames == 5


def test_raw_16_bits_without_a_code_are_not_taken_for_colour(tmp_path):
    film(tmp_path / "i.avi", noise(2, colour=False), codec="rawvideo", fmt="gray16le")
    with pytest.raises(InputError, match=r"i\.avi: its 16-bit samples have no code"):
        open_clip(tmp_path / "i.avi", "ir")


def test_remarks_on_what_is_taken_as_it_is(tmp_path):
    ir = film(tmp_path / "i.mkv", noise(3, colour=False))
    wide = {"codec": "libx264", "fmt": "yuv420p", "sample_aspect_ratio": Fraction(16, 11)}
    film(tmp_path / "wide.mp4", noise(3), **wide)
    film(tmp_path / "alpha.mkv", noise(3), fmt="bgra")
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    film(tmp_path / "tv.mp4", noise(3), codec="libx264", fmt="yuv420p", options=options, color_trc=18)
    for name, words in (
        ("wide", ["not square (16:11)"]),
        ("tv", ["interlaced", "(HLG)"]),
        ("alpha", ["transp"]),
    ):
        notes, path = [], next(tmp_path.glob(f"{name}.*"))
        run(ir, path, tmp_path / "o.mkv", log=notes.append)
        assert all(any(n.startswith(path.name) and w in n for n in notes) for w in words), notes


def streams(path, frames, *, second=None, cover=False, sound=False, codec="ffv1", fmt="gray"):
    "A file with more than one stream."
    with av.open(str(path), "w") as out:
        if cover:
            picture = out.add_stream("png")
            picture.width = picture.height = 24
            picture.pix_fmt, picture.disposition = "rgb24", av.stream.Disposition.attached_pic
        audio = out.add_stream("aac", rate=48000) if sound else None
        made = [(out.add_stream(codec, rate=25), f) for f in (frames, second) if f is not None]
        for stream, f in made:
            stream.height, stream.width, stream.pix_fmt = *f[0].shape[:2], fmt
        if cover:
            blank = av.VideoFrame.from_ndarray(np.zeros((24, 24, 3), np.uint8), format="rgb24")
            out.mux([*picture.encode(blank), *picture.encode(None)])
        for k in range(100 if sound else 0):  # twice as long as the pictures
            part = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            part.sample_rate, part.pts = 48000, k * 1024
            out.mux(audio.encode(part))
        for stream, f in made:
            for x in f:
                layout = "gray" if x.ndim == 2 else "rgb24"
                out.mux(stream.encode(av.VideoFrame.from_ndarray(x, format=layout)))
            out.mux(stream.encode(None))
    return path


def test_covers_sound_and_second_streams(tmp_path):
    ir, vis, notes = noise(25, colour=False), film(tmp_path / "v.mkv", noise(25), fmt="bgr0"), []
    lossy = {"codec": "libx264", "fmt": "yuv420p"}
    cover = streams(tmp_path / "cover.mp4", ir, cover=True, **lossy)
    for path in (cover, streams(tmp_path / "sound.mkv", ir, sound=True)):
        assert run(path, vis, tmp_path / "o.mkv", log=notes.append).frames == 25 and notes == []
    two = streams(tmp_path / "two.mkv", ir, second=ir[:, :20])
    np.testing.assert_array_equal(read(two), ir)
    assert run(two, vis, tmp_path / "o.mkv", log=notes.append).frames == 25
    assert notes == ["two.mkv: holds 2 video streams; the first (48×32) is used"]
    only = streams(tmp_path / "song.mp4", None, cover=True, sound=True)
    with pytest.raises(InputError, match="song.mp4: holds no video stream"):
        open_clip(only)


# time


class Numbers:
    "A fusion method that notes the numbers of the frames it gets; see `counted`."

    def __init__(self, step=4):
        self.pairs, self.step = [], step

    def fuse(self, *, vis, ir):
        self.pairs.append(tuple(round(float(x[0, 0, 0, 0]) * 255 / self.step) for x in (ir, vis)))
        return vis


def matched(tmp_path, ir_times, vis_times, *, codec="ffv1", rates=(25, 25), suffix=".mkv", **options):
    "Numbers of the frames that were paired, remarks, and the times in the fused video."
    fmt = "gray" if codec == "ffv1" else "yuv444p"
    lossless = {"crf": "0"} if codec != "ffv1" else {}
    names = [tmp_path / f"{side}{suffix}" for side in ("ir", "vis")]
    for path, times, rate in zip(names, (ir_times, vis_times), rates):
        n = len(times)
        film(path, counted(n), codec=codec, fmt=fmt, times=times, rate=rate, options=lossless)
    model, notes = Numbers(4 if len(ir_times) <= 60 else 1), []
    run(*names, tmp_path / "o.mkv", model=model, log=notes.append, **options)
    with av.open(str(tmp_path / "o.mkv")) as container:
        times = [float(f.time) * 1000 for f in container.decode(video=0)]
    return np.array(model.pairs), [n for n in notes if "same value" not in n], np.array(times)


def even(n, step=40.0, start=0.0):
    return np.rint(start + step * np.arange(n)).astype(int)


def test_even_clips_are_paired_one_by_one_without_a_word(tmp_path):
    pairs, notes, times = matched(tmp_path, even(20), even(20))
    np.testing.assert_array_equal(pairs, np.repeat(np.arange(20)[:, None], 2, 1))
    assert notes == [] and np.array_equal(times, even(20))


@pytest.mark.parametrize("side", ["ir", "vis"])
@pytest.mark.parametrize(("codec", "suffix"), [("ffv1", ".mkv"), ("libx264", ".mp4")])
def test_lost_frames_shift_nothing(tmp_path, side, codec, suffix):
    times, kept = even(40), np.delete(np.arange(40), [5, 17, 18])
    both = {"ir": times, "vis": times} | {side: times[kept]}
    pairs, notes, out = matched(tmp_path, both["ir"], both["vis"], codec=codec, suffix=suffix)
    numbers = {"ir": np.arange(40), "vis": np.arange(40)} | {side: kept}
    at = [numbers[s][pairs[:, i]] for i, s in enumerate(("ir", "vis"))]
    np.testing.assert_array_equal(at[0], at[1])
    np.testing.assert_array_equal(at[0], kept)
    np.testing.assert_array_equal(out, times[kept])  # the fused video has the same gaps
    whole = "vis" if side == "ir" else "ir"
    assert len(notes) == 2 and f"{whole}{suffix} (frame 6)" in notes[0] and "3 frames" in notes[1]


def test_many_lost_frames_are_no_cut_off_file(tmp_path):
    "The header counts frames by its rate; the times say that the end was reached."
    kept = np.delete(np.arange(60), np.arange(3, 57, 6))
    pairs, _, _ = matched(tmp_path, even(60), even(60)[kept])
    np.testing.assert_array_equal(pairs[:, 0], kept)


def test_empty_places_in_an_avi_are_lost_frames(tmp_path):
    "AVI counts frames that the camera lost, and keeps their places."
    kept = np.delete(np.arange(14), [4, 5])
    film(tmp_path / "i.mkv", counted(14))
    with av.open(str(tmp_path / "v.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        for t in kept:
            frame = av.VideoFrame.from_ndarray(counted(14)[t], format="gray").reformat(format="yuvj420p")
            frame.pts, frame.time_base = int(t), Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    model = Numbers()
    assert run(tmp_path / "i.mkv", tmp_path / "v.avi", tmp_path / "o.mkv", model=model).frames == 12
    assert [p[0] for p in model.pairs] == list(kept) and all(a == b for a, b in model.pairs)


@pytest.mark.parametrize("seed", range(6))
def test_the_nearest_frames_meet_whatever_is_lost(tmp_path, seed):
    "Uneven telephones, lost frames, drifting clocks: against all times at once."
    rng, n = np.random.default_rng(seed), 60
    lost = [np.sort(rng.choice(np.arange(1, n - 1), rng.integers(0, 8), replace=False)) for _ in "ab"]
    a, b = (np.delete(np.arange(n), k) for k in lost)
    ta, tb = a * 40, np.r_[0, np.rint(b[1:] * 40 + rng.uniform(-9, 9, len(b) - 1))].astype(int)
    pairs, notes, out = matched(tmp_path, ta, tb)
    assert set(a[pairs[:, 0]]) == set(a) & set(b) and np.array_equal(a[pairs[:, 0]], b[pairs[:, 1]])
    assert abs(out - tb[pairs[:, 1]]).max() <= 40 and (np.diff(out) > 0).all()
    for side, left in (("ir", len(a) - len(pairs)), ("vis", len(b) - len(pairs))):
        told = [x for x in notes if x.startswith(f"{side}.mkv")]
        assert len(told) == min(left, 2) and (left < 2 or f" {left} frames" in told[1])


def test_a_drift_is_followed_and_told(tmp_path):
    "One clock runs 1.5 % fast: after a minute of pairs by number, a second would lie between them."
    slow, fast = even(200), even(203, 40 / 1.015)
    pairs, notes, _ = matched(tmp_path, slow, fast, rates=(25, Fraction(25375, 1000)))
    apart = abs(slow[pairs[:, 0]] - fast[pairs[:, 1]])
    assert apart.max() <= 24 and len(pairs) == 200
    assert any("no frame of ir.mkv within" in n for n in notes) and any("3 frames" in n for n in notes)
    number = min(len(slow), len(fast)) - 1
    assert abs(slow[number] - fast[number]) > 100  # what pairs by number would have had


def test_clocks_that_start_differently_are_told(tmp_path):
    for start in (200, 1400):
        pairs, notes, out = matched(tmp_path, even(10), even(10, start=start))
        np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])
        assert len(notes) == 1 and "ir.mkv starts at 0.000 s" in notes[0]
        assert f"vis.mkv starts at {start / 1000:.3f} s" in notes[0] and out[0] == 0


@pytest.mark.parametrize(("rates", "n"), [((25, 30), (20, 24)), ((30, 9), (30, 9)), ((25, 24), (25, 24))])
def test_other_rates_are_refused_unless_one_by_one(tmp_path, rates, n):
    times = [even(k, 1000 / r) for k, r in zip(n, rates)]
    said = f"ir.mkv has {rates[0]} frames per second and .*vis.mkv has {rates[1]}"
    with pytest.raises(InputError, match=said):
        matched(tmp_path, *times, rates=rates)
    assert not (tmp_path / "o.mkv").exists()
    pairs, notes, out = matched(tmp_path, *(t[: min(n)] for t in times), rates=rates, fps=10)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])
    assert notes == [] and np.array_equal(out, even(min(n), 100))


def test_times_that_have_nothing_to_do_with_each_other(tmp_path):
    uneven = np.cumsum(np.tile([10, 70], 60)) - 10  # pairs of frames in haste
    with pytest.raises(InputError, match="have no partner in time; convert both to one steady rate"):
        matched(tmp_path, even(120), uneven)


@pytest.mark.parametrize("n", [8, 12])
def test_another_length_is_refused_and_the_finished_part_stays(tmp_path, n):
    with pytest.raises(InputError, match=rf"{'vis' if n < 10 else 'ir'}\.mkv: ends after frame {min(n, 10)}"):
        matched(tmp_path, even(10), even(n))
    assert len(read(tmp_path / "o.partial.mkv")) == min(n, 10)


def test_time_stamps_that_go_backwards_or_are_missing(tmp_path, monkeypatch):
    ir, vis = (film(tmp_path / f"{s}.mkv", noise(6, colour=False)) for s in "iv")
    decoded, change = module._decoded, {}

    def altered(clip):
        times = change.get(clip.path.name, lambda i, t: t)
        return ((name, px, times(i, t)) for i, (name, px, t) in enumerate(decoded(clip)))

    monkeypatch.setattr(module, "_decoded", altered)
    change["v.mkv"] = lambda i, t: 0.04 if i == 3 else t
    with pytest.raises(InputError, match=r"v\.mkv \(frame 4\): its time stamp is not after"):
        run(ir, vis, tmp_path / "o.mkv")
    assert run(ir, vis, tmp_path / "o.mkv", fps=25).frames == 6
    notes, change["v.mkv"] = [], lambda i, t: None
    assert run(ir, vis, tmp_path / "o.mkv", log=notes.append).frames == 6
    assert notes == ["v.mkv: has no time stamps; its frames are paired by number"]
    notes, change["v.mkv"] = [], lambda i, t: None if i in (2, 5) else t  # a gap is filled by the rate
    assert run(ir, vis, tmp_path / "o.mkv", log=notes.append).frames == 6 and notes == []


def test_a_raw_stream_has_no_clock(tmp_path):
    ir = film(tmp_path / "i.mkv", noise(6, colour=False))
    vis, notes = film(tmp_path / "v.h264", noise(6), codec="libx264", fmt="yuv420p"), []
    assert run(ir, vis, tmp_path / "o.mkv", log=notes.append).frames == 6
    assert notes == ["v.h264: has no time stamps; its frames are paired by number"]


def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path):
    "A telephone trims a film by a list in the header; all 50 frames stay in the file, 30 are shown."
    film(tmp_path / "full.mp4", counted(50), codec="libx264", fmt="yuv444p", options={"g": "50", "crf": "0"})
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with (
        av.open(str(tmp_path / "full.mp4")) as a,
        av.open(str(tmp_path / "t.mp4"), "w", options=options) as b,
    ):
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is None:
                continue
            shift = round(0.8 / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            b.mux(packet)
    with av.open(str(tmp_path / "t.mp4")) as trimmed:
        assert trimmed.streams.video[0].frames == 50
    film(tmp_path / "i.mkv", counted(30))
    model = Numbers()
    assert run(tmp_path / "i.mkv", tmp_path / "t.mp4", tmp_path / "o.mkv", model=model).frames == 30
    assert [v - i for i, v in model.pairs] == [20] * 30


def test_folders_have_no_clock(tmp_path):
    "A folder is paired by number, also with a video that has a gap; a remark says where."
    frames = counted(6)
    for t, x in enumerate(frames):
        write_image(tmp_path / f"ir/{t}.png", x / np.float32(255))
    film(tmp_path / "v.mkv", frames, times=[0, 40, 80, 160, 200, 240])
    film(tmp_path / "even.mkv", frames)
    for vis, told in (
        ("v.mkv", ["v.mkv (frame 4): comes 2.0 frames after the one before"]),
        ("even.mkv", []),
    ):
        model, notes = Numbers(), []
        run(tmp_path / "ir", tmp_path / vis, tmp_path / "o.mkv", model=model, log=notes.append)
        assert len(model.pairs) == 6 and all(a == b for a, b in model.pairs)
        assert [n.split(";")[0] for n in notes if "same value" not in n] == told


# foreign decoders, damage


class Panic(BaseException):
    "What a decoder in Rust raises through its bindings."


@pytest.mark.parametrize(
    "error", [ValueError("odd"), MemoryError(), Panic("panicked"), RuntimeError(), OSError(5, "I/O")]
)
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    ir, vis = (film(tmp_path / f"{s}.mkv", noise(3, colour=False)) for s in "iv")

    def broken(frame, modality="vis"):
        raise error

    monkeypatch.setattr(module, "frame_pixels", broken)
    with pytest.raises(InputError, match=r"i\.mkv: frame 1 cannot be decoded \(\w"):
        run(ir, vis, tmp_path / "o.mkv")
    monkeypatch.setattr(module, "_header", broken)
    with pytest.raises(InputError, match=r"i\.mkv: not a readable video \(\w"):
        run(ir, vis, tmp_path / "o.mkv")


def test_an_interruption_is_not_taken_for_damage(tmp_path, monkeypatch):
    def stopped(frame, modality="vis"):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "frame_pixels", stopped)
    ir, vis = (film(tmp_path / f"{s}.mkv", noise(3, colour=False)) for s in "iv")
    with pytest.raises(KeyboardInterrupt):
        run(ir, vis, tmp_path / "o.mkv")


@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.avi", "v.ts"])
def test_spoilt_bytes_end_in_one_line_or_a_whole_film(tmp_path, name):
    codec, fmt = {"v.mkv": ("ffv1", "bgr0"), "v.avi": ("mjpeg", "yuvj420p")}.get(name, ("libx264", "yuv420p"))
    film(tmp_path / name, noise(6), codec=codec, fmt=fmt)
    ir = film(tmp_path / "i.mkv", noise(6, colour=False))
    whole, rng, refused = (tmp_path / name).read_bytes(), np.random.default_rng(1), 0
    for attempt in range(25):
        data = bytearray(whole)
        at = rng.integers(0, 200 if attempt % 2 else len(data), 12)
        for k, value in zip(at, rng.integers(0, 256, 12)):
            data[k] = value
        if attempt % 5 == 0:
            data = data[: rng.integers(1, len(data))]
        (tmp_path / name).write_bytes(data)
        (tmp_path / "o.mkv").unlink(missing_ok=True)
        try:
            report = run(ir, tmp_path / name, tmp_path / "o.mkv")
            assert report.frames == len(read(tmp_path / "o.mkv"))
        except InputError as e:
            refused += 1
            assert "\n" not in str(e) and not (tmp_path / "o.mkv").exists()
    assert refused >= 5 and not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("zero.mkv", b""),
        ("notes.txt", b"hello\n" * 300),  # FFmpeg can show letters as a film
        ("text.mkv", b"hello\n" * 300),
        (
            "far.mkv",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        ),
        (
            "net.sdp",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        ),
        ("riff.avi", b"RIFF\0\0\0\0AVI LIST" + bytes(500)),
        ("x.srt", b"1\n00:00:00,000 --> 00:00:01,000\nhi\n"),
    ],
)
def test_what_is_no_video(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: (holds no video|not a readable video)"):
        open_clip(tmp_path / name)


def test_a_file_cannot_send_for_another_over_the_network(tmp_path):
    "A playlist under the name of a video."
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        there = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        for text in (
            f"#EXTM3U\n#EXTINF:9,\n{there}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile {there}\n",
        ):
            (tmp_path / "list.mkv").write_text(text)
            with pytest.raises(InputError, match="not a readable video"):
                open_clip(tmp_path / "list.mkv")
            with pytest.raises(BlockingIOError):
                server.accept()  # nobody called


# names


NAMES = ["ir:1", "http:x", "concat:a|b", "clip%03d", "a b'\"", "-x", "?", "pipe:0", "ü日"]


@pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX")
@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"bad\xff")])
def test_a_name_is_a_name_and_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"dir {name}").mkdir()
    ir, vis = film("i.mkv", noise(3, colour=False)), film("v.mkv", noise(3), fmt="bgr0")
    shutil.copy(ir, f"{name}.mkv")
    assert run(f"{name}.mkv", vis, f"out{name}.mkv").frames == 3
    assert run(f"{name}.mkv", vis, f"{name}out.mp4").frames == 3
    assert run(f"{name}.mkv", vis, f"dir {name}/o.mkv").frames == 3
    assert len(read(f"{name}out.mp4")) == len(read(f"out{name}.mkv")) == 3


def test_two_spellings_of_a_name_are_one_frame(tmp_path):
    for side, form in (("ir", "NFC"), ("vis", "NFD")):
        for t, x in enumerate(noise(3, colour=False)):
            write_image(tmp_path / side / unicodedata.normalize(form, f"süd{t}.png"), x / np.float32(255))
        write_image(tmp_path / side / "x.png", noise(1, colour=False)[0] / np.float32(255))
    assert run(tmp_path / "ir", tmp_path / "vis", tmp_path / "png").frames == 4


def test_a_title_that_is_no_text(tmp_path):
    path = tmp_path / "i.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(1)[0], format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.count(b"TITLETITLE") == 1
    path.write_bytes(data.replace(b"TITLETITLE", b"M\xfcller\xff\xfe\xfd\xfc"))
    assert len(read(path)) == 1


# outputs


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    film("i.mkv", noise(4, colour=False))
    film("v.mkv", noise(4), fmt="bgr0")
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_only_regular_files_are_replaced(pair):
    for name in ("pipe.mkv", "late.partial.mkv", "pipe"):
        os.mkfifo(name)
    Path("null.mkv").symlink_to(os.devnull)
    Path("loop.mkv").symlink_to("loop.mkv")
    Path("folder.mkv").mkdir()
    Path("early.partial.mkv").mkdir()
    Path("plain").write_text("text")
    shutil.copy("v.mkv", "o.partial.mkv")
    kinds = {p.name: (p.lstat().st_mode, p.lstat().st_ino) for p in pair.iterdir()}
    for out in ("pipe.mkv", "late.mkv", "pipe", "null.mkv", "loop.mkv", "early.mkv", "plain", os.devnull):
        with pytest.raises(InputError):
            run("i.mkv", "v.mkv", out)
    with pytest.raises(InputError, match=r"o\.partial\.mkv: is a source"):
        run("i.mkv", "o.partial.mkv", "o.mkv")
    assert kinds == {p.name: (p.lstat().st_mode, p.lstat().st_ino) for p in pair.iterdir()}
    assert Path("plain").read_text() == "text" and stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize(
    "out", ["x" * 260 + ".mkv", "x" * 247 + ".mkv", "x" * 300, "~nosuchuser/o.mkv", "", "a\0.mkv"]
)
def test_names_that_cannot_be_are_refused_before_the_first_frame(pair, out):
    class Never:
        def fuse(self, *, vis, ir):
            raise AssertionError("began to fuse")

    for change in ({"out": out}, {"ir": out}) if "x" * 247 + ".mkv" != out else ({"out": out},):
        with pytest.raises(InputError) as e:
            run(**{"ir": "i.mkv", "vis": "v.mkv", "out": "o.mkv", "model": Never()} | change)
        assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_link_is_followed_also_for_what_is_rescued(pair):
    (pair / "far").mkdir()
    Path("o.mkv").symlink_to("far/real.mkv")
    assert run("i.mkv", "v.mkv", "o.mkv").frames == 4
    assert Path("o.mkv").is_symlink() and len(read("far/real.mkv")) == 4
    Path("o.partial.mkv").symlink_to("far/part.mkv")
    film("short.mkv", noise(2), fmt="bgr0")
    with pytest.raises(InputError, match="short.mkv: ends after frame 2"):
        run("i.mkv", "short.mkv", "o.mkv")
    assert Path("o.partial.mkv").is_symlink() and len(read("far/part.mkv")) == 2


LIMITED = """
import resource, sys
sys.path.insert(0, {here!r})
from test_video_metadata import Visible
from smfnet import cli
from smfnet.fusion import files
files.load_model = lambda *args, **options: Visible()
cli._model = lambda args: Visible()
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.exit(cli.main("video --ir i.mkv --vis v.mkv --device cpu --threads 1 --out {out}".split()))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
@pytest.mark.parametrize("out", ["o.mkv", "o.mp4", "png"])
@pytest.mark.parametrize("size", [0, 12000])
def test_no_room_left_is_one_line_and_no_file(pair, out, size):
    "In the header, in the middle and at the end; the first of these made FFmpeg crash when it was ended."
    film("i.mkv", noise(40, (64, 64), colour=False))
    film("v.mkv", noise(40, (64, 64)), fmt="bgr0")
    code = LIMITED.format(here=str(Path(__file__).parent), size=size, out=out)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("smfnet: error: ")
    left = [p.name for p in pair.rglob("*") if p.is_file() and p.name not in ("i.mkv", "v.mkv")]
    assert left == [], left


KILLED = """
import os, signal, sys
from smfnet.fusion.video import fuse_video
class Last:
    calls = 0
    def fuse(self, *, vis, ir):
        self.calls += 1
        if self.calls == 3: os.kill(os.getpid(), signal.SIGKILL)
        return vis
fuse_video(ir="i.mkv", vis="v.mkv", out=sys.argv[1], model=Last(), progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("out", ["o.mkv", "o.mp4"])
def test_the_next_run_removes_what_a_killed_one_left(pair, out):
    done = subprocess.run([sys.executable, "-c", KILLED, out], timeout=300)
    assert done.returncode == -signal.SIGKILL and list(pair.glob(".tmp*")) and not Path(out).exists()
    run("i.mkv", "v.mkv", out)
    assert not list(pair.glob(".tmp*")) and len(read(out)) == 4


def test_the_command_on_the_case(tmp_path, capsys):
    for name in ("vis90.mp4", "vis180.mp4"):
        line = f"video --ir {CASE / 'ir.mkv'} --vis {CASE / name} --out {tmp_path / name}.mkv --threads 1"
        assert main([*line.split(), "--device", "cpu"]) == 0
        assert "5 frames fused" in capsys.readouterr().out
        assert read(f"{tmp_path / name}.mkv")[0].shape == (96, 128, 3)


def test_pairs_carry_the_time_of_the_visible_frame(tmp_path):
    film(tmp_path / "i.mkv", counted(4), times=[0, 40, 120, 160])
    film(tmp_path / "v.mkv", counted(5), times=[0, 41, 79, 121, 160])
    pairs = list(pair_frames(open_clip(tmp_path / "i.mkv", "ir"), open_clip(tmp_path / "v.mkv"), log=len))
    assert [round(p.time * 1000) for p in pairs] == [0, 41, 121, 160]
    assert [p.number for p in pairs] == [1, 2, 3, 4]
