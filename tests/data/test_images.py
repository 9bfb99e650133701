"""Reading, writing and matching image files: formats, depths, damage."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data import images
from smfnet.data.images import (
    read_image,
    read_pair,
    rgb_to_ycbcr,
    thermal_range,
    to_levels,
    write_image,
    ycbcr_to_rgb,
)
from smfnet.data.matching import find_pairs, list_images
from smfnet.data.pixels import read_pixels

kornia_rs = pytest.importorskip("kornia_rs")
rust = getattr(kornia_rs, "io", kornia_rs)


def noise(shape, top=256, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, top, shape).astype(dtype)


def plain_tiff(path, data: np.ndarray, bits: int, sample_format: int = 1) -> None:
    """A little-endian, uncompressed, one-strip grey TIFF of any bit depth; `data`: packed bytes of rows."""
    height, raw = data.shape[0], data.tobytes()
    width = len(raw) // height * 8 // bits
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(raw)),
        (339, sample_format),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "tif", "TIFF", "webp", "gif", "pgm"])
def test_lossless_grey_is_exact_and_grey(tmp_path, suffix):
    grey = noise((20, 33))
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    picture = read_image(tmp_path / f"x.{suffix}")
    assert picture.chroma is None and picture.bits == 8 and picture.size == (20, 33)
    assert_array_equal(np.rint(picture.luminance * 255), grey)
    assert_array_equal(np.rint(read_image(tmp_path / f"x.{suffix}", modality="ir").luminance * 255), grey)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_lossless_colour_is_exact(tmp_path, suffix):
    rgb = noise((17, 20, 3))
    Image.fromarray(rgb).save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    picture = read_image(tmp_path / f"x.{suffix}")
    assert_array_equal(to_levels(picture.luminance, picture.chroma), rgb)
    # the sum of three float32 products may differ from float64 in the last place
    assert_allclose(picture.luminance * 255, rgb @ np.array([0.299, 0.587, 0.114]), atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("YCbCr", "tif"),
        ("RGB", "jpg"),
    ],
)
def test_other_modes_give_what_pillow_shows(tmp_path, mode, suffix):
    Image.fromarray(
        np.dstack([np.add.outer(np.arange(20), np.arange(24) * k) % 256 for k in (2, 3, 5)]).astype(np.uint8)
    ).convert(mode).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as im:
        shown = np.asarray(im.convert("RGB"))
    picture = read_image(tmp_path / f"x.{suffix}")
    chroma = picture.chroma or (np.zeros_like(picture.luminance),) * 2
    assert_array_equal(to_levels(picture.luminance, chroma), shown)


def test_transparency_is_ignored_and_said(tmp_path):
    rgba = noise((20, 20, 4))
    Image.fromarray(rgba, "RGBA").save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").notes == ("transparency ignored",)
    assert_array_equal(read_pixels(tmp_path / "clear.png").values, rgba[..., :3])
    rgba[..., 3] = 255
    Image.fromarray(rgba, "RGBA").save(tmp_path / "opaque.png")
    assert read_image(tmp_path / "opaque.png").notes == ()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_exact(tmp_path, suffix):
    grey = noise((20, 33), 65536, np.uint16)
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}")
    picture = read_image(tmp_path / f"x.{suffix}")
    assert picture.bits == 16 and picture.chroma is None
    assert_array_equal(to_levels(picture.luminance, bits=16), grey)


@pytest.mark.parametrize("kind", ["png", "png-alpha", "tif", "ppm"])
def test_sixteen_bit_colour_keeps_its_low_byte(tmp_path, kind):
    rgb, path = noise((20, 33, 3), 65536, np.uint16), tmp_path / f"x.{kind[:3]}"
    if kind == "png":
        rust.write_image_png_u16(str(path), rgb, "rgb")
    elif kind == "png-alpha":
        rust.write_image_png_u16(str(path), np.dstack([rgb, rgb[..., :1]]), "rgba")
    elif kind == "tif":
        rust.write_image_tiff_u16(str(path), rgb, "rgb")
    else:
        path.write_bytes(b"P6\n33 20\n65535\n" + rgb.astype(">u2").tobytes())
    pixels = read_pixels(path)
    assert_array_equal(pixels.values, rgb)
    assert pixels.full == 65535 and read_image(path).bits == 16


def test_grey_with_alpha_of_sixteen_bits_is_read_and_plain_text_refused(tmp_path):
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stored = noise((20, 20, 2), 65536, np.uint16).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in stored)
    header = struct.pack(">IIBBBBB", 20, 20, 16, 4, 0, 0, 0)  # grey and alpha, 16 bits each
    (tmp_path / "la.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "plain.ppm").write_text("P3\n1 1\n65535\n1 2 65535\n")
    found = read_pixels(tmp_path / "la.png")
    assert_array_equal(found.values, stored[..., 0])
    assert found.notes == ("alpha channel ignored",)
    with pytest.raises(InputError, match="plain.ppm"):
        read_pixels(tmp_path / "plain.ppm")


def test_packed_samples_are_read_and_wider_ones_refused(tmp_path):
    plain_tiff(tmp_path / "u16.tif", noise((20, 40)), 16)
    assert read_pixels(tmp_path / "u16.tif").values.dtype == np.uint16  # the hand-made file itself is sound
    packed = noise((20, 12, 3)).astype(np.uint16)  # three bytes hold two samples
    plain_tiff(tmp_path / "u12.tif", packed.astype(np.uint8).reshape(20, 36), 12)
    high, middle, low = np.moveaxis(packed, -1, 0)
    expected = np.stack([high << 4 | middle >> 4, (middle & 15) << 8 | low], -1).reshape(20, 24)
    found = read_pixels(tmp_path / "u12.tif")
    assert_array_equal(found.values, expected)
    assert found.full == 4095
    plain_tiff(tmp_path / "u32.tif", noise((20, 80)), 32)
    with pytest.raises(InputError, match="u32.tif.*(16-bit|another)"):
        read_pixels(tmp_path / "u32.tif")


def test_signed_and_float_images(tmp_path):
    kelvin = np.linspace(-20, 40, 400).reshape(20, 20)
    Image.fromarray(kelvin.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(kelvin.astype(np.float32)).save(tmp_path / "float.tif")
    unit = (kelvin - kelvin.min()) / np.ptp(kelvin)
    Image.fromarray(unit.astype(np.float32)).save(tmp_path / "unit.tif")
    for name in ("int.tif", "float.tif"):
        with pytest.raises(InputError, match=f"{name}.*white"):
            read_image(tmp_path / name)
        given_range = read_image(tmp_path / name, modality="ir", range=(-20, 40)).luminance
        assert_allclose(
            given_range, unit, atol=1.01 / 60 if name == "int.tif" else 1e-6
        )  # integers: one degree of 60
    for modality in ("ir", "vis"):
        assert_allclose(read_image(tmp_path / "unit.tif", modality=modality).luminance, unit, atol=1e-7)
    assert read_image(tmp_path / "unit.tif").bits == 16


def test_ten_bit_pgm_has_its_own_white(tmp_path):
    ten = noise((20, 24), 1024, np.uint16)
    (tmp_path / "x.pgm").write_bytes(b"P5 24 20 1023\n" + ten.astype(">u2").tobytes())
    assert_allclose(read_image(tmp_path / "x.pgm").luminance, ten / 1023, atol=1e-6)


def test_turned_photographs_are_turned_upright(tmp_path):
    upright, exif = noise((20, 33, 3)), Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "x.png", exif=exif)
    assert_array_equal(read_pixels(tmp_path / "x.png").values, upright)


def test_turned_deep_images_are_upright_or_refused(tmp_path):
    upright, exif = noise((20, 33), 65536, np.uint16), Image.Exif()
    exif[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(upright))
    for suffix in ("png", "tif"):
        Image.fromarray(turned).save(tmp_path / f"x.{suffix}", exif=exif)
        assert_array_equal(read_pixels(tmp_path / f"x.{suffix}").values, upright)


def test_several_pages_are_refused(tmp_path):
    frames = [Image.fromarray(noise((20, 20), seed=i)) for i in range(3)]
    for name in ("x.tif", "x.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(InputError, match=f"{name}.*3 pages"):
            read_pixels(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "kind", ["x.png", "x.jpg", "x.tif", "x.bmp", "x.webp", "x.pgm", "deep.png", "deep.tif", "deep.ppm"]
)
def test_every_truncation_is_named(tmp_path, kind):
    path, deep = tmp_path / kind, noise((32, 32, 3), 65536, np.uint16)
    if kind == "deep.ppm":
        path.write_bytes(b"P6\n32 32\n65535\n" + deep.astype(">u2").tobytes())
    elif kind.startswith("deep"):
        getattr(rust, f"write_image_{path.suffix[1:].replace('tif', 'tiff')}_u16")(str(path), deep, "rgb")
    else:
        Image.fromarray(noise((32, 32))).save(path)
    whole = path.read_bytes()
    read_pixels(path)
    for part in np.linspace(0, 0.9, 10):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(InputError, match=kind):
            read_pixels(path)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name, word in (("text.png", "not a readable"), ("folder.png", "folder"), ("none.png", "no such")):
        with pytest.raises(InputError, match=f"{name}.*{word}"):
            read_pixels(tmp_path / name)


def test_not_a_number_is_named(tmp_path):
    for value in (np.nan, np.inf):
        picture = np.ones((20, 20), np.float32)
        picture[3, 3] = value
        Image.fromarray(picture).save(tmp_path / "x.tif")
        with pytest.raises(InputError, match="x.tif.*NaN"):
            read_image(tmp_path / "x.tif", modality="ir")


# --- colour and rounding --------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_eight_bit_colours_survive(colour):
    rgb = np.array([[colour]], np.uint8)
    y, cb, cr = (p / np.float32(255) for p in rgb_to_ycbcr(rgb))
    assert_array_equal(to_levels(y, (cb, cr)), rgb)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=3, max_size=3))
def test_sixteen_bit_error_is_that_of_the_constants(colour):
    rgb = np.array([[colour]])
    assert (
        np.abs(ycbcr_to_rgb(*rgb_to_ycbcr(rgb)) - rgb).max() <= 0.00035 * 65535
    )  # 1.403·0.713 − 1 = 0.000339


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 65535))
def test_sixteen_bit_grey_survives(level):
    luminance = np.array([[level]], np.uint16).astype(np.float32) / np.float32(65535)
    assert to_levels(luminance, bits=16)[0, 0] == level


def test_rounding_is_half_to_even_and_clips():
    assert_array_equal(
        to_levels(np.array([[0.5, 1.5, 2.5, 254.5, 255.4, 300, -1]]) / 255), [[0, 2, 2, 254, 255, 255, 0]]
    )


def test_dead_pixels_do_not_rule_the_range():
    counts = noise((100, 100), 200, np.uint16) + 7000
    counts[0, :3] = 0, 65535, 65535
    lo, hi, _ = thermal_range(counts)
    assert 7000 <= lo < hi <= 7200


def test_ranges(tmp_path):
    Image.fromarray(noise((20, 20), 300, np.uint16) + 7000).save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png", modality="ir")
    assert "0.1–99.9 percentiles" in read.notes[0] and read.luminance.min() == 0 and read.luminance.max() == 1
    for bad in ((3, 3), (5, 1), (0, np.inf), (1,), "ab", (np.nan, 1)):
        with pytest.raises(InputError, match="range"):
            read_image(tmp_path / "x.png", modality="ir", range=bad)
    with pytest.raises(InputError, match="modality"):
        read_image(tmp_path / "x.png", modality="nir")


# --- pairs of pictures ----------------------------------------------------------------------------


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize(
    ("ir", "vis", "word"),
    [
        (noise((20, 30)), noise((30, 20)), "differ in size"),
        (noise((15, 30)), noise((15, 30)), "too small"),
        (np.full((20, 30), 9, np.uint8), noise((20, 30)), "ir.png.*same value"),
        (np.full((20, 30), 9000, np.uint16), noise((20, 30)), "ir.png.*same value"),
        (noise((20, 30)), np.zeros((20, 30, 3), np.uint8), "vis.png.*same value"),
    ],
)
def test_pairs_that_do_not_fit(tmp_path, ir, vis, word):
    with pytest.raises(InputError, match=word):
        read_pair(ir=save(tmp_path / "ir.png", ir), vis=save(tmp_path / "vis.png", vis))


def test_a_range_beside_the_image_is_noticed(tmp_path):
    ir, vis = (
        save(tmp_path / "ir.png", noise((20, 30), 100, np.uint16) + 7000),
        save(tmp_path / "vis.png", noise((20, 30))),
    )
    with pytest.raises(InputError, match="check the range"):
        read_pair(ir=ir, vis=vis, range=(0, 100))


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [False, True])
def test_what_is_written_is_read_back(tmp_path, bits, colour):
    rng = np.random.default_rng(bits)
    luminance, chroma = rng.random((20, 31)), tuple(rng.random((2, 20, 31)) * 0.1) if colour else None
    written = write_image(tmp_path / "deep" / "x.png", luminance, chroma, bits=bits)
    assert (
        written.dtype == {8: np.uint8, 16: np.uint16}[bits]
        and written.shape == (20, 31, 3)[: 3 if colour else 2]
    )
    assert_array_equal(read_pixels(tmp_path / "deep" / "x.png").values, written)


def test_failed_writing_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    write_image(tmp_path / "x.png", np.eye(20))
    before = (tmp_path / "x.png").read_bytes()

    def half(path, levels):
        path.write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "_save_png", half)
    with pytest.raises(InputError, match="full|space"):
        write_image(tmp_path / "x.png", np.ones((20, 20)))
    assert (tmp_path / "x.png").read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


def test_unwritable_places_and_values(tmp_path):
    (tmp_path / "file").touch()
    for place, word in (
        (tmp_path / "file" / "x.png", "file: cannot write"),
        (tmp_path / "x.jpg", "x.jpg.*PNG"),
    ):
        with pytest.raises(InputError, match=word):
            write_image(place, np.eye(20))
    for bad in (np.full((20, 20), np.nan), np.zeros((1, 20, 20))):
        with pytest.raises(InputError, match="luminance"):
            write_image(tmp_path / "x.png", bad)
    with pytest.raises(InputError, match="bits"):
        write_image(tmp_path / "x.png", np.eye(20), bits=12)
    assert os.listdir(tmp_path) == ["file"]


# --- finding pairs --------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_a_named_subfolder_comes_before_stray_images(tmp_path):
    touch(tmp_path, "preview.png", "ir/a.png", "vi/a.png")
    assert [p.stem for p in find_pairs(ir=tmp_path, vis=tmp_path)] == ["a"]
    touch(tmp_path / "flat", "a.png", "ir/a.png")  # infrared below the visible images
    assert [p.vis.parent.name for p in find_pairs(ir=tmp_path / "flat", vis=tmp_path / "flat")] == ["flat"]


@pytest.mark.parametrize("name", ["vi", "vis", "visible", "VIS"])
def test_usual_folder_names(tmp_path, name):
    touch(tmp_path, "IR/a.b.png", f"{name}/a.b.JPG")
    for vis in (tmp_path, tmp_path / "vis", tmp_path / name):
        assert [p.stem for p in find_pairs(ir=tmp_path, vis=vis)] == ["a.b"]


def test_matching_reports_everything_it_leaves_out(tmp_path):
    touch(
        tmp_path,
        "ir/a.png",
        "ir/b.png",
        "ir/d.png",
        "ir/d.tif",
        "vi/a.png",
        "vi/c.png",
        "vi/d.png",
        "vi/.a.png",
        "vi/a.txt",
        "ir/._a.png",
    )
    found = find_pairs(ir=tmp_path / "ir", vis=tmp_path / "vi")
    assert [tuple(p) for p in found] == [("a", tmp_path / "ir/a.png", tmp_path / "vi/a.png")]
    assert list(found.problems) == ["b", "c", "d"]
    assert "b.png" in found.problems["b"] and "no visible" in found.problems["b"]
    assert "c.png" in found.problems["c"] and "no infrared" in found.problems["c"]
    assert "d.tif" in found.problems["d"] and "twice" in found.problems["d"]


def test_a_file_looks_for_its_partner_in_a_folder(tmp_path):
    touch(tmp_path, "ir/a.png", "ir/b.png", "vi/a.png")
    assert [p.vis.name for p in find_pairs(ir=tmp_path / "ir/a.png", vis=tmp_path / "vi")] == ["a.png"]
    assert [p.ir.name for p in find_pairs(ir=tmp_path / "ir", vis=tmp_path / "vi/a.png")] == ["a.png"]
    lonely = find_pairs(ir=tmp_path / "ir/b.png", vis=tmp_path / "vi")
    assert not len(lonely) and "no visible partner" in lonely.problems["b"]


def test_places_without_pairs_are_named(tmp_path):
    touch(tmp_path, "ir/a.png", "two/vi/a.png", "two/vis/a.png", "empty/notes.txt")
    for path, word in (
        ("none", "no such"),
        ("empty", "holds no image"),
        ("two", "could mean vi or vis"),
        ("ir", "infrared and as visible"),
    ):
        with pytest.raises(InputError, match=f"{path}.*{word}"):
            find_pairs(ir=tmp_path / "ir", vis=tmp_path / path)


def test_listing_is_sorted_and_by_stem(tmp_path):
    touch(tmp_path, "b.png", "a.png", "a.jpg")
    assert {k: [p.name for p in v] for k, v in list_images(tmp_path).items()} == {
        "a": ["a.jpg", "a.png"],
        "b": ["b.png"],
    }
