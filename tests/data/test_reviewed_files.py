"""What an independent reviewer found: files whose tags or sizes mislead, and folders whose names do."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data.images import common_range, read_image
from smfnet.data.matching import find_pairs
from smfnet.data.pixels import read_pixels, read_size
from smfnet.fusion import fuse_folder
from smfnet.fusion.baselines import BASELINES
from smfnet.metrics import evaluate_folder
from smfnet.metrics.files import read_gray, to_gray_levels

GREY = (np.add.outer(np.arange(64) * 2, np.arange(80)) % 200 + 20).astype(np.uint8)
KELVIN = (280 + GREY / 10).astype(np.float32)
RGB = np.dstack([GREY, np.roll(GREY, 9, 1), 255 - GREY])


def bare_tiff(path, data, **changes):
    "A little-endian TIFF of one strip: `t262=None` drops a tag, `t259=(3, 8)` sets one (type, value)."
    tags = {256: (4, 80), 257: (4, 64), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1)}
    tags |= {278: (4, 64), 279: (4, len(data))} | {int(k[1:]): v for k, v in changes.items()}
    rows = [struct.pack("<HHII", tag, v[0], 1, v[1]) for tag, v in sorted(tags.items()) if v]
    body = data + b"\0" * (len(data) % 2)
    table = struct.pack("<H", len(rows)) + b"".join(rows) + b"\0" * 4
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(body)) + body + table)


def painted(levels):
    "An iron-like colour map, [0, 1]."
    x = levels / 255
    return np.dstack([np.sqrt(x), x**3, np.sin(2 * np.pi * x).clip(0)])


def folders(root, **names):
    for side, files in names.items():
        (root / side).mkdir(parents=True)
        for i, name in enumerate(files):
            Image.fromarray(np.roll(GREY, 7 * i, 1)).save(root / side / name)
    return root


@pytest.fixture
def tif(tmp_path):
    return tmp_path / "x.tif"


def refused(path, words, **options):
    with pytest.raises(InputError, match=f"{path.name}: .*{words}") as e:
        read_pixels(path) if not options else read_image(path, **options)
    assert words == "damaged" or "damaged" not in str(e.value)


def test_a_thumbnail_is_never_read_for_the_picture(tif):
    cmyk = np.asarray(Image.fromarray(RGB).convert("CMYK"))
    for picture, photometric in ((RGB, "rgb"), (cmyk, "separated"), (GREY.astype(np.uint16) * 200, 1)):
        for first in (dict(subfiletype=1), dict(subfiletype=1, subifds=1)):
            with tifffile.TiffWriter(tif) as t:
                t.write(RGB[::4, ::4].copy(), photometric="rgb", **first)
                t.write(picture, photometric=photometric)
            if photometric == "separated" and "subifds" in first:
                refused(tif, "CMYK")
                continue
            assert read_size(tif) == read_pixels(tif).values.shape[:2] == (64, 80)
    with tifffile.TiffWriter(tif) as t:  # the mask of a GeoTIFF
        t.write(GREY, photometric="minisblack")
        t.write(GREY > 30, photometric=4, subfiletype=4)
    assert_array_equal(read_pixels(tif).values, GREY)


def test_missing_data_is_no_temperature(tif):
    border = np.arange(64)[:, None] < 1
    tifffile.imwrite(tif, np.where(border, -9999, KELVIN), extratags=[(42113, 2, 6, "-9999", True)])
    refused(tif, "80 pixels hold no data .marked -9999")
    tifffile.imwrite(tif, np.where(border, np.float32(-3.4e38), KELVIN))
    refused(tif, "80 pixels hold no data .marked beyond 1e30")
    tifffile.imwrite(tif, KELVIN, extratags=[(42113, 2, 6, "-9999", True)])
    assert_array_equal(read_pixels(tif).values, KELVIN)


def test_without_photometric_interpretation_zero_is_black(tif):
    bare_tiff(tif, GREY.tobytes(), t262=None)
    assert_array_equal(read_pixels(tif).values, GREY)


def test_white_is_zero_leaves_empty_bits_empty(tif):
    twelve = GREY.astype(np.uint16) * 16
    tifffile.imwrite(tif, twelve)
    black_is_zero = read_image(tif)
    tifffile.imwrite(tif, 4095 - twelve, photometric="miniswhite")
    white_is_zero = read_image(tif)
    assert_allclose(white_is_zero.luminance, black_is_zero.luminance, atol=1e-6)
    assert white_is_zero.notes == black_is_zero.notes and "12 of 16 bits" in white_is_zero.notes[0]
    tifffile.imwrite(tif, 4000 - twelve, photometric="miniswhite", extratags=[(281, 3, 1, 4000, True)])
    assert read_pixels(tif).full == 4000
    assert_array_equal(read_pixels(tif).values, twelve)


@pytest.mark.parametrize("scale", [255, 1023, 16383, 65535])
def test_painted_infrared_is_seen_at_every_depth(tif, scale):
    values = np.rint(painted(GREY) * scale).astype(np.uint8 if scale == 255 else np.uint16)
    tifffile.imwrite(tif, values, photometric="rgb")
    refused(tif, "colour map", modality="ir")
    tifffile.imwrite(tif, np.dstack([KELVIN + 0.1, KELVIN, KELVIN - 0.1]), photometric="rgb")
    assert "differ slightly" in read_image(tif, modality="ir").notes[0]


def test_files_that_promise_more_than_they_hold_are_damaged(tif, tmp_path):
    half = zlib.compress(GREY[:32].tobytes())
    bare_tiff(tif, half, t259=(3, 8), t278=(4, 32))
    refused(tif, "damaged")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + r.tobytes() for r in GREY[:32])
    png = tmp_path / "half.png"
    png.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 80, 64, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    refused(png, "damaged")
    pgm = tmp_path / "deep.pgm"
    pgm.write_bytes(b"P5\n80 64\n1023\n" + (GREY.astype(np.uint16) * 16).astype(">u2").tobytes())
    refused(pgm, "samples reach 3504")


def test_properties_that_cannot_be_honoured_are_named(tif):
    bare_tiff(tif, GREY.tobytes(), t262=(3, 3))
    refused(tif, "palette without")
    cmyk = np.asarray(Image.fromarray(RGB).convert("CMYK"))
    tifffile.imwrite(tif, np.dstack([cmyk, GREY]), photometric=5, extrasamples=[2])
    refused(tif, "CMYK with a further channel")
    bare_tiff(tif, GREY.tobytes() * 3, t33629=(5, 8))
    read_pixels(tif)  # one plane


def test_a_portable_float_map_keeps_its_units(tmp_path):
    path = tmp_path / "k.pfm"
    path.write_bytes(b"Pf\n80 64\n-1.0\n" + KELVIN[::-1].tobytes())
    assert_array_equal(read_pixels(path).values, KELVIN)
    assert read_pixels(path).full is None


def test_monsters_and_pictures_without_pixels_do_not_end_a_folder(tmp_path):
    root = folders(tmp_path, ir=["a.png", "d.png"], vis=["a.png", "b.png", "c.png", "d.png"])
    size = dict(t256=(4, 10**6), t257=(4, 10**6), t278=(4, 10**6))
    bare_tiff(root / "ir/b.tif", zlib.compress(bytes(999)), **size, t258=(3, 16), t259=(3, 8), t339=(3, 3))
    bare_tiff(root / "ir/c.tif", b"\0" * 64, t256=(4, 0), t258=(3, 16), t339=(3, 3))
    report = fuse_folder(
        ir=root / "ir", vis=root / "vis", out=root / "out", model=BASELINES["average"], progress=False
    )
    assert [p.name for p in report.written] == ["a.png", "d.png"] and list(report.problems) == ["b", "c"]
    assert "too many pixels" in report.problems["b"]


def test_a_folder_has_one_white(tmp_path):
    (tmp_path / "vis").mkdir()
    (tmp_path / "ir").mkdir()
    for i, top in enumerate((4000, 4200)):
        tifffile.imwrite(tmp_path / f"vis/{i}.tif", (GREY / GREY.max() * top).astype(np.uint16))
        Image.fromarray(GREY).save(tmp_path / f"ir/{i}.png")
    assert common_range(sorted((tmp_path / "vis").iterdir())) == (0, 16383)
    places = {"ir": tmp_path / "ir", "vis": tmp_path / "vis"}
    fuse_folder(**places, out=tmp_path / "out", model=BASELINES["visible"], progress=False)
    means = [read_pixels(tmp_path / f"out/{i}.png").values.mean() for i in (0, 1)]
    assert means[1] / means[0] == pytest.approx(1.05, abs=0.01)
    with pytest.warns(UserWarning):  # a copy of the visible image has no SCD
        table = evaluate_folder(fused=tmp_path / "out", **places, progress=False)
    assert table["VIF"].min() > 1  # the visible half is whole, in the range in which it was fused


def test_fused_images_are_measured_as_they_are_with_a_remark(tif):
    tifffile.imwrite(tif, GREY.astype(np.uint16) * 16)
    levels, notes = to_gray_levels(tif, read_pixels(tif))
    assert levels.max() < 16 and "brightest sample 3504 of 65535" in notes[0]
    tifffile.imwrite(tif, GREY.astype(np.float32))
    with pytest.raises(InputError, match="a fused image whose values span"):
        read_gray(tif)


def names(root, **options):
    return [(p.ir.name, p.vis.name) for p in find_pairs(ir=root / "ir", vis=root / "vis", **options)]


def test_names_that_differ_in_more_than_the_modality_do_not_pair(tmp_path):
    root = folders(tmp_path / "a", ir=["a_-5.png", "a_10.png"], vis=["a_5.png", "a_10.png"])
    assert names(root) == [("a_10.png", "a_10.png")]
    root = folders(tmp_path / "b", ir=["scene.png", "x.png"], vis=["scene_VI.png", "x.png"])
    assert names(root) == [("x.png", "x.png")]
    root = folders(tmp_path / "c", ir=["1_ir.png", "2_ir.png"], vis=["1.png", "2.png"])
    assert names(root) == [("1_ir.png", "1.png"), ("2_ir.png", "2.png")]


def test_patterns_that_fit_nothing_are_refused(tmp_path):
    root = folders(tmp_path, ir=["IR1.png"], vis=["VIS1.png"], both=["DJI_1_T.png", "DJI_1_W.png"])
    for patterns in (("IR*.png", "VIS*.png"), ("ir*", "vis*"), ("VIS*", "IR*")):
        with pytest.raises(InputError, match="fits none of the names on the ir side, such as IR1"):
            names(root, names=patterns)
    (pair,) = find_pairs(ir=root / "both", vis=root / "both", names=("*_T", "*_W"))
    assert (pair.ir.name, pair.vis.name) == ("DJI_1_T.png", "DJI_1_W.png")
    with pytest.raises(InputError, match="--names"):
        find_pairs(ir=root / "both", vis=root / "both")


def test_evaluating_takes_roots_patterns_and_doubled_names(tmp_path):
    root = folders(tmp_path, ir=["1_t.png", "2_t.png"], vis=["1_v.png", "2_v.png"], out=["1.png", "2.png"])
    quiet = dict(progress=False, strict=False)
    patterns = ("*_t", "*_v")
    table = evaluate_folder(fused=root / "out", ir=root, vis=root, names=patterns, **quiet)
    assert len(table) == 2
    Image.fromarray(GREY).save(root / "vis/2_v.bmp")
    table = evaluate_folder(fused=root / "out", ir=root, vis=root, names=patterns, **quiet)
    assert len(table) == 1 and "2_v.bmp and 2_v.png share the stem" in str(table.attrs["problems"])


def test_what_lies_in_a_partners_place_is_said(tmp_path):
    root = folders(tmp_path, ir=["1.png", "2.png", "3.png"], vis=["3.png"])
    (root / "vis/1.png").mkdir()
    (root / "vis/2.heic").write_bytes(b"\0\0\0\x18ftypheic")
    found = find_pairs(ir=root / "ir", vis=root / "vis").problems
    assert "1.png lies there, but is no regular file" in found["1"]
    assert "2.heic lies there, but is of no known format" in found["2"]
