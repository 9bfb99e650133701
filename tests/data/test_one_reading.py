"""Formats × depths × tags: what independent writers store is what every command reads."""

import itertools
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from smfnet.core.checks import InputError
from smfnet.data.images import read_image
from smfnet.data.pairs import get_pairs
from smfnet.data.patches import load_pairs
from smfnet.data.pixels import read_pixels, read_size
from smfnet.fusion import fuse_folder
from smfnet.fusion.baselines import BASELINES
from smfnet.metrics.files import image_size, read_gray

SHAPE = (48, 64)
TURN = {  # how a viewer brings stored samples upright, written out once more
    1: lambda v: v,
    3: lambda v: np.rot90(v, 2),
    5: lambda v: np.swapaxes(v, 0, 1),
    6: lambda v: np.rot90(v, 3),
    7: lambda v: np.flip(np.swapaxes(v, 0, 1), (0, 1)),
    8: lambda v: np.rot90(v),
}
BACK = {1: 1, 3: 3, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that undoes one


def scene(bits, colour, seed=0):
    "A smooth picture that uses its whole depth, H×W or H×W×3, as whole numbers."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    waves = [np.sin(x / (3 + i) + rng.uniform(0, 6)) + np.cos(y / (4 + i)) for i in range(3 if colour else 1)]
    unit = np.stack([(w - w.min()) / np.ptp(w) for w in waves], -1)
    values = np.rint(unit * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)
    return values if colour else values[..., 0]


def stored(values, orientation):
    return np.ascontiguousarray(TURN[BACK[orientation]](values))


def write_tiff(path, values, bits, orientation, *, white_is_zero=False, planes=False, alpha=False, **options):
    "A TIFF by tifffile, with the tags asked for."
    v = stored(values, orientation)
    if white_is_zero:
        v = (2**bits - 1 - v).astype(v.dtype)
    if alpha:
        opaque = np.full((*v.shape[:2], 1), 2**bits - 1, v.dtype)
        v = np.concatenate([v if v.ndim == 3 else v[..., None], opaque], -1)
        options["extrasamples"] = ["unassalpha"]
    if planes:
        v = np.moveaxis(v, -1, 0)
        options["planarconfig"] = "separate"
    colour = values.ndim == 3
    photometric = "rgb" if colour else "miniswhite" if white_is_zero else "minisblack"
    if bits not in (8, 16):
        options["bitspersample"] = bits
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(path, np.ascontiguousarray(v), photometric=photometric, extratags=tags, **options)


def write_png(path, values, bits, orientation):
    v, exif = stored(values, orientation), Image.Exif()
    exif[0x0112] = orientation
    if bits == 8 or v.ndim == 2:
        Image.fromarray(v).save(path, exif=exif)
        return
    data, tag = imagecodecs.png_encode(v), exif.tobytes()[6:]
    import zlib

    chunk = len(tag).to_bytes(4, "big") + b"eXIf" + tag + zlib.crc32(b"eXIf" + tag).to_bytes(4, "big")
    path.write_bytes(data[:33] + chunk + data[33:])  # behind the header


def write_pnm(path, values, bits, orientation):
    assert orientation == 1
    kind, top = (b"P6" if values.ndim == 3 else b"P5"), 2**bits - 1
    data = values.astype(">u2" if bits > 8 else np.uint8).tobytes()
    path.write_bytes(kind + f" {SHAPE[1]} {SHAPE[0]} {top}\n".encode() + data)


def kinds():
    "Name, suffix, writer, bits, colour, orientation, options of every combination."
    for bits, colour, orientation in itertools.product((8, 16), (False, True), TURN):
        yield f"png{bits}", ".png", write_png, bits, colour, orientation, {}
        yield f"tiff{bits}", ".tif", write_tiff, bits, colour, orientation, {}
    for bits, colour in itertools.product((8, 10, 12, 14, 16), (False, True)):
        yield f"pnm{bits}", ".ppm" if colour else ".pgm", write_pnm, bits, colour, 1, {}
    for bits in (4, 10, 12, 14):
        for orientation in (1, 6):
            yield f"packed{bits}", ".tif", write_tiff, bits, False, orientation, {}
    for compression in ("lzw", "deflate", "packbits", "zstd", "lzma", "jpeg2000"):
        for bits, colour in itertools.product((8, 16), (False, True)):
            options = {"compression": compression}
            if compression == "jpeg2000":
                options["compressionargs"] = {"reversible": True, "level": 0}
            yield compression, ".tif", write_tiff, bits, colour, 6, options
    for bits, orientation in itertools.product((8, 16), (1, 8)):
        yield "white_is_zero", ".tif", write_tiff, bits, False, orientation, {"white_is_zero": True}
        yield "planes", ".tif", write_tiff, bits, True, orientation, {"planes": True}
        for colour in (False, True):
            yield "alpha", ".tif", write_tiff, bits, colour, orientation, {"alpha": True}
            tiles = {"tile": (16, 16), "byteorder": ">", "predictor": True, "compression": "deflate"}
            yield "tiles", ".tif", write_tiff, bits, colour, orientation, tiles
    yield "bigtiff", ".tif", write_tiff, 16, True, 3, {"bigtiff": True}


ALL = [pytest.param(*k[1:], id=f"{k[0]}-{'colour' if k[4] else 'grey'}-{k[3]}-{k[5]}") for k in kinds()]


def test_the_product_is_large():
    assert len(ALL) > 100 and len({p.id for p in ALL}) >= 80


def luminance(values, bits):
    "By an own formula, in [0, 1]."
    v = values.astype(np.float64) / (2**bits - 1)
    return v if v.ndim == 2 else v @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize(("suffix", "writer", "bits", "colour", "orientation", "options"), ALL)
def test_every_command_reads_the_same(tmp_path, suffix, writer, bits, colour, orientation, options):
    vis = scene(bits, colour)
    (tmp_path / "vi").mkdir()
    (tmp_path / "ir").mkdir()
    path = tmp_path / "vi" / f"a{suffix}"
    writer(path, vis, bits, orientation, **options)
    thermal = scene(8, False, seed=5)
    Image.fromarray(thermal).save(tmp_path / "ir/a.png")
    found, expected = read_pixels(path), luminance(vis, bits)
    white = 255 if bits <= 8 else 2**bits - 1
    assert found.full == white
    assert_array_equal(found.values, vis if bits >= 8 else np.rint(vis * (255 / (2**bits - 1))))
    assert read_size(path) == image_size(path)[::-1] == SHAPE
    assert_allclose(read_image(path).luminance, expected, atol=1e-6 if bits >= 8 else 1 / 255)
    seen = get_pairs(tmp_path)[0]  # data check
    assert_allclose(seen.vis, expected, atol=1e-6 if bits >= 8 else 1 / 255)
    trained = load_pairs(tmp_path, progress=False)[0]  # training
    assert_array_equal(trained.vis, seen.vis)
    level = read_gray(path, role="vis")  # evaluate: whole levels, the high byte of what is deeper
    assert np.abs(level - expected * 255).max() <= (1.51 if colour else 1.01)
    folders, average = {s: tmp_path / s for s in ("ir", "out")}, BASELINES["average"]
    report = fuse_folder(**folders, vis=tmp_path / "vi", model=average, progress=False)
    assert report.ok
    fused = read_image(tmp_path / "out/a.png").luminance
    mean = (expected + thermal / 255) / 2
    inside = fused > 0 if not colour else np.abs(fused - mean) < 0.02  # a joined colour may leave its gamut
    assert inside.mean() > 0.5 and np.abs(fused - mean)[inside].max() < 0.02


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_infrared_is_fused_and_measured_in_one_range(tmp_path, bits, suffix, orientation):
    if suffix == ".pgm" and orientation != 1:
        pytest.skip("PNM has no orientation")
    counts = scene(bits, False)
    path = tmp_path / f"t{suffix}"
    if suffix == ".pgm":
        write_pnm(path, counts, bits, orientation)
    else:
        {".png": write_png, ".tif": write_tiff}[suffix](path, counts.astype(np.uint16), 16, orientation)
    lo, hi = np.percentile(counts, (0.1, 99.9))
    expected = np.clip((counts - lo) / (hi - lo), 0, 1)
    seen = read_image(path, modality="ir")
    assert_allclose(seen.luminance, expected, atol=1e-5)
    assert_array_equal(read_gray(path, role="ir"), np.rint(seen.luminance * 255))
    top = 2**bits - 1
    assert_allclose(read_gray(path, role="ir", range=(0, top)), counts / top * 255, atol=0.51)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("colour", [False, True])
def test_visible_images_that_leave_bits_empty_are_seen(tmp_path, bits, colour):
    values = scene(bits, colour).astype(np.uint16)
    tifffile.imwrite(tmp_path / "v.tif", values, photometric="rgb" if colour else "minisblack")
    picture = read_image(tmp_path / "v.tif")
    assert_allclose(picture.luminance, luminance(values, bits), atol=1e-6)
    assert f"{bits} of 16 bits" in picture.notes[-1]
    assert np.abs(read_gray(tmp_path / "v.tif", role="vis") - picture.luminance * 255).max() <= 1.51
    given = read_image(tmp_path / "v.tif", range=(0, 65535))
    assert not given.notes
    assert_allclose(given.luminance, luminance(values, 16), atol=1e-6)
    whole = (scene(8, colour).astype(np.uint16) // 8) * 257  # a dark picture of 8 bits, its byte repeated
    tifffile.imwrite(tmp_path / "w.tif", whole, photometric="rgb" if colour else "minisblack")
    assert not read_image(tmp_path / "w.tif").notes


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_measurements_keep_their_units(tmp_path, dtype, orientation):
    values = (scene(7, False).astype(np.float64) - 40).astype(dtype)
    write_tiff(tmp_path / "m.tif", values, 16, orientation)
    tifffile.imwrite(
        tmp_path / "m.tif", stored(values, orientation), extratags=[(274, "H", 1, orientation, True)]
    )
    found = read_pixels(tmp_path / "m.tif")
    assert found.full is None and found.values.min() < 0
    assert_array_equal(found.values, values)
    picture = read_image(tmp_path / "m.tif", modality="ir", range=(-40, 87))
    assert_allclose(picture.luminance, (values.astype(float) + 40) / 127, atol=1e-6)
    levels = read_gray(tmp_path / "m.tif", role="ir", range=(-40, 87))
    assert_array_equal(levels, np.rint(picture.luminance * 255))
    with pytest.raises(InputError, match="m.tif.*what white is"):
        read_image(tmp_path / "m.tif")


def odd(path, values, **options):
    tifffile.imwrite(path, values, **options)


@pytest.mark.parametrize(
    ("words", "values", "options"),
    [
        ("sample format COMPLEX", np.ones((20, 20), np.complex64), {}),
        ("32-bit unsigned", np.ones((20, 20), np.uint32), {}),
        ("64-bit unsigned", np.ones((20, 20), np.uint64), {}),
        ("64-bit signed", np.ones((20, 20), np.int64), {}),
        ("2 samples a pixel", np.ones((20, 20, 2), np.uint16), {"photometric": 1, "planarconfig": 1}),
        ("5 pages", np.ones((5, 20, 20), np.uint16), {"photometric": "minisblack"}),
        ("5 pages", np.ones((5, 20, 20), np.uint16), {"imagej": True}),
        ("WhiteIsZero with", np.ones((20, 20), np.float32), {"photometric": "miniswhite"}),
        ("photometric interpretation CFA", np.ones((20, 20), np.uint16), {"photometric": "cfa"}),
        ("CIELab of 16", np.ones((20, 20, 3), np.uint16), {"photometric": "cielab"}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(tmp_path, words, values, options):
    tifffile.imwrite(tmp_path / "odd.tif", values, **options)
    with pytest.raises(InputError, match=f"odd.tif: .*{words}") as e:
        read_pixels(tmp_path / "odd.tif")
    assert "damaged" not in str(e.value)


def test_a_thumbnail_beside_the_picture_is_no_second_page(tmp_path):
    values = scene(16, False)
    with tifffile.TiffWriter(tmp_path / "t.tif") as tif:
        tif.write(values)
        tif.write(values[::4, ::4], subfiletype=1)
    assert_array_equal(read_pixels(tmp_path / "t.tif").values, values)


def test_a_palette_is_the_colours_that_it_stands_for(tmp_path):
    values, table = scene(8, False), np.random.default_rng(1).integers(0, 65536, (3, 256), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", values, photometric="palette", colormap=table)
    assert_array_equal(read_pixels(tmp_path / "p.tif").values, np.moveaxis(table[:, values] >> 8, 0, -1))


@pytest.mark.parametrize("name", ["inferno", "jet", "hot", "gray"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_painted_infrared_is_refused_and_grey_saved_as_colour_is_not(tmp_path, name, suffix):
    import matplotlib

    painted = (matplotlib.colormaps[name](scene(8, False))[..., :3] * 255).astype(np.uint8)
    Image.fromarray(painted).save(tmp_path / f"t{suffix}", quality=60)
    if name == "gray":
        assert read_image(tmp_path / f"t{suffix}", modality="ir").size == SHAPE
        read_gray(tmp_path / f"t{suffix}", role="ir")
        return
    for read in (lambda p: read_image(p, modality="ir"), lambda p: read_gray(p, role="ir")):
        with pytest.raises(InputError, match=f"t{suffix}: .*colour map"):
            read(tmp_path / f"t{suffix}")


@pytest.mark.parametrize("error", [RuntimeError("x"), SystemError("y"), ValueError("z"), BaseException("p")])
def test_a_decoder_may_raise_anything_and_the_folder_goes_on(tmp_path, monkeypatch, error):
    for side in ("ir", "vi", "out"):
        (tmp_path / side).mkdir()
        for i in range(3):
            Image.fromarray(scene(8, False, seed=i)).save(tmp_path / side / f"{i}.png")
    real = Image.open

    def broken(f, *args, **kwargs):
        if Path(getattr(f, "name", "")).name == "1.png":
            raise error
        return real(f, *args, **kwargs)

    monkeypatch.setattr(Image, "open", broken)
    folders = {"ir": tmp_path / "ir", "vis": tmp_path / "vi"}
    report = fuse_folder(**folders, out=tmp_path / "new", model=BASELINES["average"], progress=False)
    assert [p.name for p in report.written] == ["0.png", "2.png"] and list(report.problems) == ["1"]
    from smfnet.metrics import evaluate_folder

    table = evaluate_folder(fused=tmp_path / "out", **folders, progress=False, strict=False)
    assert list(table.index) == ["0", "2"] and "1.png" in table.attrs["problems"]["1"]
